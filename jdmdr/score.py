"""Scores TREC runs that were made anywhere, against judgments of any collection: no corpus and no recipe.

    python -m jdmdr.score 'runs/bm25.{lang}.trec' 'runs/mine.{lang}.trec' --qrels='DIR/qrels/{lang}.dev.tsv'

    --qrels FILE     TREC judgments
    --measures LIST  beside ndcg@10, recall@100, mrr@10 and map (docs/evaluation.md), such as msmarco_mrr@10,recall@1000
    --out DIR        writes there what jdmdr.evaluate writes into evaluate/, for jdmdr.compare and for programs
    --split NAME     the split's name in those files; "runs" by default
    --seed N         of the tests' random numbers; 0 by default

In the paths {lang} stands for the language; without it there is one, called "all". A run is a TREC run, or in MS MARCO's
form, `qid docid rank`; it is named by NAME=PATH, or by its file name, or by its directory where the language is all that the
file is called. Prints per language and on average the measures and the share of unjudged passages, and tests each run against
those before it, as jdmdr.compare does. A query that a run lacks counts 0.
"""

from __future__ import annotations

import glob
import pathlib
import re
from collections.abc import Sequence

from absl import flags
from tabulate import tabulate

from jdmdr import cli, metrics, progress, reading, scores, significance
from jdmdr.compare import cells
from jdmdr.metrics import AVERAGE
from jdmdr.types import UserError

LANG = "{lang}"
ONE = "all"
BOOTSTRAP = 1000  # samples of the averages' intervals


def find(pattern: str) -> dict[str, pathlib.Path]:
    """`{language: file}` of a path in which {lang} stands for the language; raises UserError where there is none."""
    if LANG not in pattern:
        if not pathlib.Path(pattern).is_file():
            raise UserError(f"{pattern}: there is no such file; {LANG} in a path stands for the language")
        return {ONE: pathlib.Path(pattern)}
    expression = re.compile(
        "(?P<lang>[^/.]+)".join(map(re.escape, pattern.split(LANG, 1))).replace(re.escape(LANG), "(?P=lang)")
    )
    paths = glob.glob("*".join(map(glob.escape, pattern.split(LANG))))
    found = {match["lang"]: pathlib.Path(path) for path in sorted(paths) if (match := expression.fullmatch(path))}
    if not found:
        raise UserError(f"{pattern}: no file has such a name; {LANG} stands for the language")
    return found


def read(
    patterns: dict[str, str], qrels_pattern: str, more: Sequence[str] = ()
) -> tuple[scores.Scores, dict[str, metrics.Qrels], list[str]]:
    """The scores, `more` measures among them, of the runs `{name: path}` over the languages that all of them have, the judgments, and the languages
    that only the judgments have. Raises UserError where one run has a language that another lacks."""
    qrels_paths = find(qrels_pattern)
    runs = {name: find(pattern) for name, pattern in patterns.items()}
    first, langs = next(iter(runs.items()))
    for name, paths in runs.items():
        if odd := sorted({*paths} ^ {*langs}):
            raise UserError(
                f"the runs {first} and {name} differ in their languages ({', '.join(odd)}); give both the same"
            )
    if missing := sorted({*langs} - {*qrels_paths}):
        raise UserError(f"--qrels={qrels_pattern}: there are none of {', '.join(missing)}, which the runs have")
    made, judged = scores.Scores(more), {}
    for lang in langs:
        judged[lang] = reading.qrels(qrels_paths[lang])[0]
        if not judged[lang]:
            raise UserError(f"{qrels_paths[lang]} holds no judgment; give the split's qrels")
        found = {name: metrics.read_run(paths[lang]) for name, paths in runs.items()}
        for name, run in found.items():
            if not run.keys() & judged[lang].keys():
                raise UserError(f"{runs[name][lang]} answers no query of {qrels_paths[lang]} (its first is "
                                f"{next(iter(run), None)!r}, the judgments' {next(iter(judged[lang]))!r}); give the run of "
                                "that split")  # fmt: skip
        made.add(lang, judged[lang], found, {name: ranks for name in found if (ranks := _ranks(runs[name][lang]))})
    return made, judged, sorted({*qrels_paths} - {*langs})


