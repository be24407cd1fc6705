"""Whether two systems differ: paired tests over queries, for each language and for the macro average over languages.

A system is `{lang: values}`, one value a query, in the same order of queries for both systems. The macro average is the
unweighted mean of the languages' means, so its tests resample within each language.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from scipy import stats

from jdmdr import hashing
from jdmdr.metrics import AVERAGE, bootstrap_means

PerQuery = Mapping[str, np.ndarray]  # {lang: one value a query}

SAMPLES = 10_000  # of either test: the smallest p is 1 / 10,001
LEVEL = 0.95
_BLOCK = 1 << 22  # signs drawn at once


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The difference of two systems' means (first minus second) and how sure it is; p values are two-sided."""

    difference: float
    low: float  # percentile bootstrap interval of the difference
    high: float
    p: float  # paired randomisation test
    p_bootstrap: float  # paired bootstrap test
    p_t: float | None  # paired t-test; None where a language has one query
    queries: int
    p_corrected: float | None = None  # `p` after Holm, by `corrected`


def compare(a: PerQuery, b: PerQuery, seed: int, samples: int = SAMPLES) -> dict[str, Comparison]:
    """`{lang: Comparison, "avg": Comparison}` of system `a` against system `b`.

    p is that of the paired randomisation test (Fisher 1935; Smucker, Allan and Carterette, CIKM 2007): how often a
    difference as large arises when each query's two values are swapped at random. p_bootstrap is that of the paired
    bootstrap test (Efron and Tibshirani 1993, 16.4; Sakai, SIGIR 2006), from the same samples as the interval. Both are
    (1 + hits) / (1 + samples), never 0. p_t is that of Student's paired t-test; for the average, Welch's, languages being
    the strata. The random numbers depend on (seed, language, its queries) alone.
    """
    return compare_all({None: (a, b)}, seed, samples)[None]


def compare_all(
    pairs: Mapping[Hashable, tuple[PerQuery, PerQuery]], seed: int, samples: int = SAMPLES
) -> dict[Hashable, dict[str, Comparison]]:
    """`compare` for many pairs over the same queries, from the same random numbers."""
    sizes = [{lang: len(values) for lang, values in of.items()} for pair in pairs.values() for of in pair]
    if not sizes or not sizes[0] or any(of != sizes[0] for of in sizes):
        raise ValueError(
            "the systems must have values for the same queries of the same languages, one language or more"
        )
    langs = sorted(sizes[0])
    differences = {
        lang: np.stack(
            [np.asarray(a[lang], np.float64) - np.asarray(b[lang], np.float64) for a, b in pairs.values()], 1
        )
        for lang in langs
    }
    means_LxM = np.array([differences[lang].mean(axis=0) for lang in langs])
    flipped = [_flipped_means(differences[lang], hashing.rng(seed, "randomisation", lang), samples) for lang in langs]
    drawn = [bootstrap_means(differences[lang], hashing.rng(seed, "bootstrap", lang), samples) for lang in langs]
    found = {}
    for m, pair in enumerate(pairs):
        strata = [differences[lang][:, m] for lang in langs]
        found[pair] = {
            lang: _comparison(means_LxM[i, m], flipped[i][:, m], drawn[i][:, m], [strata[i]])
            for i, lang in enumerate(langs)
        }
        over_langs = (np.mean([of[:, m] for of in samples_of], axis=0) for samples_of in (flipped, drawn))
        found[pair][AVERAGE] = _comparison(means_LxM[:, m].mean(), *over_langs, strata)
    return found


def holm(p_N: np.ndarray) -> np.ndarray:
    """p values corrected for their number by Holm's step-down rule (Scandinavian Journal of Statistics 1979).

    The chance that any true null hypothesis among them falls below alpha is at most alpha, whatever their dependence.
    """
    p_N = np.asarray(p_N, np.float64)
    order_N = np.argsort(p_N, kind="stable")
    stepped_N = np.maximum.accumulate(p_N[order_N] * np.arange(len(p_N), 0, -1))
    corrected_N = np.empty_like(p_N)
    corrected_N[order_N] = np.minimum(stepped_N, 1)
    return corrected_N


