"""Finds what a data root holds: per language the corpus shards, the topics and qrels per split, the training rows."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jdmdr.datasets.layouts import LAYOUTS
from jdmdr.types import UserError

log = logging.getLogger(__name__)

EXPECTED = (
    "expected corpus/LANG.jsonl[.gz] or corpus/LANG/*.jsonl[.gz] with topics/LANG.SPLIT.tsv and qrels/LANG.SPLIT.tsv, "
    "or the directories and file names of MIRACL v1.0"
)


class LanguageFiles(NamedTuple):
    """The files of one language; corpus shards are in reading order."""

    corpus: list[Path]
    topics: dict[str, Path]
    qrels: dict[str, Path]
    train: Path | None


def discover(root: Path, langs: str = "") -> dict[str, LanguageFiles]:
    """Finds the languages of a data root, sorted; `langs` (separated by commas) keeps some of them, "" keeps all.

    A language with topics and no corpus is left out with a warning. Raises UserError for a root that does not exist or
    holds no corpus, for a language that is not there, and for a file that is there twice under two names.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"the data root {root} is not a directory; {EXPECTED}")
    try:
        found = _by_key(entry for find in LAYOUTS.values() for entry in find(root))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; make it readable") from error
    complete = sorted(lang for kind, lang, _ in found if kind == "corpus")
    if not complete:
        raise UserError(f"the data root {root} holds no corpus; {EXPECTED}")
    wanted = sorted({name.strip() for name in langs.split(",")} - {""})
    if unknown := [lang for lang in wanted if lang not in complete]:
        raise UserError(f"{root} holds no corpus of {', '.join(unknown)}; there are: {', '.join(complete)}")
    partial = {lang for _, lang, _ in found}.difference(complete)
    if partial and not wanted:
        log.warning("%s: left out, for want of a corpus: %s", root, ", ".join(sorted(partial)))
    return {lang: _files_of(lang, found) for lang in wanted or complete}


def _by_key(entries: Iterable[tuple[str, str, str, list[Path]]]) -> dict[tuple[str, str, str], list[Path]]:
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

    return LanguageFiles(found["corpus", lang, ""], splits("topics"), splits("qrels"), splits("train").get(""))
