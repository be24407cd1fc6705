"""The ingested languages of a working directory side by side, and their training queries.

A passage's *global row* is its row in its language's collection plus the rows of the languages before it, so that one
integer names a passage of the whole library.
"""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jdmdr.corpus import Collection, article, read_qrels, read_queries, topics
from jdmdr.hashing import stable_hash
from jdmdr.types import NO_HIT, Hits

TRAIN = "train"


class TrainingQuery(NamedTuple):
    """A training query with at least one known positive; all passages are global rows."""

    lang: int
    qid: str
    text: str
    row: int  # among all queries of split `train`, languages one after another
    positives: np.ndarray
    judged: np.ndarray  # judged not relevant, or given as negatives
    held_out: bool  # kept from training, for validation


class Library:
    """The collections under `directory`, one subdirectory a language."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.langs = sorted(path.name for path in directory.iterdir() if path.is_dir() and path.name[0] != ".")
        self.collections = [Collection(directory / lang) for lang in self.langs]
        self.bases = np.concatenate([[0], np.cumsum([len(c) for c in self.collections])]).astype(np.int64)

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Global rows -> (language index, row in its collection)."""
        lang = np.searchsorted(self.bases, rows, side="right") - 1
        return lang, rows - self.bases[lang]

    @functools.cached_property
    def docids_are_unique(self) -> bool:
        """Whether no two languages share a docid, so that a docid alone names a passage of the library."""
        return not any(ours.shares_docids(theirs) for ours, theirs in itertools.combinations(self.collections, 2))

    def others(self, lang: str) -> list[Collection]:
        """The collections of other languages, where a docid alone tells which one a passage is of; none elsewhere."""
        if not self.docids_are_unique:
            return []
        return [found for name, found in zip(self.langs, self.collections, strict=True) if name != lang]

    def topics(self) -> list[str]:
        """Names of the query sets of all languages, sorted; `train` is always among them."""
        return sorted({TRAIN} | {name for lang in self.langs for name in topics(self.directory / lang)})

    def queries(self, lang: str, split: str) -> tuple[list[str], list[str]]:
        """Ids and texts of a split's queries, in file order; empty where the language has none."""
        found = read_queries(self.directory / lang, split)
        return [q.qid for q in found], [q.text for q in found]

    def qrels(self, lang: str, split: str) -> dict[str, dict[str, int]]:
        return read_qrels(self.directory / lang, split)

    def training_queries(self, valid_share: float, seed: int) -> list[TrainingQuery]:
        """All training queries with a known positive, by language and file order.

        `valid_share` of the articles that hold positives are chosen by a hash of their id alone, so that translations
        of one article fall on the same side; a query with a positive in one of them is held out.
        """
        out: list[TrainingQuery] = []
        base_row = 0
        for index, lang in enumerate(self.langs):
            qids, texts = self.queries(lang, TRAIN)
            qrels = self.qrels(lang, TRAIN)
            positives = {qid: [d for d, rel in qrels.get(qid, {}).items() if rel > 0] for qid in qids}
            held_out = _held_out([article(d) for ids in positives.values() for d in ids], valid_share, seed)
            for row, (qid, text) in enumerate(zip(qids, texts, strict=True)):
                known = self._rows(index, positives[qid])
                if len(known):
                    judged = self._rows(index, [d for d, rel in qrels[qid].items() if rel <= 0])
                    out.append(
                        TrainingQuery(index, qid, text, base_row + row, known, judged,
                                      any(article(d) in held_out for d in positives[qid]))
                    )  # fmt: skip
            base_row += len(qids)
        return out

    def _rows(self, lang: int, docids: Sequence[str]) -> np.ndarray:
        rows = self.collections[lang].rows(docids)
        return rows[rows >= 0] + self.bases[lang]


def used_in_training(training: Sequence[TrainingQuery], lang: int) -> list[TrainingQuery]:
    """The training queries of one language that are not held out, in their order."""
    return [q for q in training if q.lang == lang and not q.held_out]


def docid_lookup(collection: Collection, lists: Iterable[Hits]) -> Callable[[int], str]:
    """row -> docid for the rows of these hits, read once: runs repeat the same passages many times."""
    found = np.unique(np.concatenate([hits.rows_QxK.ravel() for hits in lists]))
    found = found[found != NO_HIT]
    return dict(zip(found.tolist(), collection.docids(found), strict=True)).__getitem__


def _held_out(articles: Sequence[str], share: float, seed: int) -> set[str]:
    """The articles with the lowest hashes; at least one and never all, where there are two or more."""
    ordered = sorted(set(articles), key=lambda a: (stable_hash(seed, "validation", a), a))
    count = min(max(1, math.floor(share * len(ordered) + 0.5)), len(ordered) - 1) if share > 0 else 0
    return set(ordered[: max(count, 0)])
