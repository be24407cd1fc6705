"""The faiss mining script: runs of several retrievers over the training queries, fused to one list of candidates.

    python -m jdmdr.mine --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

`mine.retrievers` names the ensemble (jdmdr/retrievers.py). For each language this writes one TREC run per retriever and
one of the ensemble, the candidates (positives dropped by id), and every retriever's scores of the candidates and of the
positives, as arrays. With `mine.fusion=concat` the dense retrievers are one index over their concatenated vectors.

    python -m jdmdr.mine --follow WORKDIR

mines beside a run that trains, again with each of its checkpoints (jdmdr/follow.py, docs/ance.md).
"""

from __future__ import annotations

import pathlib
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr import metrics, processes, retrievers
from jdmdr.corpus import Collection
from jdmdr.index.fusion import concat_vectors, fuse, inverse_sigma_weights
from jdmdr.library import Library, TrainingQuery, docid_lookup, used_in_training
from jdmdr.retrievers import ENSEMBLE, Retriever, Vectors
from jdmdr.types import NO_HIT, Hits, UserError

CONCAT = "concat"
SIGMA_DEPTH = 200  # hits of a query that a retriever's spread of scores is taken over
SIGMA_QUERIES = 200  # training queries a language
_CONCAT_ROWS = 65_536  # passages concatenated at a time

# language -> {name: retriever}, in the order of mine.retrievers
Open = Callable[[str], Mapping[str, Retriever]]


def candidate_pool(queries: Sequence[TrainingQuery], base: int, pool: str) -> np.ndarray | None:
    """Rows of the collection that may be negatives, ascending; None for all of them.

    With `positives` a query's negatives are other queries' positives, so that no passage is met as a negative only. In a
    small collection a model otherwise learns which passages have no training query.
    """
    if pool not in ("corpus", "positives"):
        raise UserError(f"mine.pool is {pool!r}; it is one of corpus, positives")
    return None if pool == "corpus" else np.unique(np.concatenate([q.positives for q in queries])) - base


class Mined(NamedTuple):
    """Candidates of one language's training queries, best first; rows of its collection, `NO_HIT` behind.

    `by_retriever` holds, in the order of mine.retrievers, the scores of the candidates, QxK, and of the query's
    positives, QxM, by each retriever; NaN where there is no passage and where it did not score one: BM25 and runs made
    elsewhere know only what they list.
    """

    rows_QxK: np.ndarray  # int64
    scores_QxK: np.ndarray  # float32, of the fused list
    by_retriever: dict[str, tuple[np.ndarray, np.ndarray]]

    def dense(self, specs: Sequence[retrievers.Spec]) -> tuple[np.ndarray, np.ndarray]:
        """By the first dense retriever of the ensemble, the scores of the candidates, QxK, and the lowest of each query's
        positives, Q; NaN without one."""
        name = next((spec.name for spec in specs if spec.dense), None)
        if name is None:
            return np.full(self.rows_QxK.shape, np.nan, np.float32), np.full(len(self.rows_QxK), np.nan, np.float32)
        candidates_QxK, positives_QxM = self.by_retriever[name]
        return np.asarray(candidates_QxK), np.nanmin(positives_QxM, axis=1)


