"""One ranking out of several: by ranks, by normalised scores, or by concatenated vectors."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from jdmdr.types import NO_HIT, Hits, UserError

METHODS = ("rrf", "zscore", "minmax")
_RRF_RANKS = 60
_CHUNK_ENTRIES = 65_536  # (query, row) pairs fused, and rescored, at a time

# (query_N, row_N) -> score_N: the exact scores of N pairs of a query and a row.
Rescore = Callable[[np.ndarray, np.ndarray], np.ndarray]


def fuse(
    hits: Sequence[Hits], method: str, weights: Sequence[float], k: int, rescore: Sequence[Rescore | None] | None = None
) -> Hits:
    """The best k rows of the union of several systems' hits for the same queries.

    rrf: sum over the systems of w_m / (60 + rank), ranks from 1, absent adds 0 (Cormack et al. 2009).
    zscore, minmax: every system's scores are normalised per query over the union and added up with the weights. A row
    that a list lacks counts as the minimum of that list; with `rescore[m]` system m scores every row of the union, so
    that nothing is missing. A system with no hit for a query, or one score for all rows, adds 0.

    `weights` holds one number >= 0 a system; the lists may differ in depth. Ties by lower row; places beyond the
    union stay empty. Raises `UserError` on an unknown method and on weights that do not fit the systems.
    """
    if method not in METHODS:
        raise UserError(f"fusion is {method!r}: choose one of {', '.join(METHODS)}")
    weights = _checked_weights(weights, len(hits))
    rescore = rescore or [None] * len(hits)
    queries = len(hits[0].rows_QxK)
    rows_QxK = np.full((queries, k), NO_HIT, np.int64)
    scores_QxK = np.full((queries, k), -np.inf, np.float32)
    chunk = max(1, _CHUNK_ENTRIES // sum(h.rows_QxK.shape[1] for h in hits))
    for start in range(0, queries, chunk):
        query_N, row_N, ranks_MxN, lists_MxN = _union(
            [Hits(h.rows_QxK[start : start + chunk], h.scores_QxK[start : start + chunk]) for h in hits]
        )
        if not len(query_N):
            continue
        if method == "rrf":
            score_N = weights @ (1 / (_RRF_RANKS + ranks_MxN))
        else:
            firsts = np.flatnonzero(np.diff(query_N, prepend=-1))  # where each query's rows begin
            score_N = np.zeros(len(query_N))
            for weight, list_N, exact in zip(weights, lists_MxN, rescore, strict=True):
                raw_N = exact(start + query_N, row_N) if exact else _fill_missing(list_N, firsts)
                score_N += weight * _normalised(np.asarray(raw_N, np.float64), firsts, method)
        score_N = score_N.astype(np.float32)  # before the ordering: scores that round to one are a tie
        order = np.lexsort((row_N, -score_N, query_N))
        place_N = np.arange(len(query_N)) - np.searchsorted(query_N, query_N)  # query_N is sorted before and after
        order, place_N = order[place_N < k], place_N[place_N < k]
        rows_QxK[start + query_N[order], place_N] = row_N[order]
        scores_QxK[start + query_N[order], place_N] = score_N[order]
    return Hits(rows_QxK, scores_QxK)


def _union(hits: Sequence[Hits]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(query_N, row_N) of the union, sorted by both, and each system's ranks and scores MxN (inf and nan if absent)."""
    span = max(int(h.rows_QxK.max(initial=0)) for h in hits) + 1
    present = [h.rows_QxK != NO_HIT for h in hits]
    keys = [np.nonzero(p)[0] * span + h.rows_QxK[p] for h, p in zip(hits, present, strict=True)]
    key_N = np.unique(np.concatenate(keys))
    ranks_MxN = np.full((len(hits), len(key_N)), np.inf)
    scores_MxN = np.full((len(hits), len(key_N)), np.nan)
    for m, (h, p, key) in enumerate(zip(hits, present, keys, strict=True)):
        member = np.searchsorted(key_N, key)
        ranks_MxN[m, member] = np.nonzero(p)[1] + 1
        scores_MxN[m, member] = h.scores_QxK[p]
    return key_N // span, key_N % span, ranks_MxN, scores_MxN


def _per_row(values: np.ndarray, firsts: np.ndarray, rows: int) -> np.ndarray:
    """One value a query, repeated for each of its rows."""
    return np.repeat(values, np.diff(firsts, append=rows))


def _fill_missing(score_N: np.ndarray, firsts: np.ndarray) -> np.ndarray:
    lowest_N = _per_row(np.nan_to_num(np.fmin.reduceat(score_N, firsts)), firsts, len(score_N))
    return np.where(np.isnan(score_N), lowest_N, score_N)


