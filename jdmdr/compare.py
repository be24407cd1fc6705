"""Compares two evaluations query by query: the same queries, the same judgments, two systems.

    python -m jdmdr.compare runs/a runs/b                     what each trained
    python -m jdmdr.compare runs/a runs/b --system=hybrid     a system of both
    python -m jdmdr.compare runs/a runs/a --system=bm25,dmdr  a system of the first, another of the second

    --system NAME[,NAME]   a system of metrics.json; two names: one for each
    --measure NAME,...     of ndcg@10, recall@100, mrr@10, map, and what evaluate.measures added; ndcg@10 by default
    --seed N               of the tests' random numbers; 0 by default

A directory is a working directory, or one that jdmdr.score wrote. The difference is the second less the first. p is that
of the paired randomisation test, corrected by Holm over the languages of a split; * is below 0.05, ** below 0.01.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from tabulate import tabulate

from jdmdr import cli, metrics, reading, significance
from jdmdr.metrics import AVERAGE
from jdmdr.scores import QUERIES, Scores, qrels_file, queries_file, read_queries
from jdmdr.significance import Comparison
from jdmdr.types import UserError
from jdmdr.workdir import MANIFEST, read_json

HEADERS = ("lang", "queries", "A", "B", "B - A", "95 % interval", "p", "corrected", "")


def compare(
    a: pathlib.Path, b: pathlib.Path, systems: tuple[str, str] | None, measures: Sequence[str], seed: int
) -> dict[str, Any]:
    """`{split: {measure: {lang: (mean of A, mean of B, Comparison)}}}` of two evaluations, `systems` one of each (None:
    what each trained). Raises UserError, naming what differs, unless both have the same queries and judgments."""
    homes = evaluation(a), evaluation(b)
    names = systems or (trained(homes[0]), trained(homes[1]))
    common = [split for split in splits(homes[0]) if split in splits(homes[1])]
    if not common:
        raise UserError(f"{a} has the splits {', '.join(splits(homes[0]))} and {b} {', '.join(splits(homes[1]))}; evaluate "
                        "both on one of the same name")  # fmt: skip
    result: dict[str, Any] = {}
    for split in common:
        first, second = (read_queries(home / queries_file(split)) for home in homes)
        _check_same(split, first, second, homes)
        for name, scores, home in zip(names, (first, second), homes, strict=True):
            if name not in scores.values:
                raise UserError(f"{home} has no system {name!r}; there are: {', '.join(scores.values)}")
            if missing := [measure for measure in measures if measure not in scores.measures]:
                raise UserError(f"--measure: {missing[0]!r} is none of {', '.join(scores.measures)}, which {home} has")
        of_a, of_b = first.table()[names[0]], second.table()[names[1]]
        for measure in measures:
            values = first.values[names[0]][measure], second.values[names[1]][measure]
            found = significance.corrected({None: significance.compare(values[1], values[0], seed)})[None]
            rows = {lang: (of_a[measure][lang], of_b[measure][lang], found[lang]) for lang in found}
            result.setdefault(split, {})[measure] = rows
    return result


def evaluation(directory: pathlib.Path) -> pathlib.Path:
    """Where the files of an evaluation lie: in a working directory's evaluate/, or in the directory itself."""
    if (directory / "evaluate").is_dir():
        if not (directory / "evaluate" / MANIFEST).exists():
            raise UserError(f"{directory}/evaluate is unfinished; run jdmdr.evaluate with its --workdir again")
        directory /= "evaluate"
    if not splits(directory):
        raise UserError(f"{directory} holds no evaluation (SPLIT{QUERIES}); run jdmdr.evaluate or jdmdr.score first")
    return directory


def splits(directory: pathlib.Path) -> list[str]:
    return sorted(path.name.removesuffix(QUERIES) for path in directory.glob(f"*{QUERIES}"))


def trained(directory: pathlib.Path) -> str:
    manifest = read_json(directory / MANIFEST)
    if manifest is None:
        raise UserError(f"{directory} was not written by a recipe, which would tell what it trained; add --system=NAME")
    return manifest["settings"]["name"]


def _check_same(split: str, first: Scores, second: Scores, homes: Sequence[pathlib.Path]) -> None:
    for lang in sorted({*first.qids, *second.qids}):
        a, b = first.qids.get(lang, []), second.qids.get(lang, [])
        if a != b:
            odd = next(iter(sorted({*a} ^ {*b})), None)
            what = f"such as {odd!r}" if odd else "in another order"
            raise UserError(f"split {split} of {lang} has {len(a)} queries in {homes[0]} and {len(b)} in {homes[1]}, {what}; "
                            "evaluate both on the same data")  # fmt: skip
        paths = [home / qrels_file(split, lang) for home in homes]
        judged = [reading.qrels(path)[0] for path in paths]
        if judged[0] != judged[1]:
            qid = next(qid for qid in a if judged[0].get(qid) != judged[1].get(qid))
            raise UserError(
                f"{paths[0]} and {paths[1]} judge query {qid!r} differently; evaluate both on the same data"
            )


def lines(found: Mapping[str, Any], names: tuple[str, str]) -> list[str]:
    """The tables for a terminal."""
    out = [f"A: {names[0]}", f"B: {names[1]}"]
    for split, by_measure in found.items():
        for measure, rows in by_measure.items():
            order = sorted(rows, key=lambda lang: (lang == AVERAGE, lang))
            table = [_row(lang, *rows[lang]) for lang in order]
            out += ["", f"{split}, {measure}", tabulate(table, HEADERS, disable_numparse=True, stralign="right")]
    return out


def _row(lang: str, mean_a: float, mean_b: float, found: Comparison) -> list[str]:
    return [lang, str(found.queries), f"{mean_a:.3f}", f"{mean_b:.3f}", *cells(found)]


def cells(found: Comparison) -> list[str]:
    """Difference, interval, p, corrected p and mark."""
    interval = f"{found.low:+.3f} .. {found.high:+.3f}"
    return [f"{found.difference:+.3f}", interval, f"{found.p:.4f}", f"{found.p_corrected:.4f}", mark(found)]


def mark(found: Comparison) -> str:
    """How sure the difference is, after correction."""
    return "**" if found.p_corrected < 0.01 else "*" if found.p_corrected < 0.05 else ""


def main() -> None:
    flags.DEFINE_string("system", "", "A system of both, or one of each, separated by a comma.")
    flags.DEFINE_string("measure", "ndcg@10", "Measures, separated by commas.")
    flags.DEFINE_integer("seed", 0, "Of the tests' random numbers.", lower_bound=0)
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if len(words) != 2:
        raise UserError(f"{len(words)} directories given; write python -m jdmdr.compare A B")
    a, b = map(pathlib.Path, words)
    for path in (a, b):
        if not path.is_dir():
            raise UserError(f"{path} is not a directory; name two working directories")
    given = [name.strip() for name in values.system.split(",") if name.strip()]
    if len(given) > 2:
        raise UserError(f"--system is {values.system!r}; it is one name, or one for each directory")
    systems = (given[0], given[-1]) if given else None
    measures = metrics.parse_measures(values.measure)
    found = compare(a, b, systems, measures, values.seed)
    names = systems or (trained(evaluation(a)), trained(evaluation(b)))
    print("\n".join(lines(found, (f"{names[0]} of {a}", f"{names[1]} of {b}"))))
    return 0


if __name__ == "__main__":
    main()
