"""The file layouts that `discover` knows.

A layout is a function from the data root to entries (kind, lang, split, paths): kind is corpus, topics, qrels or train;
split is "" for corpus and train; only a corpus has several paths. A new layout is one more function and its line in
`LAYOUTS`. File contents are not looked at here; whether a file is gzipped is told by its bytes, not by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

Entry = tuple[str, str, str, list[Path]]


def plain(root: Path) -> Iterator[Entry]:
    """`corpus/LANG.jsonl` or `corpus/LANG/*.jsonl`, `topics|qrels/LANG.SPLIT.tsv`, `train/LANG.jsonl`; all also .gz."""
    for kind in ("corpus", "train"):
        for path in _listing(root / kind):
            if match := re.fullmatch(r"([^.]+)\.jsonl(\.gz)?", path.name):
                yield kind, match[1], "", [path]
    for path in _listing(root / "corpus"):
        if "." not in path.name and (shards := _shards(path)):
            yield "corpus", path.name, "", shards
    for kind in ("topics", "qrels"):
        for path in _listing(root / kind):
            if match := re.fullmatch(r"([^.]+)\.([^.]+)\.tsv(\.gz)?", path.name):
                yield kind, match[1], match[2], [path]


def miracl(root: Path) -> Iterator[Entry]:
    """The published names of MIRACL v1.0 (Zhang et al., TACL 2023), https://github.com/project-miracl/miracl."""
    for parent in (root, root / "corpus"):
        for path in _listing(parent):
            match = re.fullmatch(r"miracl-corpus-v1\.0-(.+)", path.name)
            if match and (shards := _shards(path)):
                yield "corpus", match[1], "", shards
    homes = [root, *(path for path in _listing(root) if re.fullmatch(r"miracl-v1\.0-.+", path.name))]
    for home in homes:
        for kind in ("topics", "qrels"):
            for path in _listing(home / kind):
                name = rf"{kind}\.miracl-v1\.0-(.+?)-(test-[a-z]|[^-]+)\.tsv(\.gz)?"
                if match := re.fullmatch(name, path.name):
                    yield kind, match[1], match[2], [path]


LAYOUTS = {"plain": plain, "miracl": miracl}


def _listing(directory: Path) -> list[Path]:
    """The visible entries of a directory in natural order (docs-2 before docs-10); none where there is none."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if not path.name.startswith(".")), key=_natural)


def _shards(directory: Path) -> list[Path]:
    return [path for path in _listing(directory) if path.name.endswith((".jsonl", ".jsonl.gz"))]


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]
