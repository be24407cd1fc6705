"""Runs a list of recipes over several seeds and tells which parts matter: the ablation tables.

    python -m jdmdr.ablate --config configs/ablation.py --workdir runs/ablation --config.data.root=DIR

Every row and seed is a working directory of the ordinary pipeline, `cells/ROW-SEED/`; a stage that another cell has
finished with the same settings and inputs is linked instead of done again. A second run goes on where the first stopped.
A row whose `encoder.name` is `row:NAME` starts from what that row, which stands before it, ended with; it is compared with
that row, and the others with the reference.
Writes `ablation.md` and `ablation.json`.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import cli, processes, progress, scores, significance, workdir
from jdmdr.metrics import AVERAGE
from jdmdr.types import UserError

MEASURES = ("ndcg@10", "mrr@10", "recall@100")
TITLES = {"ndcg@10": "nDCG@10", "mrr@10": "MRR@10", "recall@100": "Recall@100"}
FROM_ROW = "row:"
ALPHA = 0.05
SERVER = "needs a server"


class Row(NamedTuple):
    """A line of the tables: the recipe with these keys overridden."""

    table: str
    name: str
    overrides: Mapping[str, Any]
    model: bool = False  # whether a language model judges and tops up; it is left out where llm.base_url is empty

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @property
    def start(self) -> str | None:
        """The name of the row whose encoder this one starts from."""
        name = self.overrides.get("encoder.name", "")
        return name.removeprefix(FROM_ROW) if name.startswith(FROM_ROW) else None


def ablate(config: ConfigDict, directory: pathlib.Path, flags: Any) -> None:
    """The command: all cells, then the tables."""
    if "ablation" not in config:
        raise UserError("this recipe has no ablation.rows; name one that has, such as --config configs/ablation.py")
    settings = config.ablation
    rows = [Row(table, name, dict(overrides), *model) for table, name, overrides, *model in settings.rows]
    running = [row for row in rows if config.llm.base_url or not row.model]
    _check(rows, running, settings)
    cells = [(row, seed) for row in running for seed in settings.seeds]
    configs = {(row.slug, seed): cell_config(config, row, seed, directory / "cells") for row, seed in cells}
    for row, seed in cells:
        _check_values(configs[row.slug, seed], row)
    starts = {row.start for row in rows}
    for number, (row, seed) in enumerate(cells, 1):
        progress.say(f"[{number}/{len(cells)}] {row.name}, seed {seed}")
        target = "export" if row.name in starts else "evaluate"
        run_cell(configs[row.slug, seed], directory / "cells", cell_name(row, seed), target)
    if processes.leads():
        _write(rows, running, settings, config, directory)


def _write(
    rows: Sequence[Row], running: Sequence[Row], settings: ConfigDict, config: ConfigDict, directory: pathlib.Path
) -> None:
    found = results(rows, running, settings.seeds, settings.reference, config.name, directory / "cells")
    workdir.write_json(directory / "ablation.json", found)
    workdir.write_text(directory / "ablation.md", page(found, "github"))
    print(page(found, "simple"))
    print(f"{directory / 'ablation.md'}")


def _check(rows: Sequence[Row], running: Sequence[Row], settings: ConfigDict) -> None:
    slugs = [row.slug for row in rows]
    if double := next((slug for slug in slugs if slugs.count(slug) > 1), None):
        raise UserError(f"ablation.rows has two rows called {double!r}; give each a name of its own")
    if settings.reference not in [row.name for row in running]:
        raise UserError(f"ablation.reference is {settings.reference!r}, which is no row of ablation.rows that runs")
    if not settings.seeds:
        raise UserError("ablation.seeds is empty; name one seed or more, such as (0, 1, 2)")
    for place, row in enumerate(rows):
        if row.start and row.start not in [earlier.name for earlier in rows[:place]]:
            raise UserError(
                f"ablation.rows, {row.name}: encoder.name is 'row:{row.start}', and no row before it has that name"
            )


def cell_name(row: Row, seed: int) -> str:
    return f"{row.slug}-{seed}"


def cell_config(config: ConfigDict, row: Row, seed: int, cells: pathlib.Path) -> ConfigDict:
    """The recipe of one row and seed; raises UserError for a key that it does not have.

    All cells share one log of the model's answers, beside `cells` unless the recipe names another.
    """
    overrides = dict(row.overrides)
    if row.start:
        overrides["encoder.name"] = str(cells / cell_name(Row("", row.start, {}), seed) / "export")
    cell = config.copy_and_resolve_references()
    with cell.unlocked(), cell.ignore_type():
        del cell.ablation
        cell.seed = seed
        cell.llm.cache = cell.llm.cache or str(cells.with_name("llm"))
        cell.llm.base_url = cell.llm.base_url if row.model else ""
        for key, value in overrides.items():
            *groups, last = key.split(".")
            part = cell
            for group in groups:
                part = part.get(group, ConfigDict())
            if last not in part:
                raise UserError(f"ablation.rows, {row.name}: there is no key {key}; configs/default.py has them all")
            part[last] = value
    return cell


def _check_values(config: ConfigDict, row: Row) -> None:
    from jdmdr.check import check_config  # late: a mistake on the command line is told before jax is loaded

    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"ablation.rows, {row.name}: {error}") from None


def run_cell(config: ConfigDict, cells: pathlib.Path, name: str, target: str) -> None:
    """Brings one cell's stage `target` up to date, with the finished stages of other cells where they fit."""
    from jdmdr.pipeline import needed
    from jdmdr.recipe import Recipe

    directory = cells / name
    with workdir.locked(directory):
        stages = {stage.name: stage for stage in Recipe(config, directory).stages()}
        if "train" not in stages:
            raise UserError("data.root has no training queries and nothing is set to train, so all rows would be one")
        donors = sorted(path for path in cells.iterdir() if path.is_dir() and path != directory)
        for stage in needed(stages, target):
            processes.from_first(lambda stage=stage: workdir.adopt(stages[stage], directory, donors))
            workdir.bring_up_to_date(stages[stage], directory, True, lambda line: None)


