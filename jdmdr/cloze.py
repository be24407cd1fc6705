"""Inverse-cloze pairs: training pairs from a corpus alone, a title or a sentence as the query of its passage."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from jdmdr.hashing import stable_hash
from jdmdr.types import Passage

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？।؟۔])\s*|\n+")
_NO_SENTENCE_MARKS = re.compile("[\u0e00-\u0eff]")  # Thai and Lao set spaces, not marks, between sentences
_SHORTEST_SENTENCE = 8  # characters; less is an abbreviation or a number rather than a sentence


def inverse_cloze(passages: Iterable[tuple[int, Passage]], seed: int) -> tuple[list[str], np.ndarray]:
    """Pseudo queries for passages without any: the title, and one sentence of those that have several.

    Returns the query texts and the row of the passage each belongs to (int64).

    Source: the inverse cloze task of Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question
    Answering" (ACL 2019); the sentence stays in its passage here.
    """
    queries, rows = [], []
    for row, passage in passages:
        found = [passage.title.strip()] if passage.title.strip() else []
        sentences = _sentences(passage.text)
        if len(sentences) > 1:
            found.append(sentences[stable_hash(seed, "inverse cloze", row) % len(sentences)])
        queries += found
        rows += [row] * len(found)
    return queries, np.array(rows, np.int64)


def _sentences(text: str) -> list[str]:
    pieces = _SENTENCE_END.split(text)
    if 2 * len(_NO_SENTENCE_MARKS.findall(text)) > len(text):
        pieces = [part for piece in pieces for part in piece.split()]
    return [piece.strip() for piece in pieces if len(piece.strip()) >= _SHORTEST_SENTENCE]
