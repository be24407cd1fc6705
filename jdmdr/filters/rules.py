"""Filters by rank, score and text: which mined candidates may serve as hard negatives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr.index.bm25 import tokenize_words
from jdmdr.types import NO_HIT, UserError

_SHINGLE_WORDS = 3
CACHED_PASSAGES = 50_000


class Candidates(NamedTuple):
    """Mined passages of one language's queries, in rank order; empty places hold `NO_HIT`.

    `threshold_scores_QxK` are what the score rules compare, on the same scale as `positive_score_Q`: those of one
    chosen retriever where the ranking itself is fused (ranks have no margins), else equal to `scores_QxK`. NaN is
    "not known", and a rule lets it pass.

    `positive_score_Q` is the LOWEST score among the query's positives. Margins are defined for one pair of a query
    and a positive (NV-Retriever, Moreira et al. 2024); here all positives of a query share its negatives, so a
    negative has to keep its distance from every one of them.
    """

    rows_QxK: np.ndarray  # int64
    scores_QxK: np.ndarray  # float32
    threshold_scores_QxK: np.ndarray  # float32
    positive_score_Q: np.ndarray  # float32


class Context(NamedTuple):
    """What a filter may know beyond the candidates."""

    positive_rows: Sequence[Sequence[int]]  # of every query
    text: Callable[[int], str]  # row -> passage text


class Filter(NamedTuple):
    """A named rule; `keep(candidates, context)` is a QxK mask, whose value at empty places does not matter.

    A rule that keeps scores below a threshold tells both: `compared(candidates)` are the scores, QxK, and the thresholds, Q.
    """

    name: str
    keep: Callable[[Candidates, Context], np.ndarray]
    compared: Callable[[Candidates], tuple[np.ndarray, np.ndarray]] | None = None


class Column(NamedTuple):
    """What score rules compare: one model's scores of the candidates, and the lowest of each query's positives; NaN where
    nothing is known."""

    scores_QxK: np.ndarray
    positive_Q: np.ndarray


class By(NamedTuple):
    """The model whose scores a rule compares, and what stands before the rule's key and name."""

    column: Callable[[Candidates], Column]
    prefix: str = ""


OWN = By(lambda candidates: Column(candidates.threshold_scores_QxK, candidates.positive_score_Q))


# ---------------------------------------------------------------- identity


def not_positive() -> Filter:
    """Drops the query's own positives."""

    def keep(candidates: Candidates, context: Context) -> np.ndarray:
        return np.stack(
            [
                ~np.isin(rows_K, positives)
                for rows_K, positives in zip(candidates.rows_QxK, context.positive_rows, strict=True)
            ]
        )

    return Filter("positive", keep)


def not_near_duplicate(jaccard: float) -> Filter:
    """Drops copies of a positive: the same words, or a Jaccard index of their 3-word shingles >= `jaccard`."""
    _check("near_duplicate", 0 < jaccard <= 1, jaccard, "a Jaccard index above 0 and up to 1")

    def keep(candidates: Candidates, context: Context) -> np.ndarray:
        # Queries share candidates, above all in small collections.
        shingles_of = functools.lru_cache(CACHED_PASSAGES)(lambda row: _shingles(context.text(row)))
        kept_QxK = np.ones(candidates.rows_QxK.shape, bool)
        for q, rows_K in enumerate(candidates.rows_QxK):
            positives = [shingles_of(int(row)) for row in context.positive_rows[q]]
            for place in np.flatnonzero(rows_K != NO_HIT):
                shingles = shingles_of(int(rows_K[place]))
                kept_QxK[q, place] = not any(_alike(shingles, positive, jaccard) for positive in positives)
        return kept_QxK

    return Filter("near_duplicate", keep)


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = tokenize_words(text)
    return {tuple(words[i : i + _SHINGLE_WORDS]) for i in range(max(1, len(words) - _SHINGLE_WORDS + 1))}


def _alike(a: set, b: set, jaccard: float) -> bool:
    # Sets of very different sizes cannot overlap enough: most pairs need no intersection.
    return min(len(a), len(b)) >= jaccard * max(len(a), len(b)) and len(a & b) >= jaccard * len(a | b)


# ---------------------------------------------------------------- rank


def after_rank(skip: int) -> Filter:
    """Drops the first `skip` candidates that earlier rules left (TopK shifted by n)."""
    _check("skip", skip >= 0, skip, "a number >= 0")
    return Filter("skip", lambda candidates, context: _ranks(candidates) > skip)


def up_to_rank(depth: int) -> Filter:
    """Keeps the first `depth` candidates that earlier rules left."""
    _check("depth", depth >= 1, depth, "a number >= 1")
    return Filter("depth", lambda candidates, context: _ranks(candidates) <= depth)


