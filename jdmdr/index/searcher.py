"""What all searchers share: the protocol, the checks of their input, and the order of their hits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from jdmdr.types import NO_HIT, Hits, UserError


class Searcher(Protocol):
    """Finds the best rows of one collection.

    `queries` is an array QxD for the dense searchers and a list of Q strings for BM25. The result has min(k, C)
    columns; every searcher orders by higher score, then by lower row.
    """

    def search(self, queries: Any, k: int) -> Hits: ...


def best_first(rows_QxK: np.ndarray, scores_QxK: np.ndarray) -> Hits:
    """Hits in the project's order: higher score first, then lower row; empty places (`NO_HIT`) last."""
    rows_QxK = np.asarray(rows_QxK, np.int64)
    scores_QxK = np.where(rows_QxK == NO_HIT, -np.inf, scores_QxK).astype(np.float32)
    order_QxK = np.lexsort((rows_QxK, -scores_QxK), axis=1)
    return Hits(np.take_along_axis(rows_QxK, order_QxK, 1), np.take_along_axis(scores_QxK, order_QxK, 1))


def check_blocks(blocks: Sequence[np.ndarray]) -> tuple[int, int]:
    """(C, D) of a collection held as blocks of rows; raises `UserError` when it is empty or of several widths."""
    collection_rows = sum(len(block) for block in blocks)
    if not collection_rows:
        raise UserError("the collection to search has no passages: encode it first")
    widths = sorted({block.shape[1] for block in blocks})
    if len(widths) > 1:
        raise UserError(f"the shards of the collection have different widths {widths}: encode them all with one model")
    return collection_rows, widths[0]


def check_queries(queries_QxD: np.ndarray, width: int, k: int) -> np.ndarray:
    """The queries as float32; raises `UserError` on a wrong width, non-finite values, or k < 1."""
    queries_QxD = np.asarray(queries_QxD, np.float32)
    if queries_QxD.ndim != 2 or queries_QxD.shape[1] != width:
        raise UserError(
            f"the query vectors have shape {queries_QxD.shape} but the collection has width {width}: "
            "encode both with the same model"
        )
    if not np.isfinite(queries_QxD).all():
        row = int(np.flatnonzero(~np.isfinite(queries_QxD).all(axis=1))[0])
        raise UserError(f"query vector {row} holds NaN or infinity: check the checkpoint that encoded it")
    check_k(k)
    return queries_QxD


def check_k(k: int) -> None:
    if k < 1:
        raise UserError(f"k is {k}: ask for at least one hit a query")
