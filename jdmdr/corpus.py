"""Turns the files of a language into a directory that later stages map into memory, and reads it back.

`python -m jdmdr.corpus check DIR` says what a data root holds and what is wrong with it (`datasets/audit.py`).

    passages.jsonl, passages.offsets.npy    the passages, one a line; where each line starts (int64, C + 1)
    docids.txt, docids.offsets.npy          the docids alone, one a line; where each line starts (int64, C + 1)
    docid_hash.npy, docid_rows.npy          64-bit hashes of the docids, sorted, and the row of each
    queries.SPLIT.jsonl, qrels.SPLIT.tsv    the queries; TREC judgments

Row numbers are the order of the corpus files. Equal input gives equal bytes.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import hashlib
import json
import mmap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jdmdr import reading
from jdmdr.datasets import LanguageFiles
from jdmdr.types import Passage, Query, UserError
from jdmdr.workdir import atomic

TRAIN = "train"

_to_json = json.JSONEncoder(ensure_ascii=False).encode


@dataclasses.dataclass
class IngestReport:
    """What an ingestion counted; per-split counts have the split as their key.

    `unknown_docids` counts judgments of passages that no corpus holds; `dropped` counts judgments and training
    queries that were left out, each for a reason that `warnings` tells.
    """

    passages: int = 0
    empty_texts: int = 0
    queries: dict[str, int] = dataclasses.field(default_factory=dict)
    positives: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_docids: dict[str, int] = dataclasses.field(default_factory=dict)
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


class Collection:
    """The passages of one language by row or docid, mapped into memory when first used; it can be pickled."""

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory}

    def __len__(self) -> int:
        return len(self._passage_offsets) - 1

    def passage(self, row: int) -> Passage:
        row = int(self._valid(row))
        start, end = self._passage_offsets[row : row + 2].tolist()
        return Passage(**json.loads(self._passages[start:end]))

    def docid(self, row: int) -> str:
        return self.docids([row])[0]

    def docids(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        rows = self._valid(rows)
        starts, ends = self._docid_offsets[rows].tolist(), (self._docid_offsets[rows + 1] - 1).tolist()
        return [self._docids[start:end].decode() for start, end in zip(starts, ends, strict=True)]

    def rows(self, docids: Iterable[str]) -> np.ndarray:
        """The rows of docids, int64; -1 for a docid that is not in the collection."""
        docids = list(docids)
        wanted = _hashes(map(hash64, docids))
        rows = np.full(len(docids), -1, np.int64)
        places = np.searchsorted(self._hash, wanted)
        open_ = np.arange(len(docids))
        while open_.size:  # a second pass only where two docids share a hash
            open_ = open_[places[open_] < len(self)]
            open_ = open_[self._hash[places[open_]] == wanted[open_]]
            here = self._rows[places[open_]]
            same = np.array([a == docids[b] for a, b in zip(self.docids(here), open_, strict=True)], bool)
            rows[open_[same]] = here[same]
            open_ = open_[~same]
            places[open_] += 1
        return rows

    def shares_docids(self, other: Collection) -> bool:
        """Whether a docid of this collection is one of the other's too."""
        smaller, larger = sorted((self, other), key=len)
        places = np.searchsorted(larger._hash, smaller._hash)
        places[places == len(larger)] -= 1
        alike = np.flatnonzero(larger._hash[places] == smaller._hash)
        # equal hashes of unequal docids are one in 2**64 pairs, so the first few settle it
        return bool((larger.rows(smaller.docids(smaller._rows[alike[:100]])) >= 0).any())

    def _valid(self, rows: int | Sequence[int] | np.ndarray) -> np.ndarray:
        """Row -1 means "no hit" elsewhere, so it must not be taken for the last row."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"{self.directory}: a row of {rows.min()}..{rows.max()} is outside 0..{len(self) - 1}")
        return rows

    _passages = functools.cached_property(lambda self: _map_bytes(self.directory / "passages.jsonl"))
    _docids = functools.cached_property(lambda self: _map_bytes(self.directory / "docids.txt"))
    _passage_offsets = functools.cached_property(lambda self: _map_array(self.directory / "passages.offsets.npy"))
    _docid_offsets = functools.cached_property(lambda self: _map_array(self.directory / "docids.offsets.npy"))
    _hash = functools.cached_property(lambda self: _map_array(self.directory / "docid_hash.npy"))
    _rows = functools.cached_property(lambda self: _map_array(self.directory / "docid_rows.npy"))


def passage_text(passage: Passage) -> str:
    """The text of a passage as encoders see it: title, separator, text; the text alone where there is no title."""
    return f"{passage.title}{passage.separator}{passage.text}" if passage.title else passage.text


def passage_row(passage: Passage) -> dict[str, str]:
    """A passage as a JSON object, which `Passage(**row)` reads back; the separator only where it is no blank."""
    row = {"docid": passage.docid, "title": passage.title, "text": passage.text}
    return row if passage.separator == reading.BLANK else {**row, "separator": passage.separator}


def parse_fields(text: str) -> tuple[str, ...]:
    """The fields that `data.fields` names."""
    fields = tuple(name.strip() for name in text.split(","))
    if not all(fields) or not set(fields) - {"title"} or len(set(fields)) < len(fields):
        raise UserError(f"data.fields is {text!r}; it lists fields of the corpus, once each, such as title,text")
    return fields


def article(docid: str) -> str:
    """The article of a passage: what stands before the last "#" of its docid, or the whole docid."""
    return docid.rpartition("#")[0] or docid


def topics(directory: Path) -> list[str]:
    """The names of an ingested language's query sets, sorted."""
    return sorted(
        path.name.removeprefix("queries.").removesuffix(".jsonl") for path in directory.glob("queries.*.jsonl")
    )


