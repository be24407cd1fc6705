"""Exact inner-product search in JAX: the collection streams through the mesh in blocks of one fixed shape."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jdmdr.index.searcher import check_blocks, check_queries
from jdmdr.types import NO_HIT, Hits, UserError


class ExactSearcher:
    """Searches a collection of any size exactly; each row is read from disk and sent to the devices once a search.

    `blocks` are the collection's shards, CixD, float16 or float32, memory-mapped as a rule; scores are float32 at the
    highest matmul precision. A device holds block_rows / devices rows and a query_rows x block_rows / devices matrix of
    scores, whatever the numbers of queries and passages. Every process of a multi-host mesh passes the same
    arguments, reads only its own rows, and gets the full result. At most 2**31 - 1 passages.
    """

    def __init__(self, blocks: Sequence[np.ndarray], mesh: Mesh, block_rows: int = 65_536, query_rows: int = 256):
        self.collection_rows, self.width = check_blocks(blocks)
        self.blocks = [block for block in blocks if len(block)]
        self.firsts = np.cumsum([0, *(len(block) for block in self.blocks)])
        self.dtype = np.result_type(*self.blocks)
        self.mesh = mesh
        devices = mesh.shape["data"]
        # A small collection is one block; collections of like size share its compiled shape.
        self.block_rows = -(-min(block_rows, _power_of_two(self.collection_rows)) // devices) * devices
        self.query_rows = query_rows

    def search(self, queries_QxD: np.ndarray, k: int) -> Hits:
        """The best min(k, C) rows for every query; raises `UserError` on non-finite vectors and on a wrong width."""
        queries_QxD = check_queries(queries_QxD, self.width, k)
        k = min(k, self.collection_rows)
        queries = len(queries_QxD)
        chunk = min(self.query_rows, _power_of_two(queries))
        chunks = _few_sizes(-(-queries // chunk))
        padded = np.zeros((chunks * chunk, self.width), np.float32)
        padded[:queries] = queries_QxD

        everywhere = NamedSharding(self.mesh, P())
        q_GxBxD = _put(padded.reshape(chunks, chunk, self.width), everywhere)
        best = (
            _put(np.full((chunks, chunk, k), -np.inf, np.float32), everywhere),
            _put(np.full((chunks, chunk, k), NO_HIT, np.int32), everywhere),
        )
        by_rows = NamedSharding(self.mesh, P("data"))
        for first in range(0, self.collection_rows, self.block_rows):
            # The devices work on the last block while this one is read; waiting keeps at most two in memory.
            block_CxD = jax.make_array_from_callback(
                (self.block_rows, self.width), by_rows, functools.partial(self._read, first)
            )
            jax.block_until_ready(best)
            best = _merge_block(best, q_GxBxD, block_CxD, first, self.collection_rows, self.mesh)

        scores_QxK, rows_QxK = (np.asarray(x).reshape(chunks * chunk, k)[:queries] for x in best)
        if not np.isfinite(scores_QxK).all():
            query, place = np.argwhere(~np.isfinite(scores_QxK))[0]
            raise UserError(
                f"row {rows_QxK[query, place]} of the collection scores {scores_QxK[query, place]}: "
                "its vector holds NaN or infinity, encode it again"
            )
        return Hits(rows_QxK.astype(np.int64), scores_QxK)

    def _read(self, first: int, index: tuple[slice, ...]) -> np.ndarray:
        """The rows of one device's part of the block that starts at row `first`; zeros beyond the collection."""
        start, stop, _ = index[0].indices(self.block_rows)
        start, stop = first + start, first + stop
        rows_CxD = np.zeros((stop - start, self.width), self.dtype)
        for block, (begin, end) in zip(self.blocks, itertools.pairwise(self.firsts), strict=True):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                rows_CxD[low - start : high - start] = block[low - begin : high - begin]
        return rows_CxD


def _power_of_two(count: int) -> int:
    """The smallest that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def _few_sizes(count: int) -> int:
    """`count` rounded up to a power of two, or to a multiple of 8: few compiled shapes, little wasted work."""
    return _power_of_two(count) if count <= 8 else -(-count // 8) * 8


def _put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@functools.partial(jax.jit, static_argnames="mesh")
def _merge_block(best, q_GxBxD, block_CxD, first, collection_rows, mesh):
    """The running top-k (scores and rows, each GxBxK) after one more block; its row 0 is row `first` of all."""
    k = best[0].shape[-1]

    def on_device(best, q_GxBxD, part_CxD, first, collection_rows):
        part_rows = part_CxD.shape[0]
        part_first = first + jax.lax.axis_index("data") * part_rows
        part_CxD = part_CxD.astype(jnp.float32)
        inside_C = part_first + jnp.arange(part_rows) < collection_rows

        def merge_chunk(chunk):
            best_scores_BxK, best_rows_BxK, q_BxD = chunk
            scores_BxC = jnp.matmul(q_BxD, part_CxD.T, precision=jax.lax.Precision.HIGHEST)
            scores_BxC = jnp.where(inside_C, scores_BxC, -jnp.inf)
            scores_BxK, places_BxK = jax.lax.top_k(scores_BxC, min(k, part_rows))
            gather = functools.partial(jax.lax.all_gather, axis_name="data", axis=1, tiled=True)
            # top_k gives a tie to the lower position, and positions follow rows: the best so far, then each device.
            scores = jnp.concatenate([best_scores_BxK, gather(scores_BxK)], axis=1)
            rows = jnp.concatenate([best_rows_BxK, gather(part_first + places_BxK)], axis=1)
            scores_BxK, places_BxK = jax.lax.top_k(scores, k)
            return scores_BxK, jnp.take_along_axis(rows, places_BxK, axis=1)

        return jax.lax.map(merge_chunk, (*best, q_GxBxD))

    # Every device ends with the same gathered result, which the replication check cannot see.
    merge = jax.shard_map(
        on_device, mesh=mesh, in_specs=(P(), P(), P("data"), P(), P()), out_specs=P(), check_vma=False
    )
    return merge(best, q_GxBxD, block_CxD, first, collection_rows)
