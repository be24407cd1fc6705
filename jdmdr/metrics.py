"""Retrieval metrics as trec_eval and MS MARCO define them, their averages and intervals, and run files."""

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
Ranks = dict[str, dict[str, int]]  # qid -> docid -> rank, from 1

AVERAGE = "avg"  # the macro average's name among the languages

LONGEST = 1000  # ranks a query that MS MARCO's script reads

_TREC_NAMES = {
    "ndcg": "ndcg_cut_{}",
    "p": "P_{}",
    "recall": "recall_{}",
    "mrr": "recip_rank",
    "map": "map",
    "map@": "map_cut_{}",
}
_MEASURE = re.compile(r"(ndcg|msmarco_mrr|(?:p|recall|mrr|map)(?:\(rel=[1-9]\))?)(?:@([1-9]\d*))?")
_BLOCK = 1 << 22  # values drawn at once


def evaluate_run(
    qrels: Qrels,
    run: Run,
    measures: Sequence[str] = ("ndcg@10", "recall@100", "mrr@10", "map"),
    ranks: Ranks | None = None,
) -> dict[str, dict[str, float]]:
    """{measure: {qid: value}} for every query of the qrels.

    ndcg@k (linear gain), p@k (precision), recall@k, mrr@k, map and map@k are trec_eval's (pytrec_eval). The mean of the values is that of
    `trec_eval -c`: a query absent from the run counts 0, and so does one without a relevant judgment; queries that only
    the run has are left out. Relevance counts from 1, or from R in recall(rel=R)@k, mrr(rel=R)@k and map(rel=R). map@k divides by all that is relevant.
    trec_eval holds scores as float32 and orders equal ones by docid, descending. float32 scores that differ, as in
    `Hits`, keep their order; among equal ones docids decide here, not rows.

    msmarco_mrr@k is that of MS MARCO's script: one over the rank of the first relevant passage, as the ranks are given,
    and the mean over the queries of the reference. `ranks` are those of a run in its form (`read_ranks`); without them a
    query's hits are ranked by score, equal ones as they stand.
    """
    scores = {qid: {docid: float(score) for docid, score in run.get(qid, {}).items()} for qid in qrels}
    values = {}
    for measure in measures:
        kind, level, depth = parse_measure(measure)
        if kind == "msmarco_mrr":
            given = {qid: hit_ranks(hits) for qid, hits in scores.items()} if ranks is None else ranks
            values[measure] = {qid: _reciprocal_rank(of, given.get(qid, {}), depth) for qid, of in qrels.items()}
            continue
        name = _TREC_NAMES["map@" if kind == "map" and depth else kind].format(depth)
        seen = scores
        if kind == "mrr":
            seen = {qid: {docid: hits[docid] for docid in ranked(hits, depth)} for qid, hits in scores.items()}
        results = pytrec_eval.RelevanceEvaluator(qrels, {name}, relevance_level=level).evaluate(seen)
        values[measure] = {qid: results[qid][name] for qid in qrels}
    return values


def parse_measure(measure: str) -> tuple[str, int, int | None]:
    """Kind, least relevance and cut of a measure; raises UserError for what is none."""
    match = _MEASURE.fullmatch(measure)
    if not match or (match[2] is None and not match[1].startswith("map")):
        raise UserError(
            f"measure is {measure!r}: choose from ndcg@k, p@k, recall@k, mrr@k, map, map@k and msmarco_mrr@k, such as ndcg@10; "
            "recall(rel=2)@k, mrr(rel=2)@k and map(rel=2) count relevance from 2"
        )
    kind, _, level = match[1].partition("(rel=")
    return kind, int(level.rstrip(")") or 1), int(match[2]) if match[2] else None


def parse_measures(text: str) -> tuple[str, ...]:
    """Measures separated by commas, each once."""
    names = tuple(dict.fromkeys(filter(None, (name.strip() for name in text.split(",")))))
    for name in names:
        parse_measure(name)
    return names


