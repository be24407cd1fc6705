"""The faiss mining script: runs of several retrievers over the training queries, fused to one list of candidates.

    python -m jdmdr.mine --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

A retriever of `mine.retrievers` is `bm25` or the encoder that training starts from (`warmup`). For each language this
writes one TREC run per retriever and one of the ensemble, and the candidates (positives dropped by id) as arrays.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr import encode, metrics
from jdmdr.corpus import Collection
from jdmdr.index import dense_searcher
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.index.fusion import Rescore, dense_rescore, fuse
from jdmdr.library import Library, TrainingQuery, docid_lookup
from jdmdr.types import NO_HIT, Hits, UserError

BM25 = "bm25"


class Retriever(NamedTuple):
    """A way to rank one collection for queries known by their row in a split."""

    search: Callable[[np.ndarray, int], Hits]  # (query rows, k) -> hits
    rescore: Callable[[np.ndarray], Rescore] | None  # query rows -> exact scores of any pairs


def bm25_retriever(index_dir: pathlib.Path, texts: Sequence[str]) -> Retriever:
    """BM25 over a stored index; `texts` are the queries of the split."""
    searcher = Bm25Searcher.load(index_dir)
    return Retriever(lambda rows, k: searcher.search([texts[row] for row in rows], k), None)


def dense_retriever(
    embeddings: pathlib.Path, split: str, index: str, factory: str, mesh: Any, passages: Sequence[pathlib.Path] = ()
) -> Retriever:
    """Inner product over the embedding store of one language, by an index of `jdmdr.index.SEARCHERS`; over the passages
    of other languages' stores, one after another, where they are given."""
    blocks = [block for directory in passages or [embeddings] for block in encode.shards(directory, "passages")]
    queries_QxD = np.concatenate(encode.shards(embeddings, f"queries.{split}")).astype(np.float32)
    searcher = dense_searcher(index, blocks, mesh, factory)
    return Retriever(
        lambda rows, k: searcher.search(queries_QxD[rows], k),
        lambda rows: dense_rescore(queries_QxD[rows], blocks),
    )


def candidate_pool(queries: Sequence[TrainingQuery], base: int, pool: str) -> np.ndarray | None:
    """Rows of the collection that may be negatives, ascending; None for all of them.

    With `positives` a query's negatives are other queries' positives, so that no passage is met as a negative only. In a
    small collection a model otherwise learns which passages have no training query.
    """
    if pool not in ("corpus", "positives"):
        raise UserError(f"mine.pool is {pool!r}; it is one of corpus, positives")
    return None if pool == "corpus" else np.unique(np.concatenate([q.positives for q in queries])) - base


class Mined(NamedTuple):
    """Candidates of one language's training queries, best first; rows of its collection, `NO_HIT` behind."""

    rows_QxK: np.ndarray  # int64
    scores_QxK: np.ndarray  # float32, of the fused list
    dense_scores_QxK: np.ndarray  # float32, of the first dense retriever; NaN without one
    positive_score_Q: np.ndarray  # float32, the lowest of the query's positives by the same retriever


def mine_language(
    queries: Sequence[TrainingQuery], rows: np.ndarray, base: int, retrievers: dict[str, Retriever], config: Any,
    collection: Collection, lang: str, out_dir: pathlib.Path,
) -> Mined:  # fmt: skip
    """Mines one language and writes its runs and candidates to `out_dir`.

    Args:
      queries: its training queries; `rows` are their rows among the split's queries.
      base: global row of the collection's first passage.
    """
    most_positives = max(len(q.positives) for q in queries)
    depth = config.depth + most_positives
    lists = {name: retriever.search(rows, depth) for name, retriever in retrievers.items()}
    rescore = [r.rescore(rows) if r.rescore else None for r in retrievers.values()]
    fused = fuse(list(lists.values()), config.fusion, config.weights or [1.0] * len(lists), depth, rescore)
    runs = {**lists, "ensemble": fused}
    docid = docid_lookup(collection, runs.values())
    for name, hits in runs.items():
        metrics.write_run(out_dir / f"{lang}.{name}.trec", [q.qid for q in queries], hits, docid, name)
    positives = [q.positives - base for q in queries]
    candidates = _usable(fused, positives, candidate_pool(queries, base, config.pool), config.depth)
    dense = next((r for r in rescore if r), None)
    mined = Mined(*candidates, *_dense_scores(candidates.rows_QxK, positives, dense))
    for field, values in mined._asdict().items():
        np.save(out_dir / f"{lang}.{field}.npy", values)
    (out_dir / f"{lang}.qids.txt").write_text("".join(f"{q.qid}\n" for q in queries), encoding="utf-8")
    return mined


def read_mined(directory: pathlib.Path, lang: str) -> Mined:
    """What `mine_language` wrote, memory-mapped."""
    return Mined(*(np.load(directory / f"{lang}.{field}.npy", mmap_mode="r") for field in Mined._fields))


def _usable(hits: Hits, positives: Sequence[np.ndarray], pool: np.ndarray | None, depth: int) -> Hits:
    """Drops each query's positives by id, and what is not in the pool, and keeps `depth` places."""
    rows_QxK, scores_QxK = hits.rows_QxK.copy(), hits.scores_QxK.copy()
    for q, known in enumerate(positives):
        rows_QxK[q, np.isin(rows_QxK[q], known)] = NO_HIT
    if pool is not None:
        rows_QxK[~np.isin(rows_QxK, pool)] = NO_HIT
    order_QxK = np.argsort(rows_QxK == NO_HIT, axis=1, kind="stable")[:, :depth]
    rows_QxK = np.take_along_axis(rows_QxK, order_QxK, 1)
    scores_QxK = np.take_along_axis(scores_QxK, order_QxK, 1)
    return Hits(rows_QxK, np.where(rows_QxK == NO_HIT, -np.inf, scores_QxK))


def _dense_scores(
    rows_QxK: np.ndarray, positives: Sequence[np.ndarray], dense: Rescore | None
) -> tuple[np.ndarray, np.ndarray]:
    scores_QxK = np.full(rows_QxK.shape, np.nan, np.float32)
    positive_score_Q = np.full(len(rows_QxK), np.nan, np.float32)
    if dense:
        query_N, place_N = np.nonzero(rows_QxK != NO_HIT)
        scores_QxK[query_N, place_N] = dense(query_N, rows_QxK[query_N, place_N])
        for q, known in enumerate(positives):
            positive_score_Q[q] = dense(np.full(len(known), q), known).min()
    return scores_QxK, positive_score_Q


def mine(
    library: Library, training: Sequence[TrainingQuery], retrievers: Callable[[str], dict[str, Retriever]], config: Any,
    out_dir: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Mines every language with training queries; returns counts per language."""
    counts: dict[str, Any] = {}
    first_row = 0  # of the language's queries among those of all languages
    for index, lang in enumerate(library.langs):
        queries = [q for q in training if q.lang == index and not q.held_out]
        if queries:
            rows = np.array([q.row - first_row for q in queries])
            collection = library.collections[index]
            mined = mine_language(
                queries, rows, int(library.bases[index]), retrievers(lang), config, collection, lang, out_dir
            )
            counts[lang] = {"queries": len(queries), "candidates": int((mined.rows_QxK != NO_HIT).sum())}
        first_row += len(library.queries(lang, "train")[0])
    if not counts:
        raise UserError(
            "data.root: no language has a training query with a positive in its corpus; add train/{lang}.jsonl, or "
            "topics/{lang}.train.tsv with qrels/{lang}.train.tsv"
        )
    return counts


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("mine", __doc__)
