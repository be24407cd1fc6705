"""Retrieval metrics as trec_eval defines them, their averages and intervals, and TREC run files."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pytrec_eval

from jdmdr.reading import lines
from jdmdr.types import NO_HIT, Hits, UserError

Qrels = dict[str, dict[str, int]]  # qid -> docid -> relevance
Run = dict[str, dict[str, float]]  # qid -> docid -> score

AVERAGE = "avg"  # the macro average's name among the languages

_TREC_NAMES = {"ndcg": "ndcg_cut_{}", "recall": "recall_{}", "mrr": "recip_rank"}
_BLOCK = 1 << 22  # values drawn at once


def evaluate_run(
    qrels: Qrels, run: Run, measures: Sequence[str] = ("ndcg@10", "recall@100", "mrr@10", "map")
) -> dict[str, dict[str, float]]:
    """{measure: {qid: value}} by trec_eval (pytrec_eval), for every query of the qrels.

    The mean of the values is that of `trec_eval -c`: a query absent from the run counts 0, and so does one without a
    relevant judgment; queries that only the run has are left out. Measures are ndcg@k, recall@k, mrr@k and map;
    relevance counts from 1.

    trec_eval holds scores as float32 and orders equal ones by docid, descending. float32 scores that differ, as in
    `Hits`, keep their order; among equal ones docids decide here, not rows.
    """
    scores = {qid: {docid: float(score) for docid, score in run.get(qid, {}).items()} for qid in qrels}
    values = {}
    for measure in measures:
        match = re.fullmatch(r"(ndcg|recall|mrr)@([1-9]\d*)|map", measure)
        if not match:
            raise UserError(f"measure is {measure!r}: choose from ndcg@k, recall@k, mrr@k and map, such as ndcg@10")
        kind, depth = match.groups()
        name = _TREC_NAMES[kind].format(depth) if kind else "map"
        seen = scores
        if kind == "mrr":
            seen = {qid: {docid: hits[docid] for docid in ranked(hits, int(depth))} for qid, hits in scores.items()}
        results = pytrec_eval.RelevanceEvaluator(qrels, {name}).evaluate(seen)
        values[measure] = {qid: results[qid][name] for qid in qrels}
    return values


def ranked(hits: Mapping[str, float], depth: int) -> list[str]:
    """The first `depth` docids in trec_eval's order."""
    scores = np.fromiter(hits.values(), np.float32, len(hits)).tolist()
    return [docid for _, docid in sorted(zip(scores, hits, strict=True), reverse=True)[:depth]]


def unjudged_share(qrels: Qrels, run: Run, depth: int) -> dict[str, float]:
    """The hole rate: for every query of the qrels that finds something, the share of its first `depth` hits that nobody
    judged."""
    shares = {}
    for qid, judged in qrels.items():
        if found := ranked(run.get(qid, {}), depth):
            shares[qid] = sum(docid not in judged for docid in found) / len(found)
    return shares


def macro_average(means: Mapping[str, float]) -> float:
    """The unweighted mean of one figure a language, as MIRACL reports it."""
    return float(np.mean(list(means.values())))


def bootstrap_interval(
    per_query: Mapping[str, np.ndarray], seed: int, samples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap interval (Efron 1979) of the macro average over languages.

    `per_query[lang]` holds one value a query; queries are drawn with replacement within each language.
    """
    rng = np.random.default_rng(seed)
    means_LxS = [bootstrap_means(np.asarray(per_query[lang], np.float64), rng, samples) for lang in sorted(per_query)]
    low, high = np.quantile(np.mean(means_LxS, axis=0), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_means(values_Q: np.ndarray, rng: np.random.Generator, samples: int) -> np.ndarray:
    """The means of `samples` draws with replacement, each as large as the values; of every column where there are
    several."""
    queries = len(values_Q)
    means = []
    for first in range(0, samples, max(1, _BLOCK // queries)):
        rows = min(samples - first, max(1, _BLOCK // queries))
        drawn = rng.integers(queries, size=(rows, queries)) + queries * np.arange(rows)[:, None]
        counts_SxQ = np.bincount(drawn.ravel(), minlength=rows * queries).reshape(rows, queries)
        means.append(counts_SxQ @ values_Q / queries)
    return np.concatenate(means)


def write_run(path: str | os.PathLike, qids: Sequence[str], hits: Hits, docid: Callable[[int], str], tag: str) -> None:
    """Writes hits of one language as a TREC run, `qid Q0 docid rank score tag`, ranks from 1, by an atomic rename.

    `docid(row)` names a row. Nine digits keep float32 scores exact, so another reader sees our order; among equal
    scores the rank is ours (lower row first), while trec_eval ignores ranks and puts the higher docid first.
    """
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        for qid, rows_K, scores_K in zip(qids, hits.rows_QxK.tolist(), hits.scores_QxK.tolist(), strict=True):
            for rank, (row, score) in enumerate(zip(rows_K, scores_K, strict=True), 1):
                if row == NO_HIT:
                    break
                fields = [qid, "Q0", docid(row), str(rank), f"{score:.9g}", tag]
                line = " ".join(fields)
                if line.split() != fields:
                    raise UserError(
                        f"{path}: the ids {qid!r}, {docid(row)!r} and the tag {tag!r} must be free of "
                        "blanks in a TREC run: rename them"
                    )
                file.write(line + "\n")
    os.replace(partial, path)


def write_qrels(path: str | os.PathLike, qrels: Qrels) -> None:
    """Writes TREC judgments, `qid Q0 docid rel`, by an atomic rename."""
    partial = f"{os.fspath(path)}.partial"
    with open(partial, "w", encoding="utf-8") as file:
        for qid, judged in qrels.items():
            file.writelines(f"{qid} Q0 {docid} {rel}\n" for docid, rel in judged.items())
    os.replace(partial, path)


def read_run(path: str | os.PathLike) -> dict[str, dict[str, float]]:
    """{qid: {docid: score}} of a TREC run; raises `UserError` with the line on a malformed one or a repeated docid."""
    run: dict[str, dict[str, float]] = {}
    for number, line in lines(path):
        fields = line.split()
        if len(fields) != 6:
            raise UserError(
                f"{path}, line {number}: found {len(fields)} fields instead of the 6 of a TREC run, "
                "qid Q0 docid rank score tag"
            )
        qid, _, docid, _, score, _ = fields
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UserError(f"{path}, line {number}: the score is {score!r}, give a finite number")
        hits = run.setdefault(qid, {})
        if docid in hits:
            raise UserError(f"{path}, line {number}: docid {docid!r} stands twice for query {qid!r}, keep one line")
        hits[docid] = value
    return run
