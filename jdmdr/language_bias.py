"""How much a system prefers the query's own language when it searches a pool of several.

A retriever that knows no borders ranks by meaning alone: right answers of any language before wrong ones of the query's
own, which Roy et al. (LAReQA, EMNLP 2020) call strong alignment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdmdr.metrics import Qrels, Run, ranked

TOP = 10
SINGLE = ("own_excess", "own_rank", "other_rank", "aligned")


def language_bias(
    qrels: Qrels, run: Run, languages: Mapping[str, str], own: str, members: Sequence[str], depth: int
) -> dict[str, Any]:
    """The figures of one system for the queries of language `own`; `languages` tells each passage's.

    shares          {language: its share of the first 10 hits}, the mean over queries
    expected        {language: its share of the relevant passages}, the same: what a perfect ranking shows at its top
    own_excess      the share of the own language less the expected one, above 0 where it is preferred
    own_rank, other_rank   median rank of the best relevant passage of the own language, and of the best of another; one
                    that is not among the `depth` hits counts as depth + 1; None where there is none
    aligned         strong alignment: the share of relevant passages of other languages that rank above every passage of
                    the own language that is not relevant; one that is not found does not. The mean over queries; None
                    where no other language has a relevant passage
    """
    shares, expected, own_ranks, other_ranks, aligned = [], [], [], [], []
    for qid, judged in qrels.items():
        relevant = {name for name, rel in judged.items() if rel > 0}
        hits = ranked(run.get(qid, {}), depth)
        if not relevant:
            continue
        langs = [languages.get(name, "") for name in hits]
        if hits:
            shares.append([langs[:TOP].count(lang) / len(langs[:TOP]) for lang in members])
        of_relevant = [languages.get(name, "") for name in relevant]
        expected.append([of_relevant.count(lang) / len(relevant) for lang in members])
        rank = {name: place for place, name in enumerate(hits, 1)}
        ours = [rank.get(name, depth + 1) for name in relevant if languages.get(name) == own]
        others = [rank.get(name, depth + 1) for name in relevant if languages.get(name) != own]
        wrong = (
            p for p, (name, lang) in enumerate(zip(hits, langs, strict=True), 1) if lang == own and name not in relevant
        )
        first_wrong = next(wrong, depth + 1)
        own_ranks += [min(ours)] if ours else []
        other_ranks += [min(others)] if others else []
        aligned += [np.mean(np.array(others) < first_wrong)] if others else []
    shares_of = _means(shares, members)
    expected_of = _means(expected, members)
    return {
        "shares": shares_of,
        "expected": expected_of,
        "own_excess": shares_of[own] - expected_of[own] if shares else None,
        "own_rank": float(np.median(own_ranks)) if own_ranks else None,
        "other_rank": float(np.median(other_ranks)) if other_ranks else None,
        "aligned": float(np.mean(aligned)) if aligned else None,
    }


def average(by_lang: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """The mean over query languages of each figure that is one number, of those that have it."""
    known = {name: [of[name] for of in by_lang.values() if of[name] is not None] for name in SINGLE}
    return {name: float(np.mean(values)) if values else None for name, values in known.items()}


def _means(rows: Sequence[Sequence[float]], members: Sequence[str]) -> dict[str, float]:
    return dict(zip(members, np.mean(rows, axis=0).tolist(), strict=True)) if rows else {}
