"""BM25 with Lucene's formula, and the words it counts, in any script."""

from __future__ import annotations

import array
import functools
import logging
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jdmdr.index.searcher import check_k
from jdmdr.types import NO_HIT, Hits, UserError

# Blocks of the scripts written without spaces between words.
_UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),
    (0xA9E0, 0xA9FF),
    (0xAA60, 0xAA7F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),
    (0x3040, 0x30FF),
    (0x31F0, 0x31FF),  # iteration mark, kana
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x323AF),  # Han
)
# Soft hyphen, zero width joiner, word joiner, byte order mark, variation selectors: invisible inside a word.
_INVISIBLE = re.compile("[\u00ad\u200d\u2060\ufeff\ufe00-\ufe0f\U000e0100-\U000e01ef]+")


@functools.cache
def _patterns() -> tuple[re.Pattern, re.Pattern]:
    """(a run of unspaced script | a word of another script, the tail of an overlong run of combining marks).

    `re` has no class for combining marks and `\\w` leaves them out, so the classes are spelt out once a process.
    """
    unspaced, spaced, marks = [], [], []
    for code in range(0x323B0):  # nothing that counts is assigned above
        character = chr(code)
        is_mark = unicodedata.category(character)[0] == "M"
        if is_mark:
            marks.append(code)
        if is_mark or character.isalnum():
            (unspaced if any(low <= code <= high for low, high in _UNSPACED) else spaced).append(code)
    word = re.compile(f"({_character_class(unspaced)}+)|{_character_class(spaced)}+")
    mark = _character_class(marks)
    return word, re.compile(f"(?<={mark}{{30}}){mark}+")


def _character_class(codes: Sequence[int]) -> str:
    codes = np.asarray(codes)
    breaks = np.flatnonzero(np.diff(codes) > 1)
    lows, highs = codes[np.r_[0, breaks + 1]], codes[np.r_[breaks, -1]]
    return "[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in zip(lows, highs, strict=True)) + "]"


def tokenize_words(text: str) -> list[str]:
    """The words of a text: NFKC, lower case, runs of letters, digits and combining marks.

    Scripts written without spaces (Thai, Lao, Khmer, Myanmar, kana, Han) give overlapping pairs of characters, and a
    lone character itself. No stemming and no stop words. Linear in the length of the text.
    """
    word, excess_marks = _patterns()
    if not text.isascii():
        # Normalising is quadratic in a run of marks; no writing stacks more than 30 (Unicode annex 15, stream-safe
        # text).
        text = unicodedata.normalize("NFKC", excess_marks.sub("", _INVISIBLE.sub("", text)))
    tokens = []
    for match in word.finditer(text.lower()):
        run = match.group(1)
        if run is None:
            tokens.append(match.group())
        elif len(run) == 1:
            tokens.append(run)
        else:
            tokens.extend(run[i : i + 2] for i in range(len(run) - 1))
    return tokens


def _bm25s():
    """The package; imported late because it touches the accelerator, and kept from logging every index it builds."""
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    return bm25s


class Bm25Searcher:
    """Searches texts by BM25 (Robertson and Zaragoza 2009) in Lucene's form, as scored by bm25s.

    A passage that shares no word with the query is no hit. The texts are read once and not kept. Raises `UserError`
    on a collection without passages.
    """

    def __init__(self, texts: Iterable[str], k1: float = 0.9, b: float = 0.4):
        bm25s = _bm25s()

        # Ids in order of first appearance make the saved bytes reproducible. '' is never a token: it keeps the
        # vocabulary of a collection without words from being empty.
        vocabulary = {"": 0}
        ids = []
        for text in texts:
            words = tokenize_words(text)
            ids.append(array.array("i", [vocabulary.setdefault(word, len(vocabulary)) for word in words]))
        if not ids:
            raise UserError("the collection to search has no passages")
        self.index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        with np.errstate(invalid="ignore"):  # a mean length of 0
            self.index.index(bm25s.tokenization.Tokenized(ids, vocabulary), show_progress=False)

    def search(self, queries: Sequence[str], k: int) -> Hits:
        """The best min(k, C) rows for every query; a word counts as often as it stands in the query."""
        check_k(k)
        k = min(k, self.index.scores["num_docs"])
        rows_QxK = np.full((len(queries), k), NO_HIT, np.int64)
        scores_QxK = np.full((len(queries), k), -np.inf, np.float32)
        for i, query in enumerate(queries):
            ids = self.index.get_tokens_ids(tokenize_words(query))
            scores_C = self.index.get_scores_from_ids(ids)
            rows = np.flatnonzero(scores_C > 0)
            if len(rows) > k:
                kth = np.partition(scores_C[rows], -k)[-k]
                rows = rows[scores_C[rows] >= kth]
            rows = rows[np.argsort(-scores_C[rows], kind="stable")][:k]
            rows_QxK[i, : len(rows)] = rows
            scores_QxK[i, : len(rows)] = scores_C[rows]
        return Hits(rows_QxK, scores_QxK)

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the index in bm25s' own format, byte for byte the same for the same texts."""
        self.index.save(directory, show_progress=False)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> Bm25Searcher:
        """An index written by `save`, memory-mapped."""
        bm25s = _bm25s()
        if not (Path(directory) / "params.index.json").is_file():
            raise UserError(f"{directory} holds no BM25 index: build it first")
        searcher = cls.__new__(cls)
        searcher.index = bm25s.BM25.load(directory, mmap=True, show_progress=False)
        return searcher
