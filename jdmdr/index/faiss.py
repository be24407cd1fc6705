"""Inner-product search with faiss, the index chosen by faiss' factory string."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from jdmdr.index.searcher import best_first, check_blocks, check_queries
from jdmdr.types import Hits, UserError

_ADD_ROWS = 65_536  # rows converted to float32 at a time
_TRAIN_ROWS = 262_144  # most rows a trained index is fitted on


class FaissSearcher:
    """Searches a collection with a faiss index.

    `blocks` are the collection's shards, CixD, float16 or float32. `factory` is a faiss factory string ('Flat',
    'HNSW32', 'IVF4096,SQfp16'); `parameters` faiss' own search-time string ('nprobe=32', 'efSearch=128'). An index
    that needs training gets a sample of the rows, drawn by `seed`. Rows tied at the k-th score are chosen by faiss;
    those inside are ordered by row. Raises `UserError` without faiss and on a string faiss refuses.
    """

    def __init__(self, blocks: Sequence[np.ndarray], factory: str = "Flat", parameters: str = "", seed: int = 0):
        try:
            import faiss
        except ImportError:
            raise UserError("index=faiss needs the package faiss-cpu: install it or set index=exact") from None

        self.collection_rows, self.width = check_blocks(blocks)
        try:
            self.index = faiss.index_factory(self.width, factory, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError:
            raise UserError(
                f"faiss knows no index {factory!r} of width {self.width}: "
                "give a factory string such as 'Flat' or 'IVF1024,Flat'"
            ) from None
        if not self.index.is_trained:
            self.index.train(_sample(blocks, self.collection_rows, seed))
        for block in blocks:
            for start in range(0, len(block), _ADD_ROWS):
                rows_CxD = np.ascontiguousarray(block[start : start + _ADD_ROWS], np.float32)
                if not np.isfinite(rows_CxD).all():
                    raise UserError(
                        f"the collection holds NaN or infinity after row {self.index.ntotal}: encode it again"
                    )
                self.index.add(rows_CxD)
        if parameters:
            try:
                faiss.ParameterSpace().set_index_parameters(self.index, parameters)
            except RuntimeError:
                raise UserError(
                    f"faiss index {factory!r} has no parameters {parameters!r}: give a string such as 'nprobe=32'"
                ) from None

    def search(self, queries_QxD: np.ndarray, k: int) -> Hits:
        """The best min(k, C) rows the index finds for every query; an approximate index may leave places empty."""
        queries_QxD = check_queries(queries_QxD, self.width, k)
        scores_QxK, rows_QxK = self.index.search(np.ascontiguousarray(queries_QxD), min(k, self.collection_rows))
        return best_first(rows_QxK, scores_QxK)  # faiss' empty place is NO_HIT too


def _sample(blocks: Sequence[np.ndarray], collection_rows: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).choice(collection_rows, min(collection_rows, _TRAIN_ROWS), replace=False)
    rows.sort()
    firsts = np.cumsum([0, *(len(block) for block in blocks)])
    bounds = np.searchsorted(rows, firsts)
    parts = [
        block[rows[low:high] - first]
        for block, first, (low, high) in zip(blocks, firsts[:-1], itertools.pairwise(bounds), strict=True)
    ]
    return np.concatenate(parts).astype(np.float32)
