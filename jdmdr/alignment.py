"""Whether translations lie together: two languages' queries and passages on one map, and in figures."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jdmdr import encode, pictures
from jdmdr.library import Library
from jdmdr.splits import Split

PAIRS = 60  # queries of each language on the map
FEWEST = 12  # points of a map
NEIGHBOURS = 10
QUERIES, PASSAGES = "queries", "passages"


class Pairs(NamedTuple):
    """What is there in two languages under equal ids."""

    langs: tuple[str, str]
    topics: str  # of the queries
    rows: Mapping[str, tuple[np.ndarray, np.ndarray]]  # kind: row of each pair in one language, in the other


class Panel(NamedTuple):
    points: dict[str, np.ndarray]  # "LANG KIND": Nx2
    figures: dict[str, dict[str, float]]  # kind: `figures`


def choose(library: Library, split: Split, source: str, shown: str) -> Pairs | None:
    """Queries of the split, and the passages relevant to them, in the source language and another one: the first of `shown`,
    separated by commas, or else of all, that has enough of them for a map. None without any."""
    if source not in library.langs:
        return None
    for other in dict.fromkeys([*shown.split(","), *library.langs]):
        if other in library.langs and other != source:
            rows = _rows(library, split, source, other)
            if 2 * sum(len(own) for own, _ in rows.values()) >= FEWEST:
                return Pairs((source, other), split.topics, rows)
    return None


def _rows(library: Library, split: Split, *langs: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    places = [{qid: row for row, qid in enumerate(library.queries(lang, split.topics)[0])} for lang in langs]
    both = [qid for qid in places[0] if qid in places[1]]
    both = both[:: max(1, len(both) // PAIRS)][:PAIRS]
    judged = library.qrels(langs[0], split.qrels)
    docids = dict.fromkeys(docid for qid in both for docid, rel in judged.get(qid, {}).items() if rel > 0)
    collections = [library.collections[library.langs.index(lang)] for lang in langs]
    rows_2xN = np.stack([collection.rows([*docids]) for collection in collections])
    rows_2xN = rows_2xN[:, (rows_2xN >= 0).all(axis=0)]
    found = {QUERIES: tuple(np.array([of[qid] for qid in both], np.int64) for of in places), PASSAGES: tuple(rows_2xN)}
    return {kind: rows for kind, rows in found.items() if len(rows[0])}


def panel(embeddings: pathlib.Path, pairs: Pairs, seed: int) -> Panel:
    """The map and the figures of an embedding stage."""
    vectors = {}
    for kind, rows in pairs.rows.items():
        for lang, of in zip(pairs.langs, rows, strict=True):
            if kind == PASSAGES:
                found_NxD = encode.passage_vectors(embeddings / lang, of)
            else:
                found_NxD = encode.gather_rows(encode.shards(embeddings / lang, f"queries.{pairs.topics}"), of)
            norms_Nx1 = np.linalg.norm(found_NxD, axis=1, keepdims=True)
            vectors[f"{lang} {kind}"] = found_NxD / np.where(norms_Nx1 > 0, norms_Nx1, 1)
    ends = np.cumsum([len(of) for of in vectors.values()])
    points = np.split(tsne(np.concatenate([*vectors.values()]), seed), ends[:-1])
    return Panel(
        dict(zip(vectors, points, strict=True)),
        {kind: figures(*(vectors[f"{lang} {kind}"] for lang in pairs.langs)) for kind in pairs.rows},
    )


def picture(name: str, panels: Mapping[str, Panel], pairs: Pairs) -> str:
    points = {title: panel.points for title, panel in panels.items()}
    return pictures.translations(name, points, pairs.langs, list(pairs.rows))


def figures(one_NxD: np.ndarray, other_NxD: np.ndarray) -> dict[str, float]:
    """Mean cosine of translations and of other pairs; the share of each vector's nearest that is in its own language, of
    which half would be no preference.

    Args:
      one_NxD, other_NxD: unit vectors; row i of one is the translation of row i of the other.
    """
    N = len(one_NxD)
    scores_NxN = one_NxD @ other_NxD.T
    both_MxD = np.concatenate([one_NxD, other_NxD])
    near_MxM = both_MxD @ both_MxD.T
    np.fill_diagonal(near_MxM, -np.inf)
    nearest_MxK = np.argsort(-near_MxM, axis=1)[:, : min(NEIGHBOURS, 2 * N - 1)]
    own_MxK = (nearest_MxK >= N) == (np.arange(2 * N) >= N)[:, None]
    others = (scores_NxN.sum() - np.trace(scores_NxN)) / max(N * (N - 1), 1)
    return {"translations": float(np.trace(scores_NxN) / N), "others": float(others), "own": float(own_MxK.mean())}


def tsne(vectors_NxD: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, JMLR 2008), Nx2."""
    from sklearn.manifold import TSNE

    # The exact method: Barnes-Hut adds up in the order in which threads end.
    perplexity = min(30, len(vectors_NxD) // 4)
    reducer = TSNE(perplexity=perplexity, init="pca", method="exact", max_iter=500, random_state=seed)
    return reducer.fit_transform(vectors_NxD)
