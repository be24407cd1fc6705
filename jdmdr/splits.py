"""Named splits: which queries, judged by which qrels, are searched in which corpus.

    data.splits = "clean=clean:test:pool,mono=test:mono:own,to_en=test:test:en,lead=lead:none:own,dev"

A split is NAME=TOPICS:QRELS:CORPUS; NAME alone is NAME=NAME:NAME:own. With `none` as qrels there are runs and no figures,
such as for a leaderboard. The corpus is

    own       the query's own language: monolingual
    CODE      one language, for the queries of all others: cross-lingual
    pool      all languages; a judgment names a passage of the query's own language, unless every docid of the data root
              names one passage alone, when it may name one of any language
    parallel  all languages; a docid means the same passage in every language, and each of them is judged
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jdmdr.corpus import Collection
from jdmdr.datasets import LanguageFiles
from jdmdr.library import TRAIN, Library
from jdmdr.metrics import Qrels
from jdmdr.types import Passage, UserError

OWN, POOL, PARALLEL = "own", "pool", "parallel"
POOLED = (POOL, PARALLEL)
NONE = "none"  # the qrels of queries that nobody has judged, or whose judgments are kept from us


class Split(NamedTuple):
    """Queries `topics` of every language, judged by `qrels`, searched in `corpus`."""

    name: str
    topics: str
    qrels: str
    corpus: str = OWN


TRAINING = Split(TRAIN, TRAIN, TRAIN)


def parse(text: str) -> list[Split]:
    """The splits of `data.splits`, in its order; raises UserError for what is not one."""
    found: dict[str, Split] = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([\w-]+)(?:=([\w-]+):([\w-]+):([\w-]+))?", entry)
        if not match:
            raise UserError(
                f"data.splits: {entry!r} is no split; write NAME=TOPICS:QRELS:CORPUS, such as clean=clean:test:pool, or a "
                "name that both topics and qrels have"
            )
        name, *parts = match.groups()
        if name in found:
            raise UserError(f"data.splits: the name {name!r} stands twice; give each split its own")
        found[name] = Split(name, *parts) if parts[0] else Split(name, name, name)
    return list(found.values())


def resolve(text: str, files: Mapping[str, LanguageFiles]) -> list[Split]:
    """The splits of `data.splits` over the files that were found; empty: every name that has both topics and qrels in
    some language, but `train`, each language in its own corpus. Raises UserError for a name that no file has."""
    topics = {name for of in files.values() for name in _topics(of)}
    qrels = {name for of in files.values() for name in of.qrels}
    if not text.strip():
        both = {name for of in files.values() for name in _topics(of) & {*of.qrels}}
        return [Split(name, name, name) for name in sorted(both - {TRAIN})]
    wanted = parse(text)
    corpora = {OWN, *POOLED, *files}
    for split in wanted:
        for kind, name, there in (("topics", split.topics, topics), ("qrels", split.qrels, qrels | {NONE}),
                                  ("corpus", split.corpus, corpora)):  # fmt: skip
            if name not in there:
                raise UserError(f"data.splits: {split.name} names the {kind} {name!r}; there are: "
                                f"{', '.join(sorted(there)) or 'none'}")  # fmt: skip
    return wanted


def _topics(files: LanguageFiles) -> set[str]:
    """A file with the queries of all splits has those that each qrels judges."""
    return {*files.topics, *(files.qrels if files.queries else ())}


class Target:
    """What the queries of one language are searched in: one collection, or all of them as one.

    A row counts through the member languages in the library's order. Passages are named by docid; over several
    languages by LANG:docid, unless every docid of the library names one passage alone.
    """

    def __init__(self, library: Library, lang: str, split: Split):
        self.library, self.lang, self.split = library, lang, split
        self.langs = members(library, lang, split.corpus)
        self._collections = [library.collections[library.langs.index(member)] for member in self.langs]
        self._bases = np.cumsum([0, *map(len, self._collections)])
        self._prefixed = split.corpus in POOLED and not library.docids_are_unique

    def __len__(self) -> int:
        return int(self._bases[-1])

    def docids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """The names of rows."""
        rows = np.asarray(rows, np.int64)
        member = np.searchsorted(self._bases, rows, side="right") - 1
        names = np.empty(len(rows), object)
        for i in np.unique(member):
            here = np.flatnonzero(member == i)
            found = self._collections[i].docids(rows[here] - self._bases[i])
            names[here] = [self._name(self.langs[i], docid) for docid in found]
        return names.tolist()

    def passage(self, name: str) -> Passage | None:
        """The passage of a name; None if no member holds it."""
        for lang, collection in zip(self.langs, self._collections, strict=True):
            own, prefix, docid = name.partition(":") if self._prefixed else (lang, "", name)
            row = collection.rows([docid])[0] if own == lang else -1
            if row >= 0:
                return collection.passage(row)
        return None

    def languages(self, names: Sequence[str]) -> list[str]:
        """The languages of passages by their names; "" for one that no member holds."""
        if self._prefixed:
            return [name.partition(":")[0] for name in names]
        held = _held(names, dict(zip(self.langs, self._collections, strict=True)))
        return [next(iter(held[name]), "") for name in names]

    @functools.cached_property
    def qrels(self) -> Qrels:
        """The split's judgments of the language's queries, by the names above.

        A judged passage of a corpus that is not searched is left out. One of no corpus stays, and counts as not
        retrieved. Of unjudged queries (`NONE`) every one has an empty set.
        """
        if self.split.qrels == NONE:
            return {qid: {} for qid in self.library.queries(self.lang, self.split.topics)[0]}
        judged = self.library.qrels(self.lang, self.split.qrels)
        asked = set(self.library.queries(self.lang, self.split.topics)[0])
        judged = {qid: of_query for qid, of_query in judged.items() if qid in asked}
        names = self._judged_names({docid for of_query in judged.values() for docid in of_query})
        named = {
            qid: {name: rel for docid, rel in of_query.items() for name in names[docid]}
            for qid, of_query in judged.items()
        }
        return {qid: of_query for qid, of_query in named.items() if of_query}

    def _judged_names(self, docids: set[str]) -> dict[str, list[str]]:
        """What each judged docid names among the passages searched."""
        library = self.library
        if not library.docids_are_unique and self.split.corpus != PARALLEL:
            return {docid: [self._name(self.lang, docid)] for docid in docids}
        held = _held(docids, dict(zip(library.langs, library.collections, strict=True)))
        return {
            docid: [
                self._name(lang, docid) for lang in held[docid] or [self.lang] if lang in self.langs or not held[docid]
            ]
            for docid in docids
        }

    def _name(self, lang: str, docid: str) -> str:
        return f"{lang}:{docid}" if self._prefixed else docid


def members(library: Library, lang: str, corpus: str) -> list[str]:
    """The languages that a split searches for the queries of `lang`; none where it does not ask them."""
    if corpus in POOLED:
        return library.langs
    if corpus == OWN:
        return [lang]
    return [corpus] if corpus != lang else []


def _held(docids: Iterable[str], collections: Mapping[str, Collection]) -> dict[str, list[str]]:
    """The languages whose collections hold each docid."""
    docids = list(docids)
    held: dict[str, list[str]] = {docid: [] for docid in docids}
    for lang, collection in collections.items():
        for i in np.flatnonzero(collection.rows(docids) >= 0):
            held[docids[i]].append(lang)
    return held
