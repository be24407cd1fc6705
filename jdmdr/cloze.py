"""Inverse-cloze pairs: training pairs from a corpus alone, a title or a sentence as the query of its passage."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from jdmdr.corpus import passage_text
from jdmdr.types import Passage

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？।؟۔])\s*|\n+")
_NO_SENTENCE_MARKS = re.compile("[\u0e00-\u0eff]")  # Thai and Lao set spaces, not marks, between sentences
_SHORTEST_SENTENCE = 8  # characters; less is an abbreviation or a number rather than a sentence


class Pair(NamedTuple):
    """A pseudo query, and its passage without it."""

    query: str
    passage: str
    row: int


def inverse_cloze(passages: Iterable[tuple[int, Passage]]) -> Iterator[Pair]:
    """Pairs from the corpus alone: each sentence with its passage less that sentence, and the title with the text.

    A passage of one sentence gives its title only; one without a text gives nothing.

    Source: the inverse cloze task of Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question
    Answering" (ACL 2019), which leaves the sentence in one passage of ten; here it is always taken out, or a lexical
    encoder would have nothing to learn.
    """
    for row, passage in passages:
        title, text = passage.title.strip(), passage.text.strip()
        sentences = split_sentences(text)
        if len(sentences) > 1:
            for sentence in sentences:
                if len(sentence) >= _SHORTEST_SENTENCE:
                    rest = Passage("", title, " ".join(text.replace(sentence, " ", 1).split()))
                    yield Pair(sentence, passage_text(rest), row)
        if title and text:
            yield Pair(title, text, row)


def split_sentences(text: str) -> list[str]:
    pieces = _SENTENCE_END.split(text)
    if 2 * len(_NO_SENTENCE_MARKS.findall(text)) > len(text):
        pieces = [part for piece in pieces for part in piece.split()]
    return [piece.strip() for piece in pieces if piece.strip()]
