"""Drops candidates that hold an answer of their query: what answers a question is no negative of it.

The strings come from a file a language of the form that `jdmdr.answers` reads, the match is that of `jdmdr.answers.tokens`.
Titles are not looked at. A query without answers keeps its candidates.

Source: Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering" (EMNLP 2020), and the variant of ANCE's
authors for its data (Xiong et al., ICLR 2021).
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Sequence

import numpy as np

from jdmdr import answers
from jdmdr.corpus import Collection
from jdmdr.filters.rules import ANSWERS, CACHED_PASSAGES, Candidates, Context, Filter
from jdmdr.types import NO_HIT, UserError


def files(pattern: str, langs: Sequence[str]) -> tuple[pathlib.Path, ...]:
    """The files there are of `langs`, {lang} in the pattern being the code; raises UserError where there is none."""
    found = tuple(path for path in (_path(pattern, lang) for lang in langs) if path.is_file())
    if pattern and not found:
        raise UserError(f"filters.answers: {pattern} does not exist; name the file of answers of the training questions, with "
                        "{lang} where the language's code stands")  # fmt: skip
    return tuple(dict.fromkeys(found))


def rules(pattern: str, lang: str, qids: Sequence[str], collection: Collection) -> list[Filter]:
    """The filter for these queries of a language; none where it is off, or has no file for the language.

    Raises UserError for a file that has none of the queries.
    """
    path = _path(pattern, lang)
    if not pattern or not path.is_file():
        return []
    known, _ = answers.read(path)
    if qids and not known.keys() & set(qids):
        raise UserError(f"filters.answers: {path} has no training query of {lang} (its first is {next(iter(known))!r}, ours "
                        f"{qids[0]!r}); give the answers of split train")  # fmt: skip
    wanted = [answers.prepared(known[qid], answers.tokens) if qid in known else [] for qid in qids]
    return [without_answer(wanted, collection)]


def without_answer(answers_Q: Sequence[Sequence[str]], collection: Collection) -> Filter:
    """Drops passages whose text holds one of the answers, each given as `answers.tokens` makes it, of the query in that place."""

    def keep(candidates: Candidates, context: Context) -> np.ndarray:
        body = functools.lru_cache(CACHED_PASSAGES)(lambda row: answers.tokens(collection.passage(row).text))
        kept_QxK = np.ones(candidates.rows_QxK.shape, bool)
        for q, wanted in enumerate(answers_Q):
            for place in np.flatnonzero(candidates.rows_QxK[q] != NO_HIT) if wanted else ():
                text = body(int(candidates.rows_QxK[q, place]))
                kept_QxK[q, place] = not any(answer in text for answer in wanted)
        return kept_QxK

    return Filter(ANSWERS, keep)


def _path(pattern: str, lang: str) -> pathlib.Path:
    return pathlib.Path(pattern.replace("{lang}", lang))