def read_queries(directory: Path, split: str) -> list[Query]:
    """The queries of a split in the order of its files; none if the language has no such split."""
    path = directory / f"queries.{split}.jsonl"
    if not path.exists():
        return []
    rows = (json.loads(line) for _, line in reading.lines(path))
    return [Query(row["query_id"], row["query"]) for row in rows]


def read_qrels(directory: Path, split: str) -> reading.Qrels:
    """The judgments of a split, qid -> docid -> relevance; none if the language has no such split."""
    path = directory / f"qrels.{split}.tsv"
    return reading.qrels(path)[0] if path.exists() else {}


def split_queries(
    files: LanguageFiles, split: str, judged: Container[str], on_error: reading.OnError = None
) -> list[Query]:
    """The queries of a split as its files have them: its topics, or of a file for all splits those that are judged."""
    if split in files.topics:
        return reading.topics(files.topics[split], on_error)
    every = reading.queries(files.queries, on_error) if files.queries else []
    return [query for query in every if query.qid in judged]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line, UTF-8, by an atomic rename."""
    with atomic(path) as temporary, open(temporary, "wb") as handle:
        handle.writelines(reading.clean(_to_json(row)).encode() + b"\n" for row in rows)


def ingest(lang: str, files: LanguageFiles, out_dir: Path) -> IngestReport:
    """Writes the files of a language that stands alone into `out_dir` in the form above."""
    report = write_passages(lang, files, out_dir)
    write_queries(lang, files, out_dir, report)
    return report


def write_passages(
    lang: str, files: LanguageFiles, out_dir: Path, fields: Sequence[str] = reading.FIELDS,
    separator: str = reading.BLANK,
) -> IngestReport:  # fmt: skip
    """Writes the passages and their ids; texts are streamed, ids are held. A passage's text is its `fields`, joined
    (`reading.passages`)."""
    report = IngestReport()
    out_dir.mkdir(parents=True, exist_ok=True)
    rows = functools.partial(reading.passages, fields=fields, separator=separator)
    _write_passages(lang, files.corpus, out_dir, report, rows)
    return report


def write_queries(
    lang: str, files: LanguageFiles, out_dir: Path, report: IngestReport, elsewhere: Sequence[Collection] = ()
) -> None:
    """Writes the queries and judgments beside the passages, and counts them in `report`.

    Judgments of qids without a topic are left out; where topics and qrels have different names, which may be put
    together later (`data.splits`), any topics of the language count. Judgments of passages that the corpus does not hold
    stay in the qrels, except in `train`: its qrels are the union of the train qrels (the higher relevance wins) and the
    training rows (positives 1, negatives 0), over known passages and over queries that have a known positive.
    `elsewhere` are the collections of other languages that judgments may name passages of. Raises UserError for input
    that cannot be what was meant.
    """
    topics = {name: dict(reading.topics(path)) for name, path in files.topics.items()}
    for split in sorted({*files.topics, *files.qrels, *([TRAIN] if files.train else [])}):
        _write_split(lang, split, files, topics, elsewhere, out_dir, report)


# ---------------------------------------------------------------------------------------------------------- passages


def _write_passages(
    lang: str, paths: list[Path], out_dir: Path, report: IngestReport, read: Callable[[Path], Iterable[Passage]]
) -> None:
    passage_ends, docid_ends, digests = array.array("q", [0]), array.array("q", [0]), bytearray()
    with open(out_dir / "passages.jsonl", "wb") as passages, open(out_dir / "docids.txt", "wb") as docids:
        for path in paths:
            for passage in read(path):
                line = _to_json(passage_row(passage)).encode() + b"\n"
                passage_ends.append(passage_ends[-1] + passages.write(line))
                docid_ends.append(docid_ends[-1] + docids.write(passage.docid.encode() + b"\n"))
                digests += hash64(passage.docid)
                report.empty_texts += not passage.text or passage.text.isspace()
            if report.passages == len(docid_ends) - 1:
                report.warnings.append(f"{lang}: {path} holds no passages")
            report.passages = len(docid_ends) - 1
    if not report.passages:
        raise UserError(f"the corpus of {lang} holds no passages in {', '.join(map(str, paths))}; fill or remove it")
    if report.empty_texts:
        report.warnings.append(f"{lang}: {report.empty_texts} passages have an empty text; they are kept")
    np.save(out_dir / "passages.offsets.npy", np.frombuffer(passage_ends, np.int64))
    np.save(out_dir / "docids.offsets.npy", np.frombuffer(docid_ends, np.int64))
    hashes = np.frombuffer(digests, "<u8")
    rows = np.argsort(hashes, kind="stable")
    hashes = hashes[rows]
    np.save(out_dir / "docid_hash.npy", hashes)
    np.save(out_dir / "docid_rows.npy", rows)
    twins = np.flatnonzero(hashes[1:] == hashes[:-1])
    _refuse_duplicates(rows[twins], rows[twins + 1], paths, Collection(out_dir))


def _refuse_duplicates(firsts: np.ndarray, seconds: np.ndarray, paths: list[Path], collection: Collection) -> None:
    """Tells equal docids from mere equal hashes among pairs of rows; names both lines of the earliest repetition."""
    for i in np.argsort(seconds):
        docid = collection.docid(seconds[i])
        if collection.docid(firsts[i]) == docid:
            raise UserError(f"{_place(paths, seconds[i])}: the docid {docid!r} was used before, in "
                            f"{_place(paths, firsts[i])}; give each passage of a language its own")  # fmt: skip


def _place(paths: list[Path], row: int) -> str:
    """Where row `row` came from; reads the files again, which only an error has to pay for."""
    places = ((path, number) for path in paths for number, _ in reading.lines(path))
    return next(f"{path}, line {number}" for i, (path, number) in enumerate(places) if i == row)


def hash64(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _hashes(digests: Iterable[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(digests), "<u8")


def _map_array(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


def _map_bytes(path: Path) -> mmap.mmap:
    with open(path, "rb") as handle:
        return mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)


# ------------------------------------------------------------------------------------------------ queries and judgments


def _write_split(
    lang: str, split: str, files: LanguageFiles, topics: Mapping[str, Mapping[str, str]],
    elsewhere: Sequence[Collection], out_dir: Path, report: IngestReport,
) -> None:  # fmt: skip
    collection = Collection(out_dir)
    judged, conflicts = reading.qrels(files.qrels[split]) if split in files.qrels else ({}, 0)
    queries = dict(topics[split] if split in topics else split_queries(files, split, judged))
    if judged and len(_unknown(judged, collection, *elsewhere)) == len(_judged_docids(judged)):
        docid = next(iter(_judged_docids(judged)))
        raise UserError(f"{files.qrels[split]} judges no passage of the corpus {files.corpus[0]} (its first docid is "
                        f"{docid!r}, the corpus's {collection.docid(0)!r}); give qrels made for it")  # fmt: skip

    def warn(count: int, what: str) -> None:
        if count:
            report.warnings.append(f"{lang}, {split}: {count} {what}")

    dropped = 0
    if split == TRAIN and files.train:
        reworded, more = add_train_rows(files.train, queries, judged)
        conflicts += more
        warn(reworded, "queries are worded differently in the topics and in the training rows, which are followed")
    warn(conflicts, "judgments contradict an earlier one of the same pair; the higher relevance is kept")
    warn(sum(not text or text.isspace() for text in queries.values()), "queries are empty; they are kept")

    asked = queries if queries or split == TRAIN else {qid for of_set in topics.values() for qid in of_set}
    strangers = [qid for qid in judged if qid not in asked]
    dropped += sum(len(judged.pop(qid)) for qid in strangers)
    warn(len(strangers), "judged queries have no topic and are left out")

    unknown = _unknown(judged, collection, *(() if split == TRAIN else elsewhere))
    report.unknown_docids[split] = sum(docid in unknown for of_query in judged.values() for docid in of_query)
    if split == TRAIN:
        warn(report.unknown_docids[split], "judged passages are not in the corpus and are left out")
        dropped += report.unknown_docids[split]
        judged = {qid: {d: rel for d, rel in known.items() if d not in unknown} for qid, known in judged.items()}
        useless = [qid for qid in queries if max(judged.get(qid, {}).values(), default=0) <= 0]
        warn(len(useless), "training queries have no positive passage in the corpus and are left out")
        dropped += len(useless)
        for qid in useless:
            del queries[qid]
            judged.pop(qid, None)
    else:
        warn(report.unknown_docids[split], "judged passages are not in the corpus; they count as not retrieved")
        anywhere = judged if split in files.qrels else _judged_qids(files.qrels.values())
        warn(sum(qid not in anywhere for qid in queries), "topics have no judgments and are not evaluated")

    report.queries[split], report.dropped[split] = len(queries), dropped
    report.positives[split] = sum(rel > 0 for of_query in judged.values() for rel in of_query.values())
    if queries:
        write_jsonl(out_dir / f"queries.{split}.jsonl", ({"query_id": q, "query": t} for q, t in queries.items()))
    if judged:
        with atomic(out_dir / f"qrels.{split}.tsv") as temporary, open(temporary, "wb") as handle:
            for qid, of_query in judged.items():
                handle.writelines(f"{qid}\tQ0\t{docid}\t{rel}\n".encode() for docid, rel in of_query.items())


def add_train_rows(
    path: Path, queries: dict[str, str], judged: reading.Qrels, on_error: reading.OnError = None
) -> tuple[int, int]:
    """Adds training rows to the train topics and qrels; returns how many queries and how many judgments differed."""
    reworded = conflicts = 0
    for (qid, text), positives, negatives in reading.train_rows(path, on_error):
        reworded += queries.get(qid, text) != text
        queries[qid] = text
        for docid in positives:
            graded = judged.get(qid, {}).get(docid, 1)  # a positive of relevance 2 stays one
            conflicts += reading.judge(judged, qid, docid, max(1, graded))
        for docid in negatives:
            conflicts += reading.judge(judged, qid, docid, 0)
    return reworded, conflicts


def _judged_docids(judged: reading.Qrels) -> dict[str, None]:
    return {docid: None for of_query in judged.values() for docid in of_query}


def _judged_qids(paths: Iterable[Path]) -> set[str]:
    return {qid for path in paths for qid in reading.qrels(path)[0]}


def _unknown(judged: reading.Qrels, *collections: Collection) -> set[str]:
    """The judged docids that none of the collections holds."""
    docids = list(_judged_docids(judged))
    for collection in collections:
        docids = [docids[i] for i in np.flatnonzero(collection.rows(docids) < 0)]
    return set(docids)


if __name__ == "__main__":
    from jdmdr.datasets import audit_report

    audit_report.main()