def mine_language(
    queries: Sequence[TrainingQuery], rows: np.ndarray, base: int, ensemble: Mapping[str, Retriever], config: Any,
    weights: Sequence[float], collection: Collection, lang: str, out_dir: pathlib.Path, both: Retriever | None,
) -> Mined:  # fmt: skip
    """Mines one language and writes its runs, candidates and scores to `out_dir`.

    Args:
      queries: its training queries; `rows` are their rows among the split's queries.
      base: global row of the collection's first passage.
      weights: one a retriever of `ensemble`.
      both: the dense retrievers as one, which then gives the ensemble's list.
    """
    most_positives = max(len(q.positives) for q in queries)
    depth = config.depth + most_positives
    lists = {name: retriever.search(rows, depth) for name, retriever in ensemble.items()}
    rescore = [retriever.rescore(rows) for retriever in ensemble.values()]
    fused = both.search(rows, depth) if both else fuse(list(lists.values()), config.fusion, weights, depth, rescore)
    runs = {**lists, ENSEMBLE: fused}
    docid = docid_lookup(collection, runs.values())
    for name, hits in runs.items():
        metrics.write_run(out_dir / f"{lang}.{name}.trec", [q.qid for q in queries], hits, docid, name)
    positives = [q.positives - base for q in queries]
    candidates = _usable(fused, positives, candidate_pool(queries, base, config.pool), config.depth)
    positives_QxM = np.full((len(queries), most_positives), NO_HIT)
    for q, known in enumerate(positives):
        positives_QxM[q, : len(known)] = known
    by_retriever = {}
    for (name, hits), exact in zip(lists.items(), rescore, strict=True):
        score = exact or _listed(hits)
        by_retriever[name] = _scores(candidates.rows_QxK, score), _scores(positives_QxM, score)
        for kind, values in zip(SCORES, by_retriever[name], strict=True):
            np.save(out_dir / f"{lang}.{name}.{kind}.npy", values)
    for field, values in candidates._asdict().items():
        np.save(out_dir / f"{lang}.{field}.npy", values)
    (out_dir / f"{lang}.qids.txt").write_text("".join(f"{q.qid}\n" for q in queries), encoding="utf-8")
    return Mined(*candidates, by_retriever)


SCORES = ("candidate_scores", "positive_scores")


def read_mined(directory: pathlib.Path, lang: str, names: Sequence[str]) -> Mined:
    """What `mine_language` wrote, memory-mapped; `names` are the retrievers'."""

    def load(stem: str) -> np.ndarray:
        return np.load(directory / f"{lang}.{stem}.npy", mmap_mode="r")

    by_retriever = {name: tuple(load(f"{name}.{kind}") for kind in SCORES) for name in names}
    return Mined(*(load(field) for field in Hits._fields), by_retriever)


