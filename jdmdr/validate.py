"""Validation while training: nDCG@10 of the held-out training queries over a pool of passages per language."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdmdr import hashing, maxp, retrievers
from jdmdr.encode import Embedder
from jdmdr.encoders import SIDES
from jdmdr.evaluate import ndcg_by_rows
from jdmdr.index.exact import ExactSearcher
from jdmdr.library import Library, TrainingQuery
from jdmdr.sources import Stores
from jdmdr.tokenizer import TokenStore
from jdmdr.types import NO_HIT, Hits

DEPTH = 10


def make_validation(
    library: Library, training: Sequence[TrainingQuery], stores: Stores, encoder: Any, mesh: jax.sharding.Mesh,
    lengths: tuple[int, int], pool: int, seed: int, passages: TokenStore | maxp.Chunked,
) -> Callable[[Any], float | None]:  # fmt: skip
    """`validate(params)`: nDCG@10, averaged over queries and then languages; None without held-out queries.

    A language's pool holds the held-out queries' positives and judged passages and random passages up to `pool`; a
    smaller collection is searched whole. `passages` is what is embedded of them: the texts of `stores`, or their chunks.
    """
    held_out = [q for q in training if q.held_out]
    if not held_out:
        return lambda params: None
    query_embedder, passage_embedder = (
        Embedder(encoder, mesh, length, side) for length, side in zip(lengths, SIDES, strict=True)
    )
    langs = sorted({q.lang for q in held_out})
    of_lang = {lang: [q for q in held_out if q.lang == lang] for lang in langs}
    pools = {lang: _pool(library, lang, of_lang[lang], pool, seed) for lang in langs}

    def validate(params: Any) -> float:
        found = []
        for lang in langs:
            q_QxD = query_embedder.embed(params, stores.queries, np.array([q.row for q in of_lang[lang]]))
            rows, first_C = pools[lang], None
            if isinstance(passages, maxp.Chunked):
                first_C = np.concatenate([[0], np.cumsum(passages.counts(rows))])
                rows = passages.of(rows)[passages.has_text(rows)]
            p_CxD = passage_embedder.embed(params, passages, rows)
            vectors = retrievers.Vectors(q_QxD, [p_CxD], first_C)
            hits = retrievers.over(ExactSearcher([p_CxD], mesh), vectors).search(np.arange(len(q_QxD)), DEPTH)
            rows_QxK = np.where(hits.rows_QxK == NO_HIT, NO_HIT, pools[lang][hits.rows_QxK])
            missing = ((0, 0), (0, DEPTH - rows_QxK.shape[1]))
            found.append(Hits(np.pad(rows_QxK, missing, constant_values=NO_HIT),
                              np.pad(hits.scores_QxK, missing, constant_values=-np.inf)))  # fmt: skip
        stacked = Hits(*(np.concatenate(part) for part in zip(*found, strict=True)))
        queries = [q for lang in langs for q in of_lang[lang]]
        return ndcg_by_rows([q.positives for q in queries], stacked, [q.lang for q in queries])[0]

    return validate


def _pool(library: Library, lang: int, queries: Sequence[TrainingQuery], size: int, seed: int) -> np.ndarray:
    """Global rows, ascending."""
    base, stop = library.bases[lang : lang + 2]
    if stop - base <= size:
        return np.arange(base, stop)
    needed = np.unique(np.concatenate([np.concatenate([q.positives, q.judged]) for q in queries]))
    others = (
        hashing.rng(seed, "validation pool", library.langs[lang]).choice(int(stop - base), size, replace=False) + base
    )
    return np.unique(np.concatenate([needed, others]))