def corrected(comparisons: Mapping[Hashable, Mapping[str, Comparison]]) -> dict[Hashable, dict[str, Comparison]]:
    """`{pair of systems: compare(...)}` with `p_corrected` filled in.

    What is read together is corrected together: the averages of all pairs are one family, and their single languages
    another.
    """
    families: dict[bool, list[tuple[Hashable, str]]] = {True: [], False: []}
    for pair, by_lang in comparisons.items():
        for lang in by_lang:
            families[lang == AVERAGE].append((pair, lang))
    result: dict[Hashable, dict[str, Comparison]] = {pair: {} for pair in comparisons}
    for family in families.values():
        values = holm(np.array([comparisons[pair][lang].p for pair, lang in family]))
        for (pair, lang), p in zip(family, values.tolist(), strict=True):
            result[pair][lang] = dataclasses.replace(comparisons[pair][lang], p_corrected=p)
    return result


def table(
    scores: Mapping[str, Mapping[str, PerQuery]], measures: Sequence[str], seed: int
) -> dict[str, dict[str, dict[str, dict[str, Comparison]]]]:
    """`{measure: {system: {baseline: {lang: Comparison}}}}` for `scores[system][measure]`: each system against all that
    stand before it, the pairs of one measure corrected together."""
    pairs = [(system, baseline) for i, system in enumerate(scores) for baseline in list(scores)[:i]]
    keys = [(measure, *pair) for measure in measures for pair in pairs]
    if not keys:
        return {}
    found = compare_all({(m, a, b): (scores[a][m], scores[b][m]) for m, a, b in keys}, seed)
    result: dict[str, dict] = {}
    for measure in measures:
        family = corrected({pair: found[measure, *pair] for pair in pairs})
        for (system, baseline), by_lang in family.items():
            result.setdefault(measure, {}).setdefault(system, {})[baseline] = by_lang
    return result


def _comparison(
    difference: float, flipped_S: np.ndarray, drawn_S: np.ndarray, strata: Sequence[np.ndarray]
) -> Comparison:
    low, high = np.quantile(drawn_S, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p, p_bootstrap = _share_beyond(flipped_S, difference), _share_beyond(drawn_S - difference, difference)
    queries = sum(map(len, strata))
    return Comparison(float(difference), float(low), float(high), p, p_bootstrap, _t_test(strata), queries)


def _share_beyond(null_S: np.ndarray, difference: float) -> float:
    slack = 1e-9  # equal sums in another order differ in the last bits
    return float(1 + (np.abs(null_S) >= abs(difference) - slack).sum()) / (1 + len(null_S))


def _flipped_means(values_QxM: np.ndarray, rng: np.random.Generator, samples: int) -> np.ndarray:
    """Means of each column under random signs. `scipy.stats.permutation_test` gives the same, 15 times as slowly."""
    queries = len(values_QxM)
    rows = max(1, _BLOCK // queries)
    means = []
    for first in range(0, samples, rows):
        flips_SxQ = rng.integers(0, 2, size=(min(rows, samples - first), queries), dtype=np.int8)
        means.append(values_QxM.mean(axis=0) - 2 * (flips_SxQ.astype(np.float64) @ values_QxM) / queries)
    return np.concatenate(means)


def _t_test(strata: Sequence[np.ndarray]) -> float | None:
    """p of the t statistic of the strata's mean mean, degrees of freedom by Welch and Satterthwaite."""
    if min(map(len, strata)) < 2:
        return None
    mean = np.mean([values_Q.mean() for values_Q in strata])
    errors_L = np.array([values_Q.var(ddof=1) / len(values_Q) for values_Q in strata]) / len(strata) ** 2
    if errors_L.sum() == 0:
        return 1.0 if mean == 0 else 0.0
    freedom = errors_L.sum() ** 2 / sum(e**2 / (len(v) - 1) for e, v in zip(errors_L, strata, strict=True))
    return float(2 * stats.t.sf(abs(mean) / np.sqrt(errors_L.sum()), freedom))
