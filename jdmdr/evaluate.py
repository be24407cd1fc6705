"""Searches and evaluates: TREC runs, metrics per language and system, and their macro averages.

    python -m jdmdr.evaluate --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

The hybrid fuses the trained encoder with BM25; its weight is chosen on the held-out training queries alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdmdr import metrics, progress
from jdmdr.index.fusion import choose_weight, fuse
from jdmdr.library import TRAIN, Library, TrainingQuery, docid_lookup
from jdmdr.mine import BM25, Retriever
from jdmdr.types import NO_HIT, Hits
from jdmdr.workdir import write_json

MEASURES = ("ndcg@10", "recall@100", "mrr@10", "map")
SELECTION_MEASURE = "ndcg@10"
HYBRID = "hybrid"
WEIGHT_GRID = np.round(np.arange(0.0, 1.01, 0.05), 2).tolist()
DECIMALS = 6

# (system, language, split) -> retriever
Retrievers = Callable[[str, str, str], Retriever]


def evaluate(
    library: Library, training: Sequence[TrainingQuery], systems: Sequence[str], retrievers: Retrievers, config: Any,
    seed: int, out_dir: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates `systems` (BM25 first, the trained encoder last) and their hybrid on every judged split but `train`.

    Writes `{split}.{system}.{lang}.trec`, `metrics.json` ({split: {"systems": {system: {measure: {"avg", lang}}}}}) and
    `intervals.json` (bootstrap intervals of the averages). Languages without judged queries are left out of the averages.
    """
    weight = _hybrid_weight(library, training, systems[-1], retrievers, config)
    scores: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    work = [(split, index) for split in library.judged_splits() for index in range(len(library.langs))]
    left_out = set()
    for split, index in progress.bar(work, "  searching", "language splits"):
        lang = library.langs[index]
        qids, _ = library.queries(lang, split)
        qrels = library.qrels(lang, split)
        rows = np.array([row for row, qid in enumerate(qids) if qid in qrels], np.int64)
        if not len(rows):
            left_out.add(f"{lang} has no judged {split} query")
            continue
        depth = min(config.depth, len(library.collections[index]))
        hits = {name: retrievers(name, lang, split).search(rows, depth) for name in systems}
        hits[HYBRID] = fuse([hits[systems[-1]], hits[BM25]], config.hybrid, [weight, 1 - weight], depth)
        docid = docid_lookup(library.collections[index], hits.values())
        for name, found in hits.items():
            run_qids = [qids[row] for row in rows]
            metrics.write_run(out_dir / f"{split}.{name}.{lang}.trec", run_qids, found, docid, name)
            run = as_run(run_qids, found, docid)
            for measure, values in metrics.evaluate_run(qrels, run, MEASURES).items():
                scores.setdefault(split, {}).setdefault(name, {}).setdefault(measure, {})[lang] = list(values.values())
    if not scores:
        progress.say("  nothing to evaluate: no split but train has both topics and qrels (topics/{lang}.{split}.tsv)")
    for line in sorted(left_out):
        progress.say(f"  {line}: left out")
    table = {
        split: {
            "systems": {name: {m: _averages(values) for m, values in of.items()} for name, of in systems_of.items()}
        }
        for split, systems_of in scores.items()
    }
    for split, systems_of in scores.items():
        for name, of in systems_of.items():
            for measure in ("ndcg@10", "recall@100"):
                per_query = {lang: np.array(values) for lang, values in of[measure].items()}
                low, high = metrics.bootstrap_interval(per_query, seed, config.bootstrap)
                intervals.setdefault(split, {}).setdefault(name, {})[measure] = [
                    round(low, DECIMALS),
                    round(high, DECIMALS),
                ]
    write_json(out_dir / "metrics.json", table)
    write_json(out_dir / "intervals.json", intervals)
    held_out = sum(q.held_out for q in training)
    return {"hybrid_weight": weight, "held_out_queries": held_out, "splits": sorted(table)}


def as_run(qids: Sequence[str], hits: Hits, docid: Callable[[int], str]) -> dict[str, dict[str, float]]:
    """Hits as the nested mapping that the metrics read."""
    return {
        qid: {docid(int(row)): float(score) for row, score in zip(rows, scores, strict=True) if row != NO_HIT}
        for qid, rows, scores in zip(qids, hits.rows_QxK, hits.scores_QxK, strict=True)
    }


def ndcg_by_rows(positives: Sequence[np.ndarray], hits: Hits, langs: Sequence[int]) -> tuple[float, float]:
    """nDCG@10 with the queries' positives known by row, averaged over queries and then over languages; its standard
    error."""
    qrels = {str(i): {str(row): 1 for row in known} for i, known in enumerate(positives)}
    values = metrics.evaluate_run(qrels, as_run(list(qrels), hits, str), (SELECTION_MEASURE,))[SELECTION_MEASURE]
    per_lang: dict[int, list[float]] = {}
    for lang, value in zip(langs, values.values(), strict=True):
        per_lang.setdefault(lang, []).append(value)
    means = [np.mean(v) for v in per_lang.values()]
    error = np.sqrt(sum(np.var(v) / len(v) for v in per_lang.values())) / len(per_lang)
    return float(np.mean(means)), float(error)


def _averages(values: dict[str, list[float]]) -> dict[str, float]:
    means = {lang: float(np.mean(per_query)) for lang, per_query in values.items()}
    return {
        **{lang: round(v, DECIMALS) for lang, v in means.items()},
        "avg": round(metrics.macro_average(means), DECIMALS),
    }


def _hybrid_weight(
    library: Library, training: Sequence[TrainingQuery], name: str, retrievers: Retrievers, config: Any
) -> float:
    """The weight of the dense system, by `choose_weight` on the held-out training queries; 0.5 without any."""
    held_out = [q for q in training if q.held_out]
    if not held_out:
        return 0.5
    dense, lexical = [], []
    first_row = 0
    for index, lang in enumerate(library.langs):
        rows = np.array([q.row - first_row for q in held_out if q.lang == index], np.int64)
        first_row += len(library.queries(lang, TRAIN)[0])
        if len(rows):
            for system, lists in ((name, dense), (BM25, lexical)):
                found = retrievers(system, lang, TRAIN).search(rows, config.depth)
                lists.append(_global(found, int(library.bases[index]), config.depth))
    stacked = [Hits(*(np.concatenate(part) for part in zip(*lists, strict=True))) for lists in (dense, lexical)]
    positives, langs = [q.positives for q in held_out], [q.lang for q in held_out]
    return choose_weight(*stacked, lambda hits: ndcg_by_rows(positives, hits, langs), config.hybrid, WEIGHT_GRID)


def _global(hits: Hits, base: int, depth: int) -> Hits:
    """Hits by global row, padded to `depth` columns."""
    missing = ((0, 0), (0, depth - hits.rows_QxK.shape[1]))
    rows_QxK = np.where(hits.rows_QxK == NO_HIT, NO_HIT, hits.rows_QxK + base)
    return Hits(
        np.pad(rows_QxK, missing, constant_values=NO_HIT), np.pad(hits.scores_QxK, missing, constant_values=-np.inf)
    )


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("evaluate", __doc__)
