"""Finds what a data root holds: per language the corpus shards, the topics and qrels per split, the training rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jdmdr.datasets.layouts import LAYOUTS, Entry
from jdmdr.types import UserError

log = logging.getLogger(__name__)

EXPECTED = (
    "expected corpus/LANG.jsonl[.gz] or corpus/LANG/*.jsonl[.gz] with topics/LANG.SPLIT.tsv and qrels/LANG.SPLIT.tsv, "
    "or the published directories and file names of MIRACL, Mr. TyDi, MS MARCO, DPR's passages or a BEIR data set"
)
UNNAMED = "en"  # the language of a BEIR data set whose directory does not tell


class LanguageFiles(NamedTuple):
    """The files of one language; corpus shards are in reading order.

    `queries` holds the queries of all splits in one file: those of a split are the ones that its qrels judge.
    """

    corpus: list[Path]
    topics: dict[str, Path]
    qrels: dict[str, Path]
    train: Path | None
    queries: Path | None = None

    def paths(self) -> list[Path]:
        single = [path for path in (self.train, self.queries) if path]
        return [*self.corpus, *self.topics.values(), *self.qrels.values(), *single]


def discover(root: Path, langs: str = "") -> dict[str, LanguageFiles]:
    """Finds the languages of a data root, sorted; `langs` (separated by commas) keeps some of them, "" keeps all.

    A language without a corpus is left out with a warning: nothing could be searched. Raises UserError for a root that
    does not exist or holds no corpus, for a language that is not there, and for a file that is there twice under two
    names.
    """
    found = find(root, langs)
    complete = {lang: files for lang, files in found.items() if files.corpus}
    partial = [lang for lang in found if lang not in complete]
    if not complete:
        raise UserError(
            f"the data root {root} holds no corpus, only topics and qrels of {', '.join(partial)}; {EXPECTED}"
        )
    if partial and _named(langs):
        raise UserError(f"{root} holds no corpus of {', '.join(partial)}; there are: {', '.join(complete)}")
    if partial:
        log.warning("%s: left out, for want of a corpus: %s", root, ", ".join(partial))
    return complete


def find(root: Path, langs: str = "") -> dict[str, LanguageFiles]:
    """As `discover`, with the languages that have topics, qrels or training rows and no corpus."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"the data root {root} is not a directory; {EXPECTED}")
    named = _named(langs)
    try:
        entries = [entry for layout in LAYOUTS.values() for entry in layout(root)]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make it readable") from error
    unnamed = named[0] if len(named) == 1 else UNNAMED
    if len(named) != 1 and (path := next((paths[0] for _, lang, _, paths in entries if not lang), None)):
        log.warning("%s: nothing tells its language, which is taken for %s; data.langs=CODE names it", path, unnamed)
    found = _by_key((kind, lang or unnamed, split, paths) for kind, lang, split, paths in entries)
    there = sorted({lang for _, lang, _ in found})
    if not there:
        raise UserError(f"the data root {root} holds no corpus; {EXPECTED}")
    if unknown := [lang for lang in named if lang not in there]:
        raise UserError(f"{root} holds no files of {', '.join(unknown)}; there are: {', '.join(there)}")
    return {lang: _files_of(lang, found) for lang in named or there}


def _named(langs: str) -> list[str]:
    return sorted({name.strip() for name in langs.split(",")} - {""})


def _by_key(entries: Iterable[Entry]) -> dict[tuple[str, str, str], list[Path]]:
    found: dict[tuple[str, str, str], list[Path]] = {}
    for kind, lang, split, paths in entries:
        before = found.setdefault((kind, lang, split), paths)
        if before is not paths:
            raise UserError(f"the {kind} of {' '.join([lang, split]).strip()} is there twice, "
                            f"as {before[0]} and as {paths[0]}; keep one of them")  # fmt: skip
    return found


def _files_of(lang: str, found: dict[tuple[str, str, str], list[Path]]) -> LanguageFiles:
    def splits(kind: str) -> dict[str, Path]:
        return {split: paths[0] for (k, lg, split), paths in sorted(found.items()) if (k, lg) == (kind, lang)}

    corpus = found.get(("corpus", lang, ""), [])
    return LanguageFiles(corpus, splits("topics"), splits("qrels"), splits("train").get(""), splits("queries").get(""))