def _ranks(candidates: Candidates) -> np.ndarray:
    """From 1, counting the candidates still there."""
    return (candidates.rows_QxK != NO_HIT).cumsum(axis=1)


# ---------------------------------------------------------------- score


def below_score(max_score: float, by: By = OWN) -> Filter:
    """Keeps scores < `max_score` (TopK-Abs)."""
    return _below_threshold("max_score", lambda positive_Q: np.full_like(positive_Q, max_score), by)


def absolute_margin(margin: float, by: By = OWN) -> Filter:
    """Keeps scores < s+ - m (TopK-MarginPos)."""
    _check(f"{by.prefix}absolute_margin", margin >= 0, margin, "a number >= 0")
    return _below_threshold("absolute_margin", lambda positive_Q: positive_Q - margin, by)


def relative_margin(margin: float, by: By = OWN) -> Filter:
    """Keeps scores < s+ - m |s+|: below the positive whatever the sign of its score."""
    _check(f"{by.prefix}relative_margin", margin >= 0, margin, "a number >= 0")
    return _below_threshold("relative_margin", lambda positive_Q: positive_Q - margin * np.abs(positive_Q), by)


def percent_of_positive(share: float, by: By = OWN) -> Filter:
    """Keeps scores < p s+ where s+ > 0 (TopK-PercPos, p = 0.95), and < s+ - (1 - p) |s+| for any sign."""
    _check(f"{by.prefix}percent_of_positive", 0 < share <= 1, share, "a share above 0 and up to 1")
    return _below_threshold("percent_of_positive", lambda positive_Q: positive_Q - (1 - share) * np.abs(positive_Q), by)


def _below_threshold(name: str, threshold: Callable[[np.ndarray], np.ndarray], by: By) -> Filter:
    def compared(candidates: Candidates) -> tuple[np.ndarray, np.ndarray]:
        column = by.column(candidates)
        return column.scores_QxK, threshold(column.positive_Q)

    def keep(candidates: Candidates, context: Context) -> np.ndarray:
        scores_QxK, threshold_Q = compared(candidates)
        return ~(scores_QxK >= threshold_Q[:, None])

    return Filter(f"{by.prefix}{name}", keep, compared)


def _check(key: str, valid: bool, value: Any, expected: str) -> None:
    if not valid:
        raise UserError(f"filters.{key} is {value!r}: give {expected}, or None for off")


# ---------------------------------------------------------------- from a config

SCORE_RULES: dict[str, Callable[..., Filter]] = {
    "max_score": below_score,
    "absolute_margin": absolute_margin,
    "relative_margin": relative_margin,
    "percent_of_positive": percent_of_positive,
}

# In the order of application: what is no candidate at all goes before ranks are counted, and the window before the
# scores.
RULES: dict[str, Callable[[Any], Filter]] = {
    "near_duplicate": not_near_duplicate,
    "skip": after_rank,
    "depth": up_to_rank,
    **SCORE_RULES,
}

CROSS_ENCODER = "cross_encoder"  # the group of keys of the score rules over a cross-encoder's scores
ANSWERS = "answers"  # the key that names files (filters/answers.py)


def rules_from_config(config: Mapping[str, Any]) -> list[Filter]:
    """The rules a config asks for; a key absent or None is off. Positives are always dropped first.

    Those of the group `cross_encoder` are checked here, and made by `cross_encoder_rules`, where there are scores; that of
    `answers` is made in filters/answers.py, where the queries are known.

    Raises `UserError` on an unknown key, and on a value outside a rule's range.
    """
    cross_encoder_rules(config, None)
    plain = {key: value for key, value in config.items() if key not in (CROSS_ENCODER, ANSWERS)}
    return [not_positive(), *_rules(plain, RULES, "")]


def cross_encoder_rules(config: Mapping[str, Any], column: Column | None) -> list[Filter]:
    """The rules of the config's group `cross_encoder`, over the scores in `column`: probabilities of being relevant."""
    by = By(lambda candidates: column, f"{CROSS_ENCODER}.")
    rules = {name: functools.partial(rule, by=by) for name, rule in SCORE_RULES.items()}
    return _rules(config.get(CROSS_ENCODER) or {}, rules, by.prefix)


def _rules(config: Mapping[str, Any], rules: Mapping[str, Callable[[Any], Filter]], prefix: str) -> list[Filter]:
    for key, value in config.items():
        if key not in rules:
            raise UserError(f"filters.{prefix}{key} is no filter rule: the rules are {', '.join(rules)}")
        if isinstance(value, (bool, str)):
            raise UserError(f"filters.{prefix}{key} is {value!r}: give a number, or None for off")
    return [rule(config[name]) for name, rule in rules.items() if config.get(name) is not None]
