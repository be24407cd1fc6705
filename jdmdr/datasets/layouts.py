"""The file layouts that `discover` knows.

A layout is a function from the data root to entries (kind, lang, split, paths): kind is corpus, topics, qrels, queries
or train; split is "" for all but topics and qrels; only a corpus has several paths. `queries` is one file with the
queries of every split, which the qrels tell apart. lang is "" where no name tells the language. A new layout is one more
function and its line in `LAYOUTS`. File contents are not looked at here; whether a file is gzipped is told by its bytes,
and what its records look like by its first one (`reading.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

JSONL = r"([^.]+)\.jsonl(\.gz)?"
POOLED = "all"  # a file of all languages, beside those of each, as XQuAD-R has; it is not read

Entry = tuple[str, str, str, list[Path]]

MRTYDI_LANGUAGES = {
    "arabic": "ar", "bengali": "bn", "english": "en", "finnish": "fi", "indonesian": "id", "japanese": "ja",
    "korean": "ko", "russian": "ru", "swahili": "sw", "telugu": "te", "thai": "th",
}  # fmt: skip

MSMARCO = {  # file -> kind, split
    "collection.tsv": ("corpus", ""),
    "queries.train.tsv": ("topics", "train"),
    "qrels.train.tsv": ("qrels", "train"),
    "queries.dev.small.tsv": ("topics", "dev"),
    "qrels.dev.small.tsv": ("qrels", "dev"),
    "queries.eval.small.tsv": ("topics", "lead"),
    "2019qrels-pass.txt": ("qrels", "test"),
    "msmarco-docs.tsv": ("corpus", ""),
    "msmarco-doctrain-queries.tsv": ("topics", "train"),
    "msmarco-doctrain-qrels.tsv": ("qrels", "train"),
    "msmarco-docdev-queries.tsv": ("topics", "dev"),
    "msmarco-docdev-qrels.tsv": ("qrels", "dev"),
    "docleaderboard-queries.tsv": ("topics", "lead"),
    "2019qrels-docs.txt": ("qrels", "test"),
    "msmarco-test2019-queries.tsv": ("topics", "test"),  # of passages and of documents
}


def plain(root: Path) -> Iterator[Entry]:
    """`corpus/LANG.jsonl` or `corpus/LANG/*.jsonl`, `topics|qrels/LANG.SPLIT.tsv`, `train/LANG.jsonl`; all also .gz."""
    for kind in ("corpus", "train"):
        found = {path: match[1] for path in _listing(root / kind) if (match := re.fullmatch(JSONL, path.name))}
        for path, lang in found.items():
            if lang != POOLED or len(found) == 1:
                yield kind, lang, "", [path]
    for path in _listing(root / "corpus"):
        if "." not in path.name and (shards := _shards(path)):
            yield "corpus", path.name, "", shards
    for kind in ("topics", "qrels"):
        for path in _listing(root / kind):
            if match := re.fullmatch(r"([^.]+)\.([^.]+)\.tsv(\.gz)?", path.name):
                yield kind, match[1], match[2], [path]


def miracl(root: Path) -> Iterator[Entry]:
    """The published names of MIRACL v1.0 (Zhang et al., TACL 2023), https://github.com/project-miracl/miracl.

    The hub's two repositories, `miracl` and `miracl-corpus`, may be cloned side by side under the root.
    """
    for parent in (root, root / "corpus", root / "miracl-corpus"):
        for path in _listing(parent):
            match = re.fullmatch(r"miracl-corpus-v1\.0-(.+)", path.name)
            if match and (shards := _shards(path)):
                yield "corpus", match[1], "", shards
    parents = (root, root / "miracl")
    homes = [home for parent in parents for home in _listing(parent) if re.fullmatch(r"miracl-v1\.0-.+", home.name)]
    for home in (root, *homes):
        for kind in ("topics", "qrels"):
            for path in _listing(home / kind):
                name = rf"{kind}\.miracl-v1\.0-(.+?)-(test-[a-z]|[^-]+)\.tsv(\.gz)?"
                if match := re.fullmatch(name, path.name):
                    yield kind, match[1], match[2], [path]


def mrtydi(root: Path) -> Iterator[Entry]:
    """The published names of Mr. TyDi (Zhang et al., MRL 2021), https://github.com/castorini/mr.tydi, v1.0 and v1.1.

    Unpacked archives hold `collection/docs.jsonl.gz`, `topic.SPLIT.tsv`, `qrels.SPLIT.txt`; the hub's repositories, which
    may be cloned side by side as `mr-tydi` and `mr-tydi-corpus`, `corpus.jsonl.gz` and `ir-format-data/topics.SPLIT.txt`,
    `ir-format-data/qrels.SPLIT.txt`. The hub's train.jsonl.gz is left alone: nobody judged its negatives, which are BM25's.
    """
    parents = (root, root / "mr-tydi", root / "mr-tydi-corpus")
    for home in (root, *(home for parent in parents for home in _listing(parent))):
        match = re.fullmatch(r"mrtydi-v1\.[01]-([a-z]+)", os.path.basename(os.path.abspath(home)))
        lang = MRTYDI_LANGUAGES.get(match[1]) if match else None
        if not lang:
            continue
        for path in (*_listing(home), *_listing(home / "collection")):
            if re.fullmatch(r"(corpus|docs)\.jsonl(\.gz)?", path.name):
                yield "corpus", lang, "", [path]
        for path in (*_listing(home), *_listing(home / "ir-format-data")):
            if match := re.fullmatch(r"(topic|qrel)s?\.([^.]+)\.(tsv|txt)(\.gz)?", path.name):
                yield f"{match[1]}s", lang, match[2], [path]


def beir(root: Path) -> Iterator[Entry]:
    """A data set of BEIR (Thakur et al., NeurIPS 2021): `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.

    The root is one, or directories named by their language lie side by side under it.
    """
    for home, lang in ((root, ""), *((path, path.name) for path in _listing(root))):
        files = {path.name.removesuffix(".gz"): path for path in _listing(home)}
        if "queries.jsonl" not in files and (home != root or "corpus.jsonl" not in files):
            continue
        for kind in ("corpus", "queries"):
            if path := files.get(f"{kind}.jsonl"):
                yield kind, lang, "", [path]
        for path in _listing(home / "qrels"):
            if match := re.fullmatch(r"([^.]+)\.tsv(\.gz)?", path.name):
                yield "qrels", lang, match[1], [path]


def msmarco(root: Path) -> Iterator[Entry]:
    """The published names of MS MARCO's passages or documents (Bajaj et al., 2016), https://microsoft.github.io/msmarco,
    and of the TREC 2019 Deep Learning track (Craswell et al., 2020), whose judgments are `test`; `lead` has none."""
    for path in _listing(root):
        if found := MSMARCO.get(path.name.removesuffix(".gz")):
            yield found[0], "en", found[1], [path]


def dpr(root: Path) -> Iterator[Entry]:
    """DPR's passages of Wikipedia (Karpukhin et al., EMNLP 2020); `jdmdr.questions` makes topics and qrels of its questions."""
    for path in _listing(root):
        if path.name.removesuffix(".gz") == "psgs_w100.tsv":
            yield "corpus", "en", "", [path]


LAYOUTS = {"plain": plain, "miracl": miracl, "mrtydi": mrtydi, "beir": beir, "msmarco": msmarco, "dpr": dpr}


def _listing(directory: Path) -> list[Path]:
    """The visible entries of a directory in natural order (docs-2 before docs-10); none where there is none."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if not path.name.startswith(".")), key=_natural)


def _shards(directory: Path) -> list[Path]:
    return [path for path in _listing(directory) if path.name.endswith((".jsonl", ".jsonl.gz"))]


def _natural(path: Path) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", path.name)]
