"""MaxP: a long passage is embedded in chunks, and a query's score with it is that with its best chunk.

    s(q, d) = max_c  q . E_dc        over the chunks c of d that hold text

A token store keeps up to `count` chunks of a passage behind one another, each of `length` tokens but for the last. A chunk is a
sequence, a vector and a row of an index of its own; chunks without text are in no index. In a batch every passage has `count`
chunks, so that shapes are fixed; an empty one is a single padding token, which costs next to nothing, and never the best.

Source: Xiong et al., "Approximate Nearest Neighbor Negative Contrastive Learning for Dense Text Retrieval" (ICLR 2021), and the
authors' code, which indexed the vectors of empty chunks too.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.index.fusion import Rescore
from jdmdr.index.searcher import Searcher
from jdmdr.tokenizer import TokenStore
from jdmdr.types import NO_HIT, Hits, Tokens

BATCH_KEY = "has_text_NxC"
CHUNKS_A_HIT = 4  # searched for each passage that is wanted, before more are


class Chunked(NamedTuple):
    """A token source whose sequence r * count + c is chunk c of text r of the store."""

    store: TokenStore
    length: int
    count: int

    def of(self, rows_N: np.ndarray) -> np.ndarray:
        """All chunks of these texts, N x C."""
        return rows_N[:, None] * self.count + np.arange(self.count)

    def has_text(self, rows_N: np.ndarray) -> np.ndarray:
        """bool N x C; the first chunk of an empty text counts, so that every text has one."""
        return np.arange(self.count) < self.counts(rows_N)[:, None]

    def counts(self, rows_N: np.ndarray) -> np.ndarray:
        """How many chunks with text each has, int64, at least 1."""
        return np.clip(-(-self.store.lengths(rows_N).astype(np.int64) // self.length), 1, self.count)

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        text, chunk = np.divmod(rows, self.count)
        return np.clip(self.store.lengths(text) - chunk * self.length, 1, self.length).astype(np.int32)

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        text, chunk = np.divmod(rows, self.count)
        tokens = self.store.gather(text, min(width, self.length), chunk * self.length)
        tokens.mask_BxT[:, 0] = 1
        missing = ((0, 0), (0, max(0, width - self.length)))
        return Tokens(np.pad(tokens.ids_BxT, missing), np.pad(tokens.mask_BxT, missing))


def best_chunk(scores_BxM: jax.Array, has_text: jax.Array) -> jax.Array:
    """Scores of passages, B x N, from those of their M = N * C chunks; `has_text` is N x C, or B x N x C of each row's own."""
    by_chunk_BxNxC = scores_BxM.reshape(len(scores_BxM), *has_text.shape[-2:])
    return jnp.where(has_text, by_chunk_BxNxC, -jnp.inf).max(axis=-1)


class BestChunkSearcher:
    """Searches passages by their chunks, exactly if `searcher` is exact.

    Args:
      searcher: over the vectors of chunks.
      first_C: row of each passage's first chunk, and behind the last one how many chunks there are; int64 C + 1.
    """

    def __init__(self, searcher: Searcher, first_C: np.ndarray):
        self._searcher, self._first_C = searcher, first_C

    def search(self, queries_QxD: np.ndarray, k: int) -> Hits:
        """The best min(k, C) passages of every query, each with the score of its best chunk."""
        chunks, k = int(self._first_C[-1]), min(k, len(self._first_C) - 1)
        rows_QxK = np.full((len(queries_QxD), k), NO_HIT, np.int64)
        scores_QxK = np.full(rows_QxK.shape, -np.inf, np.float32)
        lacking, depth = np.arange(len(queries_QxD)), min(CHUNKS_A_HIT * k, chunks)
        while len(lacking):
            found = self._collapsed(self._searcher.search(queries_QxD[lacking], depth), k)
            rows_QxK[lacking], scores_QxK[lacking] = found
            lacking = lacking[(found.rows_QxK == NO_HIT).any(axis=1)] if depth < chunks else lacking[:0]
            depth = min(2 * depth, chunks)
        return Hits(rows_QxK, scores_QxK)

    def _collapsed(self, hits: Hits, k: int) -> Hits:
        """The passages of chunks, each where its first chunk stands."""
        query_N, place_N = np.nonzero(hits.rows_QxK != NO_HIT)
        passage_N = np.searchsorted(self._first_C, hits.rows_QxK[query_N, place_N], side="right") - 1
        first_N = np.sort(np.unique(query_N * len(self._first_C) + passage_N, return_index=True)[1])
        query_N, place_N, passage_N = query_N[first_N], place_N[first_N], passage_N[first_N]
        rank_N = np.arange(len(query_N)) - np.searchsorted(query_N, query_N)
        kept_N = rank_N < k
        rows_QxK = np.full((len(hits.rows_QxK), k), NO_HIT, np.int64)
        scores_QxK = np.full(rows_QxK.shape, -np.inf, np.float32)
        rows_QxK[query_N[kept_N], rank_N[kept_N]] = passage_N[kept_N]
        scores_QxK[query_N[kept_N], rank_N[kept_N]] = hits.scores_QxK[query_N[kept_N], place_N[kept_N]]
        return Hits(rows_QxK, scores_QxK)


def rescore_best(rescore: Rescore, first_C: np.ndarray) -> Rescore:
    """Scores of passages from a function that scores their chunks."""

    def best(query_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
        counts_N = first_C[row_N + 1] - first_C[row_N]
        begin_N = np.cumsum(counts_N) - counts_N
        place = np.arange(counts_N.sum()) - np.repeat(begin_N, counts_N)
        scores = rescore(np.repeat(query_N, counts_N), np.repeat(first_C[row_N], counts_N) + place)
        return np.maximum.reduceat(scores, begin_N) if len(row_N) else scores

    return best
