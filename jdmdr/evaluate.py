"""Searches and evaluates: TREC runs, metrics per language and system, and how sure they are.

    python -m jdmdr.evaluate --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

The hybrid fuses the trained encoder with BM25; its weight is chosen on the held-out training queries alone.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jdmdr import metrics, processes, progress, scores
from jdmdr.index.fusion import choose_weight, fuse
from jdmdr.language_bias import average, language_bias
from jdmdr.library import TRAIN, Library, TrainingQuery, docid_lookup
from jdmdr.metrics import Qrels, Run
from jdmdr.retrievers import BM25, Retriever
from jdmdr.splits import NONE, POOLED, TRAINING, Split, Target
from jdmdr.types import NO_HIT, Hits
from jdmdr.workdir import write_json

SELECTION_MEASURE = "ndcg@10"
HYBRID = "hybrid"
WEIGHT_GRID = np.round(np.arange(0.0, 1.01, 0.05), 2).tolist()

# (system, language, split) -> retriever
Retrievers = Callable[[str, str, Split], Retriever]


def evaluate(
    library: Library, training: Sequence[TrainingQuery], splits: Sequence[Split], systems: Sequence[str],
    retrievers: Retrievers, config: Any, seed: int, out_dir: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates `systems` (BM25 first, the trained encoder last) and their hybrid on every split.

    Writes `SPLIT.SYSTEM.LANG.trec`, `SPLIT.LANG.qrels`, the tables of `scores.write`, and for the splits over several
    languages `language_bias.json`. Languages without judged queries are left out of the averages; a split whose judgments
    are `none` has runs alone. A language of a split
    whose runs are all there is not searched again. Several processes divide the searches; the first does the rest.
    """
    weight = processes.from_first(lambda: _hybrid_weight(library, training, systems[-1], retrievers, config))
    names = (*systems, HYBRID)
    more = metrics.parse_measures(config.measures)
    found: dict[str, scores.Scores] = {}
    bias: dict[str, Any] = {}
    everything = [Target(library, lang, split) for split in splits for lang in library.langs]
    work = [target for target in everything if target.langs and target.qrels]

    def paths_of(target: Target) -> dict[str, pathlib.Path]:
        return {name: out_dir / f"{target.split.name}.{name}.{target.lang}.trec" for name in names}

    for target in processes.claimed(progress.bar(work, "  searching", "language splits")):
        if not all(path.exists() for path in paths_of(target).values()):
            _search(library, target, systems, retrievers, config, weight, paths_of(target))
    if not processes.leads():
        return {}
    for target in work:
        split, lang = target.split, target.lang
        if split.qrels == NONE:
            continue
        runs = {name: metrics.read_run(path) for name, path in paths_of(target).items()}
        metrics.write_qrels(out_dir / scores.qrels_file(split.name, lang), target.qrels)
        found.setdefault(split.name, scores.Scores(more)).add(lang, target.qrels, runs)
        if split.corpus in POOLED:
            for name, figures in _bias(target, runs, config.depth).items():
                bias.setdefault(split.name, {}).setdefault(name, {})[lang] = figures
    if not found and all(split.qrels != NONE for split in splits):
        progress.say("  nothing to evaluate: no split but train has both topics and qrels (topics/{lang}.{split}.tsv)")
    unjudged = {f"{t.lang} has no judged {t.split.name} query" for t in everything if t.langs and not t.qrels}
    for line in sorted(unjudged):
        progress.say(f"  {line}: left out")
    scores.write(found, out_dir, seed, config.bootstrap)
    if bias:
        for of_split in bias.values():
            for by_lang in of_split.values():
                by_lang[metrics.AVERAGE] = average(by_lang)
        write_json(out_dir / "language_bias.json", scores.rounded(bias))
    held_out = sum(q.held_out for q in training)
    return {"hybrid_weight": weight, "held_out_queries": held_out, "splits": sorted(found)}


def _search(
    library: Library, target: Target, systems: Sequence[str], retrievers: Retrievers, config: Any, weight: float,
    paths: dict[str, pathlib.Path],
) -> None:  # fmt: skip
    """Writes the runs of all systems and of the hybrid for one language of a split."""
    split, lang = target.split, target.lang
    qids, _ = library.queries(lang, split.topics)
    rows = np.array([row for row, qid in enumerate(qids) if qid in target.qrels], np.int64)
    depth = min(config.depth, len(target))
    hits = {name: retrievers(name, lang, split).search(rows, depth) for name in systems}
    hits[HYBRID] = fuse([hits[systems[-1]], hits[BM25]], config.hybrid, [weight, 1 - weight], depth)
    docid = docid_lookup(target, hits.values())
    asked = [qids[row] for row in rows]
    for name, found in hits.items():
        metrics.write_run(paths[name], asked, found, docid, name)


def _bias(target: Target, runs: dict[str, Run], depth: int) -> dict[str, Any]:
    qrels: Qrels = target.qrels
    names = sorted({name for by_qid in (qrels, *runs.values()) for of_query in by_qid.values() for name in of_query})
    languages = dict(zip(names, target.languages(names), strict=True))
    depth = min(depth, len(target))
    return {
        system: language_bias(qrels, run, languages, target.lang, target.langs, depth) for system, run in runs.items()
    }


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
                found = retrievers(system, lang, TRAINING).search(rows, config.depth)
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

    pipeline.command("evaluate", __doc__, lambda directory: print(scores.averages(directory)))