# ---------------------------------------------------------------------------------------------------------- the tables


def results(
    rows: Sequence[Row], running: Sequence[Row], seeds: Sequence[int], reference: str, system: str, cells: pathlib.Path
) -> dict[str, Any]:
    """{split: {measure: [{"table", "name", "seeds", "mean", "low", "high", "difference", "p_corrected"}]}}.

    A row's test against the reference, or against the row that it starts from, pairs queries, each the mean over the seeds;
    p is corrected by Holm for the number of rows. A row that is not among the `running` ones has its name alone.
    """
    values = {}  # split -> measure -> row -> [by language, one a seed]
    for row in running:
        for seed in seeds:
            evaluated = cells / cell_name(row, seed) / "evaluate"
            for path in sorted(evaluated.glob("*.queries.tsv")):
                of = scores.read_queries(path).values[system]
                for measure in MEASURES:
                    split = values.setdefault(path.name.removesuffix(".queries.tsv"), {})
                    split.setdefault(measure, {}).setdefault(row.name, []).append(of[measure])
    return {
        split: {measure: _lines(rows, reference, of) for measure, of in by_measure.items()}
        for split, by_measure in values.items()
    }


def _lines(
    rows: Sequence[Row], reference: str, of: Mapping[str, list[Mapping[str, np.ndarray]]]
) -> list[dict[str, Any]]:
    pooled = {
        name: {lang: np.mean([run[lang] for run in runs], axis=0) for lang in runs[0]} for name, runs in of.items()
    }
    bases = {row.name: row.start or reference for row in rows}
    pairs = {name: (values, pooled[bases[name]]) for name, values in pooled.items() if name != reference}
    tests = significance.corrected(significance.compare_all(pairs, 0)) if pairs else {}
    lines = []
    for row in rows:
        line: dict[str, Any] = {"table": row.table, "name": row.name}
        if row.name in of:
            means = [float(np.mean([values.mean() for values in run.values()])) for run in of[row.name]]
            line |= {"seeds": means, "mean": float(np.mean(means)), "low": min(means), "high": max(means)}
            line["languages"] = {lang: float(values.mean()) for lang, values in pooled[row.name].items()}
        if row.name in tests:
            test = tests[row.name][AVERAGE]
            line |= {"difference": test.difference, "p_corrected": test.p_corrected}
        lines.append(scores.rounded(line))
    return lines


def page(found: Mapping[str, Any], form: str) -> str:
    """The tables as text: one a split and table of the paper."""
    parts = []
    for split, by_measure in found.items():
        first = next(iter(by_measure.values()))
        langs = next(list(line["languages"]) for line in first if "languages" in line)
        for title in dict.fromkeys(line["table"] for line in first):
            rows = []
            for number, line in enumerate(first):
                if line["table"] == title:
                    rows.append(_cells(line["name"], [of[number] for of in by_measure.values()], langs))
            headers = ["", *langs, "nDCG@10", "over the seeds", "difference", "p", *(TITLES[of] for of in MEASURES[1:])]
            table = tabulate(
                rows, headers, form, disable_numparse=True, colalign=["left"] + ["right"] * (len(headers) - 1)
            )
            heading = f"{title}, {split}"
            parts.append(f"{f'**{heading}**' if form == 'github' else heading}\n\n{table}\n")
    return "\n".join(parts)


def _cells(name: str, lines: Sequence[Mapping[str, Any]], langs: Sequence[str]) -> list[str]:
    ndcg, *others = lines
    if "mean" not in ndcg:
        return [name, *[""] * len(langs), SERVER, "", "", "", *[""] * len(others)]
    spread = f"{ndcg['low']:.3f} to {ndcg['high']:.3f}"
    against = [_difference(ndcg), f"{ndcg['p_corrected']:.3f}"] if "difference" in ndcg else ["", ""]
    by_lang = [f"{ndcg['languages'][lang]:.3f}" for lang in langs]
    more = [f"{line['mean']:.3f} {_difference(line)}".strip() for line in others]
    return [name, *by_lang, f"{ndcg['mean']:.3f}", spread, *against, *more]


def _difference(line: Mapping[str, Any]) -> str:
    """Signed, with a star where it is significant; empty for the reference."""
    if "difference" not in line:
        return ""
    return f"{line['difference']:+.3f}{'*' if line['p_corrected'] < ALPHA else ''}"


if __name__ == "__main__":
    cli.run(ablate, __doc__)
