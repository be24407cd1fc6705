"""Spherical k-means (Dhillon and Modha 2001): clusters of directions, for topics without labelled data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jdmdr.types import UserError

_CHUNK_ROWS = 65_536


def spherical_kmeans(vectors_NxD: np.ndarray, k: int, seed: int, iterations: int = 50) -> np.ndarray:
    """Unit centroids kxD (float32) that maximise the summed cosine of every vector to its nearest centroid.

    Seeded by k-means++ (Arthur and Vassilvitskii 2007) on 1 - cosine; stops when no label changes. An empty cluster
    restarts at the vector farthest from its centroid. With fewer than k distinct directions the spare centroids
    repeat others, and `assign` leaves them empty. The same seed gives the same centroids. Raises `UserError` without
    vectors or clusters.
    """
    if k < 1:
        raise UserError(f"the number of clusters is {k}: give at least 1")
    if not len(vectors_NxD):
        raise UserError("k-means got no vectors: embed some passages first")
    lengths_N = _lengths(vectors_NxD)
    centroids_kxD = _plus_plus(vectors_NxD, lengths_N, k, np.random.default_rng(seed))
    previous_N = None
    for _ in range(iterations):
        labels_N, cosines_N = _nearest(vectors_NxD, lengths_N, centroids_kxD)
        if previous_N is not None and np.array_equal(labels_N, previous_N):
            break
        previous_N = labels_N
        sums_kxD = np.zeros(centroids_kxD.shape)
        for rows, chunk_NxD in _chunks(vectors_NxD):
            members_kxN = (labels_N[rows] == np.arange(k)[:, None]) / lengths_N[rows]
            sums_kxD += members_kxN @ chunk_NxD
        empty = np.flatnonzero(np.bincount(labels_N, minlength=k) == 0)
        farthest = np.argsort(cosines_N, kind="stable")[: len(empty)]
        sums_kxD[empty[: len(farthest)]] = vectors_NxD[farthest]
        norms_k = np.linalg.norm(sums_kxD, axis=1)
        moved = norms_k > 0  # a cluster whose vectors cancel out keeps its centroid
        centroids_kxD[moved] = sums_kxD[moved] / norms_k[moved, None]
    return centroids_kxD


def assign(vectors_NxD: np.ndarray, centroids_kxD: np.ndarray) -> np.ndarray:
    """The label (int32, N) of the centroid with the highest cosine; ties to the lower label."""
    return _nearest(vectors_NxD, _lengths(vectors_NxD), centroids_kxD)[0]


def _chunks(vectors_NxD: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    for start in range(0, len(vectors_NxD), _CHUNK_ROWS):
        rows = slice(start, min(start + _CHUNK_ROWS, len(vectors_NxD)))
        yield rows, np.asarray(vectors_NxD[rows], np.float32)


def _lengths(vectors_NxD: np.ndarray) -> np.ndarray:
    """L2 norms, 1 for a zero vector: its cosine to everything is 0."""
    lengths_N = np.empty(len(vectors_NxD), np.float32)
    for rows, chunk_NxD in _chunks(vectors_NxD):
        lengths_N[rows] = np.sqrt(np.einsum("nd,nd->n", chunk_NxD, chunk_NxD))
    return np.where(lengths_N > 0, lengths_N, 1)


def _nearest(
    vectors_NxD: np.ndarray, lengths_N: np.ndarray, centroids_kxD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(label, cosine) of the nearest centroid of every vector."""
    labels_N = np.empty(len(vectors_NxD), np.int32)
    cosines_N = np.empty(len(vectors_NxD), np.float32)
    for rows, chunk_NxD in _chunks(vectors_NxD):
        products_Nxk = chunk_NxD @ centroids_kxD.T
        labels_N[rows] = products_Nxk.argmax(axis=1)
        cosines_N[rows] = products_Nxk.max(axis=1) / lengths_N[rows]
    return labels_N, cosines_N


def _plus_plus(vectors_NxD: np.ndarray, lengths_N: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Centroids drawn one by one, each vector with a chance that grows with its distance from those already drawn."""
    count = len(vectors_NxD)
    centroids_kxD = np.zeros((k, vectors_NxD.shape[1]), np.float32)
    distances_N = np.full(count, np.inf)
    row = int(rng.integers(count))
    for i in range(k):
        centroids_kxD[i] = vectors_NxD[row].astype(np.float32) / lengths_N[row]
        _, cosines_N = _nearest(vectors_NxD, lengths_N, centroids_kxD[i : i + 1])
        # Rounding leaves about 1e-7 between equal directions: they must not be drawn again.
        distances_N = np.minimum(distances_N, np.where(cosines_N > 1 - 1e-6, 0, 1 - cosines_N))
        total_N = distances_N.cumsum()
        row = min(int(np.searchsorted(total_N, rng.random() * total_N[-1], side="right")), count - 1)
    return centroids_kxD
