"""The figures of several systems over the queries of a split, and the files that hold them.

metrics.json         {split: {"systems": {system: {measure: {"avg", lang}}}}}
intervals.json       {split: {system: {measure: [low, high]}}}: bootstrap intervals of the averages
judged.json          {split: {system: {measure: {"avg", lang}}}}: the unjudged shares of `UNJUDGED`
significance.json    {split: {measure: {system: {baseline: {"avg" | lang: Comparison}}}}}
SPLIT.queries.tsv    lang, qid, system and its measures, one line a query and system
"""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from jdmdr import metrics, significance
from jdmdr.metrics import AVERAGE, Qrels, Run
from jdmdr.types import UserError
from jdmdr.workdir import atomic, read_json, write_json

MEASURES = ("ndcg@10", "recall@100", "mrr@10", "map")
TESTED = ("ndcg@10", "recall@100")  # measures with an interval and with tests; those that a recipe adds have them too
UNJUDGED = {
    "hole@10": 10,
    "unjudged@100": 100,
    "hole": None,
}  # share of unjudged passages among the first hits; None: all
DECIMALS = 6
QUERIES = ".queries.tsv"
COLUMNS = ("lang", "qid", "system")  # and the measures


class Scores:
    """Per-query values of a split: `values[system][measure][lang]` in the order of `qids[lang]`."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        """`more` are measures beside MEASURES, or some of those that are to be tested as well."""
        self.measures = tuple(dict.fromkeys((*MEASURES, *more)))
        self.tested = tuple(dict.fromkeys((*TESTED, *more)))
        self.qids: dict[str, list[str]] = {}
        self.values: dict[str, dict[str, dict[str, np.ndarray]]] = {}
        self.unjudged: dict[str, dict[str, dict[str, float]]] = {}

    def add(
        self, lang: str, qrels: Qrels, runs: Mapping[str, Run], ranks: Mapping[str, metrics.Ranks] | None = None
    ) -> None:
        """Scores the runs of one language; the systems are the same for every language. `ranks` are those of systems
        whose runs came with ranks instead of scores."""
        self.qids[lang] = list(qrels)
        for system, run in runs.items():
            own = ranks.get(system) if ranks else None
            for measure, by_qid in metrics.evaluate_run(qrels, run, self.measures, own).items():
                of = self.values.setdefault(system, {}).setdefault(measure, {})
                of[lang] = np.array([by_qid[qid] for qid in self.qids[lang]])
            for measure, depth in UNJUDGED.items():
                shares = list(metrics.unjudged_share(qrels, run, depth).values())
                if shares:
                    self.unjudged.setdefault(system, {}).setdefault(measure, {})[lang] = float(np.mean(shares))

    def table(self) -> dict[str, dict[str, dict[str, float]]]:
        """`{system: {measure: {lang: mean, "avg": macro average}}}`."""
        return {
            system: {measure: _with_average({lang: float(np.mean(v)) for lang, v in by_lang.items()})
                     for measure, by_lang in of.items()}
            for system, of in self.values.items()
        }  # fmt: skip

    def unjudged_table(self) -> dict[str, dict[str, dict[str, float]]]:
        return {
            system: {measure: _with_average(by_lang) for measure, by_lang in of.items()}
            for system, of in self.unjudged.items()
        }


def write(found: Mapping[str, Scores], out_dir: pathlib.Path, seed: int, samples: int) -> None:
    """Writes the files above; `samples` are those of the intervals."""
    write_json(out_dir / "metrics.json", rounded({split: {"systems": of.table()} for split, of in found.items()}))
    intervals = {
        split: {
            system: {m: list(metrics.bootstrap_interval(by_measure[m], seed, samples)) for m in of.tested}
            for system, by_measure in of.values.items()
        }
        for split, of in found.items()
    }
    write_json(out_dir / "intervals.json", rounded(intervals))
    write_json(out_dir / "judged.json", rounded({split: of.unjudged_table() for split, of in found.items()}))
    tests = {split: significance.table(of.values, of.tested, seed) for split, of in found.items()}
    write_json(out_dir / "significance.json", rounded(tests))
    for split, of in found.items():
        write_queries(out_dir / queries_file(split), of)


def averages(directory: pathlib.Path) -> str:
    """The averages of an evaluation as a table: a line for each split and system."""
    rows, measures = [], MEASURES
    for split, systems in read_json(directory / "metrics.json").items():
        for system, of in systems["systems"].items():
            measures = in_order(of)  # the same for all
            rows.append([split, system, *(f"{of[measure][AVERAGE]:.3f}" for measure in measures)])
    return tabulate(rows, ["split", "system", *measures], disable_numparse=True, stralign="right")


def in_order(measures: Iterable[str]) -> list[str]:
    """MEASURES first, then the others by name."""
    return [*MEASURES, *sorted(set(measures) - {*MEASURES})]


def queries_file(split: str) -> str:
    return f"{split}{QUERIES}"


def qrels_file(split: str, lang: str) -> str:
    return f"{split}.{lang}.qrels"


def write_queries(path: pathlib.Path, scores: Scores) -> None:
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as handle:
        rows = csv.writer(handle, "excel-tab", lineterminator="\n")
        rows.writerow((*COLUMNS, *scores.measures))
        for lang, qids in scores.qids.items():
            for i, qid in enumerate(qids):
                for system, of in scores.values.items():
                    rows.writerow([lang, qid, system, *(f"{of[m][lang][i]:.{DECIMALS}f}" for m in scores.measures)])


def read_queries(path: pathlib.Path) -> Scores:
    """What `write_queries` wrote; raises UserError with the line on anything else."""
    lists: dict[tuple[str, str, str], list[float]] = {}
    with open(path, encoding="utf-8", newline="") as handle:
        rows = csv.reader(handle, "excel-tab")
        head = next(rows, [])
        measures = head[len(COLUMNS) :]
        if head[: len(COLUMNS)] != list(COLUMNS) or measures[: len(MEASURES)] != list(MEASURES):
            raise UserError(f"{path}: the first line is not {' '.join(COLUMNS + MEASURES)}; run jdmdr.evaluate again")
        scores = Scores(measures[len(MEASURES) :])
        asked: dict[tuple[str, str], list[str]] = {}  # of each system and language
        for number, row in enumerate(rows, 2):
            try:
                lang, qid, system, *values = row
                numbers = [float(value) for value in values]
                if len(numbers) != len(measures):
                    raise ValueError
            except ValueError:
                raise UserError(f"{path}, line {number}: found {row} instead of {' '.join(head)}; run jdmdr.evaluate "
                                "again") from None  # fmt: skip
            asked.setdefault((system, lang), []).append(qid)
            for measure, value in zip(measures, numbers, strict=True):
                lists.setdefault((system, measure, lang), []).append(value)
    for (_, lang), qids in asked.items():
        if scores.qids.setdefault(lang, qids) != qids:
            raise UserError(
                f"{path}: the systems have other queries of {lang} than each other; run jdmdr.evaluate again"
            )
    for (system, measure, lang), values in lists.items():
        scores.values.setdefault(system, {}).setdefault(measure, {})[lang] = np.array(values)
    return scores


def rounded(value: Any) -> Any:
    """The value with its numbers to six decimals, dataclasses as mappings."""
    if dataclasses.is_dataclass(value):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, DECIMALS) if isinstance(value, float) else value


def _with_average(means: Mapping[str, float]) -> dict[str, float]:
    return {**means, AVERAGE: metrics.macro_average(means)}