def _listed(hits: Hits) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Scores of pairs as far as a list has them, else NaN."""
    span = int(hits.rows_QxK.max(initial=0)) + 2
    place_QxK = np.arange(len(hits.rows_QxK))[:, None] * span + hits.rows_QxK + 1  # an empty place is row 0 of a query
    order = np.argsort(place_QxK, axis=None)
    places, scores = place_QxK.ravel()[order], hits.scores_QxK.ravel()[order]

    def score(query_N: np.ndarray, row_N: np.ndarray) -> np.ndarray:
        wanted = query_N * span + row_N + 1
        at = np.minimum(np.searchsorted(places, wanted), len(places) - 1)
        return np.where((places[at] == wanted) & (row_N < span - 1), scores[at], np.nan)

    return score


def _scores(rows_QxN: np.ndarray, score: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """float32 QxN, NaN at empty places."""
    scores_QxN = np.full(rows_QxN.shape, np.nan, np.float32)
    query_N, place_N = np.nonzero(rows_QxN != NO_HIT)
    scores_QxN[query_N, place_N] = score(query_N, rows_QxN[query_N, place_N])
    return scores_QxN


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


def mine(
    library: Library, training: Sequence[TrainingQuery], open_ensemble: Open, config: Any, out_dir: pathlib.Path,
    search_vectors: Callable[[Vectors], Retriever],
) -> dict[str, Any]:  # fmt: skip
    """Mines every language with training queries; returns counts per language and the ensemble's weights.

    Args:
      search_vectors: a retriever over vectors, for the concatenated ones.
    """
    work = _work(library, training)
    if not work:
        raise UserError(
            "data.root: no language has a training query with a positive in its corpus; add train/{lang}.jsonl, or "
            "topics/{lang}.train.tsv with qrels/{lang}.train.tsv"
        )
    weights = config.weights
    if config.fusion == CONCAT and not weights:
        weights = processes.from_first(lambda: _sigma_weights(library, work, open_ensemble))
    names = [spec.name for spec in retrievers.parse(config.retrievers)]
    weights = weights or [1.0] * len(names)
    for index, queries, rows in processes.claimed(work):
        lang, collection = library.langs[index], library.collections[index]
        ensemble = open_ensemble(lang)
        with tempfile.TemporaryDirectory(prefix=".concat.", dir=out_dir) as scratch:
            both = None
            if config.fusion == CONCAT:
                vectors = [retriever.vectors for retriever in ensemble.values()]
                joined = concat_vectors([v.queries_QxD for v in vectors], weights)
                passages = concatenated([v.blocks for v in vectors], weights, pathlib.Path(scratch) / "passages.npy")
                both = search_vectors(Vectors(joined, [passages]))
            mine_language(
                queries, rows, int(library.bases[index]), ensemble, config, weights, collection, lang, out_dir, both,
            )  # fmt: skip
    counts = {}
    for index, queries, _ in work:
        mined = read_mined(out_dir, library.langs[index], [])
        counts[library.langs[index]] = {"queries": len(queries), "candidates": int((mined.rows_QxK != NO_HIT).sum())}
    return {"languages": counts, "weights": dict(zip(names, weights, strict=True))}


def _work(library: Library, training: Sequence[TrainingQuery]) -> list[tuple[int, list[TrainingQuery], np.ndarray]]:
    """(language, its training queries, their rows among its queries) where there are any."""
    out = []
    first_row = 0  # of the language's queries among those of all languages
    for index, lang in enumerate(library.langs):
        queries = used_in_training(training, index)
        if queries:
            out.append((index, queries, np.array([q.row - first_row for q in queries])))
        first_row += len(library.queries(lang, "train")[0])
    return out


def _sigma_weights(library: Library, work: Sequence[tuple], open_ensemble: Open) -> list[float]:
    samples = [_cosines(open_ensemble(library.langs[index]), rows[:SIGMA_QUERIES]) for index, _, rows in work]
    return [float(w) for w in inverse_sigma_weights([np.concatenate(of) for of in zip(*samples, strict=True)])]


def _cosines(ensemble: Mapping[str, Retriever], rows: np.ndarray) -> list[np.ndarray]:
    """Each dense retriever's cosines of its own first hits for these queries, flat."""
    found = []
    for retriever in ensemble.values():
        hits = retriever.search(rows, SIGMA_DEPTH)
        query_N, place_N = np.nonzero(hits.rows_QxK != NO_HIT)
        row_N = hits.rows_QxK[query_N, place_N]
        queries_QxD, norm_C = retriever.vectors.queries_QxD[rows], _norms(retriever.vectors.blocks)
        length_N = np.linalg.norm(queries_QxD, axis=1)[query_N] * norm_C[row_N]
        found.append(retriever.rescore(rows)(query_N, row_N) / np.where(length_N > 0, length_N, 1))
    return found


def _norms(blocks: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(
        [
            np.linalg.norm(block[first : first + _CONCAT_ROWS].astype(np.float32), axis=1)
            for block in blocks
            for first in range(0, len(block), _CONCAT_ROWS)
        ]
    )


def concatenated(blocks: Sequence[Sequence[np.ndarray]], weights: Sequence[float], path: pathlib.Path) -> np.ndarray:
    """The weighted concatenation (`concat_vectors`) of several encoders' vectors of one collection, mapped to `path`."""
    rows = sum(map(len, blocks[0]))
    width = sum(of[0].shape[1] for of in blocks)
    passages_CxD = np.lib.format.open_memmap(path, "w+", np.float32, (rows, width))
    for first in range(0, rows, _CONCAT_ROWS):
        parts = [_rows(of, first, min(first + _CONCAT_ROWS, rows)) for of in blocks]
        passages_CxD[first : first + _CONCAT_ROWS] = concat_vectors(parts, weights)
    return passages_CxD


def _rows(blocks: Sequence[np.ndarray], start: int, stop: int) -> np.ndarray:
    """Rows [start, stop) of a collection held as blocks."""
    parts = []
    for block in blocks:
        parts.append(block[max(start, 0) : max(stop, 0)])
        start, stop = start - len(block), stop - len(block)
    return np.concatenate(parts)


if __name__ == "__main__":
    if any(word.lstrip("-").partition("=")[0] == "follow" for word in sys.argv[1:]):
        from jdmdr import follow

        follow.command(__doc__)
    else:
        from jdmdr import pipeline

        pipeline.command("mine", __doc__)