def hit_ranks(hits: Mapping[str, float]) -> dict[str, int]:
    """{docid: rank} by score; equal scores as they stand."""
    return {docid: rank for rank, docid in enumerate(sorted(hits, key=hits.__getitem__, reverse=True), 1)}


def _reciprocal_rank(judged: Mapping[str, int], ranks: Mapping[str, int], depth: int) -> float:
    first = min((ranks[docid] for docid, rel in judged.items() if rel > 0 and docid in ranks), default=depth + 1)
    return 1 / first if first <= depth else 0.0


def ranked(hits: Mapping[str, float], depth: int | None) -> list[str]:
    """The first `depth` docids in trec_eval's order; None: all."""
    scores = np.fromiter(hits.values(), np.float32, len(hits)).tolist()
    return [docid for _, docid in sorted(zip(scores, hits, strict=True), reverse=True)[:depth]]


def unjudged_share(qrels: Qrels, run: Run, depth: int | None) -> dict[str, float]:
    """The hole rate: for every query of the qrels that finds something, the share of its first `depth` hits (None: of all) that
    nobody judged."""
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


def read_run(path: str | os.PathLike) -> Run:
    """{qid: {docid: score}} of a TREC run; of a run in MS MARCO's form, whose scores are one over the rank; or of MS MARCO's
    candidates (top1000), lines `qid TAB docid TAB query TAB passage` in no order: one over a docid's place among its query's.

    Raises `UserError` with the line on a malformed one, and on a docid that a TREC run repeats.
    """
    first = next(iter(lines(path)), (0, ""))[1]
    if first.count("\t") == 3:
        return _read_candidates(path)
    if in_msmarco_form(path):
        return {qid: {docid: 1 / rank for docid, rank in of.items()} for qid, of in read_ranks(path)[0].items()}
    run: Run = {}
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


def _read_candidates(path: str | os.PathLike) -> Run:
    run: Run = {}
    for number, line in lines(path):
        fields = line.split("\t")
        if len(fields) != 4:
            raise UserError(
                f"{path}, line {number}: found {len(fields)} fields instead of the 4 of MS MARCO's candidates, qid TAB docid TAB "
                "query TAB passage"
            )
        hits = run.setdefault(fields[0], {})
        hits.setdefault(fields[1], 1 / (len(hits) + 1))
    return run


def in_msmarco_form(path: str | os.PathLike) -> bool:
    """Whether the first line of a run has the three fields of MS MARCO's form, qid, docid, rank."""
    return len(next(iter(lines(path)), (0, ""))[1].split()) == 3


def read_ranks(path: str | os.PathLike) -> tuple[Ranks, int]:
    """{qid: {docid: rank}} of a run in MS MARCO's form as its script reads one, and how often a query repeats a docid.

    The last of several lines for one rank counts, and of a repeated docid the first rank; ranks may have gaps. Raises
    `UserError` with the line on a malformed one, and on a rank beyond `LONGEST`, where the script gives up too.
    """
    places: dict[str, dict[int, str]] = {}
    for number, line in lines(path):
        fields = line.split()
        if len(fields) != 3:
            raise UserError(
                f"{path}, line {number}: found {len(fields)} fields instead of the 3 of an MS MARCO run, qid docid rank"
            )
        qid, docid, rank = fields
        if not re.fullmatch(r"[0-9]{1,9}", rank) or not 1 <= int(rank) <= LONGEST:
            raise UserError(f"{path}, line {number}: the rank is {rank!r}; ranks are whole numbers from 1 to {LONGEST}")
        places.setdefault(qid, {})[int(rank)] = docid
    ranks: Ranks = {}
    for qid, of in places.items():
        for rank in sorted(of):
            ranks.setdefault(qid, {}).setdefault(of[rank], rank)
    return ranks, sum(len(of) - len(ranks[qid]) for qid, of in places.items())
