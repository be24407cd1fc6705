"""Negatives given in files of triples: query, positive, negative, a line each, TAB-separated.

    triples.train.small.tsv        MS MARCO's: three texts
    qidpidtriples.train.small.tsv  the same by their ids

Which of the two a file is, its first line tells: a passage's text has a blank in it and an id has none. Texts are looked up in
the collection, blanks aside; of several passages with one text the first is meant, of several queries all of them. The positives
of a file are not read: a query's are those that are judged.
"""

from __future__ import annotations

import array
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jdmdr import progress, reading
from jdmdr.corpus import Collection, hash64, passage_text
from jdmdr.types import UserError

BLOCK = 1 << 16  # lines looked up together

Find = Callable[[Sequence[str]], np.ndarray]  # what stands in a file -> rows of the collection, -1 where there is none


class Given(NamedTuple):
    """The negatives of each query, one after another in the order of the file, each once."""

    offsets: np.ndarray  # int64, queries + 1
    rows: np.ndarray  # int64, rows of the collection
    counts: dict[str, int]  # of lines: all, those of unknown queries and those of unknown negatives


def read(path: pathlib.Path, qids: Sequence[str], texts: Sequence[str], collection: Collection) -> Given:
    """Reads the triples of the queries `qids`, whose texts are `texts`; streamed, 12 bytes a line that is used are held.

    Raises UserError for a line without three fields, and for a file of which no line is known.
    """
    lines = reading.lines(path)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{path} holds no triple; give lines of query TAB positive TAB negative")
    by_text = " " in _fields(path, *first)[2].strip()
    names = map(_plain, texts) if by_text else qids
    find = _by_text(collection) if by_text else collection.rows
    places: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        places.setdefault(name, []).append(place)
    query_N, row_N = array.array("i"), array.array("q")
    counts = {"triples": 0, "unknown_queries": 0, "unknown_negatives": 0}
    every = (_fields(path, *line) for line in itertools.chain([first], lines))
    for block in _blocks(progress.bar(every, "  reading triples", "lines")):
        found = [places.get(_plain(query) if by_text else query) for query, _, _ in block]
        rows = find([negative for _, _, negative in block]).tolist()
        counts["triples"] += len(block)
        counts["unknown_queries"] += sum(of is None for of in found)
        counts["unknown_negatives"] += sum(row < 0 for row in rows)
        for of, row in zip(found, rows, strict=True):
            if of is not None and row >= 0:
                query_N.extend(of)
                row_N.extend([row] * len(of))
    if not query_N:
        raise UserError(
            f"{path}: of {counts['triples']} triples none has a training query and a negative of the corpus; give the triples "
            f"of this data root (taken for {'texts' if by_text else 'ids'})"
        )
    return Given(*_grouped(np.frombuffer(query_N, np.int32), np.frombuffer(row_N, np.int64), len(qids)), counts)


def _grouped(query_N: np.ndarray, row_N: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """(offsets, rows) by query, each row of a query at its first place."""
    by_row = np.lexsort((row_N, query_N))  # stable: equal pairs stay as they stand
    q_N, r_N = query_N[by_row], row_N[by_row]
    once = np.ones(len(by_row), bool)
    once[1:] = (q_N[1:] != q_N[:-1]) | (r_N[1:] != r_N[:-1])
    kept_N = np.sort(by_row[once])
    kept_N = kept_N[np.argsort(query_N[kept_N], kind="stable")]
    offsets = np.searchsorted(query_N[kept_N], np.arange(queries + 1))
    return offsets, row_N[kept_N]


def _by_text(collection: Collection) -> Find:
    """By a 64-bit hash of the text; 16 bytes a passage are held."""
    rows = progress.bar(range(len(collection)), "  reading passages", "passages")
    hash_C = _hashes(passage_text(collection.passage(row)) for row in rows)
    order_C = np.argsort(hash_C, kind="stable")
    sorted_C = hash_C[order_C]

    def find(texts: Sequence[str]) -> np.ndarray:
        wanted_N = _hashes(texts)
        place_N = np.minimum(np.searchsorted(sorted_C, wanted_N), len(sorted_C) - 1)
        return np.where(sorted_C[place_N] == wanted_N, order_C[place_N], -1)

    return find


def _hashes(texts: Iterable[str]) -> np.ndarray:
    return np.frombuffer(bytearray().join(hash64(_plain(text)) for text in texts), "<u8")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _fields(path: pathlib.Path, number: int, line: str) -> list[str]:
    fields = line.split("\t")
    if len(fields) != 3:
        raise reading.bad_line(
            path, number, f"{len(fields)} TAB-separated fields where 3 are expected: query, positive, negative"
        )
    return fields


def _blocks(lines: Iterable[list[str]]) -> Iterator[list[list[str]]]:
    lines = iter(lines)
    return iter(lambda: [*itertools.islice(lines, BLOCK)], [])
