"""Scores the mined candidates and their queries' positives by a cross-encoder, for the rules of `filters.cross_encoder`.

    cross_encoder/{lang}.candidate_scores.npy    float32 [Q, K], log-odds of being relevant, for the places of mine/
    cross_encoder/{lang}.positive_scores.npy     float32 [Q, M]

NaN where there is no passage, and behind the first `cross_encoder.depth` candidates. The scores are a stage of their own, so
that another margin costs no scoring.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import expit

from jdmdr import processes, progress
from jdmdr.corpus import Collection, passage_text
from jdmdr.filters.rules import Column
from jdmdr.library import Library, TrainingQuery, used_in_training
from jdmdr.mine import SCORES, read_mined
from jdmdr.types import NO_HIT
from jdmdr.workdir import atomic


def score(
    library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, scorer: Any, depth: int, out_dir: pathlib.Path
) -> dict[str, Any]:  # fmt: skip
    """Scores every language's candidates by a `pairs.Scorer`; a language that is done stays. Returns the counts of pairs."""
    langs = [(index, lang) for index, lang in enumerate(library.langs) if used_in_training(training, index)]
    for index, lang in processes.claimed(langs):
        queries = used_in_training(training, index)
        rows_QxK, rows_QxM = _rows(queries, int(library.bases[index]), mined_dir, lang, depth)
        paths = [out_dir / f"{lang}.{kind}.npy" for kind in SCORES]
        partial = out_dir / f".{lang}.scores"
        if not all(path.exists() for path in paths):
            texts = [query.text for query in queries]
            rows_QxN = np.concatenate([rows_QxK, rows_QxM], axis=1)
            scores_QxN = _score_rows(scorer, texts, rows_QxN, library.collections[index], lang, partial)
            for path, values in zip(paths, np.split(scores_QxN, [rows_QxK.shape[1]], axis=1), strict=True):
                with atomic(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, values)
        partial.unlink(missing_ok=True)
    counts = {}
    for index, lang in langs:
        rows = _rows(used_in_training(training, index), int(library.bases[index]), mined_dir, lang, depth)
        counts[lang] = sum(int((of != NO_HIT).sum()) for of in rows)
    return {"pairs": counts}


def _rows(
    queries: Sequence[TrainingQuery], base: int, mined_dir: pathlib.Path, lang: str, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the collection to score: the first `depth` candidates, QxK, and the positives, QxM; NO_HIT elsewhere."""
    rows_QxK = np.array(read_mined(mined_dir, lang, []).rows_QxK)
    rows_QxK[:, depth:] = NO_HIT
    rows_QxM = np.full((len(queries), max(len(q.positives) for q in queries)), NO_HIT)
    for q, query in enumerate(queries):
        rows_QxM[q, : len(query.positives)] = query.positives - base
    return rows_QxK, rows_QxM


def _score_rows(
    scorer: Any, queries: Sequence[str], rows_QxN: np.ndarray, collection: Collection, lang: str, path: pathlib.Path
) -> np.ndarray:
    from jdmdr import pairs  # late: it loads jax

    query_N, place_N = np.nonzero(rows_QxN != NO_HIT)
    scores_QxN = np.full(rows_QxN.shape, np.nan, np.float32)
    with progress.bar(None, f"  scoring {lang}", "pairs", total=len(query_N)) as bar:
        scores_QxN[query_N, place_N] = pairs.score_all(
            scorer, queries, query_N, rows_QxN[query_N, place_N],
            lambda rows: [passage_text(collection.passage(row)) for row in rows], path, bar,
        )  # fmt: skip
    return scores_QxN


def read(directory: pathlib.Path, lang: str) -> tuple[np.ndarray, np.ndarray]:
    """The probabilities of being relevant of a language's candidates, QxK, and positives, QxM."""
    candidates_QxK, positives_QxM = (np.load(directory / f"{lang}.{kind}.npy") for kind in SCORES)
    return expit(candidates_QxK), expit(positives_QxM)


def column(candidates_QxK: np.ndarray, positives_QxM: np.ndarray) -> Column:
    """What the rules compare: the candidates' scores, and the lowest of each query's positives."""
    return Column(candidates_QxK, np.nanmin(positives_QxM, axis=1))