def _ranks(path: pathlib.Path) -> metrics.Ranks | None:
    """The ranks of a run in MS MARCO's form; None of another."""
    if not metrics.in_msmarco_form(path):
        return None
    ranks, repeated = metrics.read_ranks(path)
    if repeated:
        progress.say(f"{path}: {repeated} ranks repeat a passage of their query; its first rank counts")
    return ranks


def lines(made: scores.Scores, seed: int) -> list[str]:
    """The tables for a terminal."""
    means, unjudged = made.table(), made.unjudged_table()
    columns = (*made.measures, *scores.UNJUDGED)
    out = []
    for system, of in means.items():
        of = {**of, **unjudged.get(system, {})}
        rows = [[lang, str(len(made.qids[lang])), *(_cell(of.get(m, {}), lang) for m in columns)] for lang in made.qids]
        rows += [["average", str(sum(map(len, made.qids.values()))), *(_cell(of.get(m, {}), AVERAGE) for m in columns)]]
        out += [system, tabulate(rows, ["lang", "queries", *columns], disable_numparse=True, stralign="right"), ""]
    for measure, by_system in significance.table(made.values, made.tested, seed).items():
        rows = [
            [system, baseline, *cells(found[AVERAGE])]
            for system, of in by_system.items()
            for baseline, found in of.items()
        ]
        headers = ["run", "against", "difference", "95 % interval", "p", "corrected", ""]
        out += [f"average {measure}", tabulate(rows, headers, disable_numparse=True, stralign="right"), ""]
    return out[:-1]


def _cell(of: dict[str, float], lang: str) -> str:
    return f"{of[lang]:.3f}" if lang in of else "-"


def main() -> None:
    flags.DEFINE_string("qrels", "", "TREC judgments.")
    flags.DEFINE_string("measures", "", "More measures, separated by commas.")
    flags.DEFINE_string("out", "", "Directory to write the figures to.")
    flags.DEFINE_string("split", "runs", "The split's name in the files.")
    flags.DEFINE_integer("seed", 0, "Of the tests' random numbers.", lower_bound=0)
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if not words or not values.qrels:
        raise UserError(
            "--qrels and at least one run are needed; write python -m jdmdr.score RUN [RUN ...] --qrels=FILE"
        )
    if not re.fullmatch(r"[\w-]+", values.split):
        raise UserError(f"--split is {values.split!r}; it is a word")
    patterns: dict[str, str] = {}
    for word in words:
        name, pattern = re.fullmatch(r"(?:([\w.-]+)=)?(.*)", word, re.DOTALL).groups()
        path = pathlib.Path(pattern.replace(f".{LANG}", "").replace(LANG, ""))
        name = name or (path.parent.name if path.name.startswith(".") else path.stem) or pattern
        if name in patterns:
            raise UserError(f"two runs are called {name!r}; name them, as in a={patterns[name]} b={pattern}")
        patterns[name] = pattern
    made, judged, spare = read(patterns, values.qrels, metrics.parse_measures(values.measures))
    if values.out:
        out_dir = pathlib.Path(values.out)
        try:
            out_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out_dir}: {error.strerror}; name a directory that can be written") from error
        scores.write({values.split: made}, out_dir, values.seed, BOOTSTRAP)
        for lang, qrels in judged.items():
            metrics.write_qrels(out_dir / scores.qrels_file(values.split, lang), qrels)
    print("\n".join(lines(made, values.seed)))
    if spare:
        print(f"\nno run of {', '.join(spare)}: left out")
    return 0


if __name__ == "__main__":
    main()