def _normalised(score_N: np.ndarray, firsts: np.ndarray, method: str) -> np.ndarray:
    rows = len(score_N)
    lowest = np.minimum.reduceat(score_N, firsts)
    spread = np.maximum.reduceat(score_N, firsts) - lowest
    if method == "minmax":
        centre, width = lowest, spread
    else:
        counts = np.diff(firsts, append=rows)
        centre = np.add.reduceat(score_N, firsts) / counts
        width = np.sqrt(np.add.reduceat((score_N - _per_row(centre, firsts, rows)) ** 2, firsts) / counts)
    width = np.where(spread > 0, width, np.inf)
    return (score_N - _per_row(centre, firsts, rows)) / _per_row(width, firsts, rows)


def dense_rescore(queries_QxD: np.ndarray, blocks: Sequence[np.ndarray]) -> Rescore:
    """Exact inner products of any (query, row) pairs, for `fuse`; `blocks` are the collection's shards, CixD."""
    firsts = np.cumsum([0, *(len(block) for block in blocks)])

    def rescore(query_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
        score_N = np.empty(len(row_N), np.float32)
        for block, (first, end) in zip(blocks, itertools.pairwise(firsts), strict=True):
            inside = (row_N >= first) & (row_N < end)
            rows_NxD = block[row_N[inside] - first].astype(np.float32)
            score_N[inside] = np.einsum("nd,nd->n", queries_QxD[query_N[inside]].astype(np.float32), rows_NxD)
        return score_N

    return rescore


def inverse_sigma_weights(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Weights w_m proportional to 1 / sigma_m, adding up to 1, for `concat_vectors` (DMDR's ensemble).

    `scores[m]` holds system m's scores QxK for a sample of queries, its own top K (200 as a rule); sigma_m is their
    standard deviation. Without it the model with the widest band of cosines decides alone. Empty places (-inf) are
    left out.
    """
    sigmas = np.array([np.std(s[np.isfinite(s)], dtype=np.float64) if np.isfinite(s).any() else 0 for s in scores])
    if not (sigmas > 0).all():
        raise UserError(
            f"system {int(np.argmin(sigmas))} of the ensemble gives every passage the same score: "
            "check its embeddings or leave it out"
        )
    return (1 / sigmas) / (1 / sigmas).sum()


def concat_vectors(vectors: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """[sqrt(w_1) e_1 ; ... ; sqrt(w_M) e_M] with L2-normalised e_m: its inner product is sum of w_m cos_m(q, p).

    `vectors[m]` is NxD_m, of queries or of a block of passages; the result Nx(sum of D_m), float32. A zero vector
    stays zero.
    """
    weights = _checked_weights(weights, len(vectors))
    parts = []
    for v_NxD, weight in zip(vectors, weights, strict=True):
        v_NxD = np.asarray(v_NxD, np.float32)
        norms_Nx1 = np.linalg.norm(v_NxD, axis=1, keepdims=True)
        parts.append(np.sqrt(weight, dtype=np.float32) * v_NxD / np.where(norms_Nx1 > 0, norms_Nx1, 1))
    return np.concatenate(parts, axis=1)


def choose_weight(
    dense: Hits,
    lexical: Hits,
    metric: Callable[[Hits], tuple[float, float]],
    method: str,
    grid: Sequence[float],
) -> float:
    """The weight w in `grid` for the hybrid w dense + (1 - w) lexical, chosen on validation queries.

    `metric` gives a mean and its standard error. Among the weights within one standard error of the best mean the one
    closest to 0.5 is taken (the one-standard-error rule of Breiman et al. 1984): a few hundred queries cannot tell
    neighbours apart, and the optimum of noise would. Ties go to the better mean, then to the lower weight.
    """
    depth = max(dense.rows_QxK.shape[1], lexical.rows_QxK.shape[1])
    results = {w: metric(fuse([dense, lexical], method, [w, 1 - w], depth)) for w in grid}
    best, error = max(results.values())
    near = [w for w, (mean, _) in results.items() if mean >= best - error]
    return min(near, key=lambda w: (abs(w - 0.5), -results[w][0], w))


def _checked_weights(weights: Sequence[float], systems: int) -> np.ndarray:
    weights = np.asarray(weights, np.float64)
    if weights.shape != (systems,):
        raise UserError(
            f"fusion weights are {weights.tolist()} but {systems} systems are fused: give one weight a system"
        )
    if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise UserError(f"fusion weights are {weights.tolist()}: give numbers >= 0, not all of them 0")
    return weights
