"""What distillation with bi-text brings a small student: before and after, stages 1, 2 and both, in four directions.

    python -m benchmarks.distill --bitext DIR --xquad DIR

`--bitext` is a directory of Tatoeba's pairs, LANG-en.train.tsv and LANG-en.test.tsv; `--xquad` a copy of XQuAD-R in the layout
of docs/data.md. Teacher: all-MiniLM-L6-v2, which reads English alone. Student: token vectors under a vocabulary of all the
languages. It learns from Tatoeba's train pairs, tinypedia's passages and questions of articles outside `test`, and XQuAD-R's
paragraphs and questions of articles outside `clean`; it is measured on tinypedia's `test` questions, on XQuAD-R's `clean`
questions (sentences alone, without the title, which is English in all languages), and on Tatoeba's test pairs.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from benchmarks import command
from configs import default, kdr_stage1, kdr_stage2
from jdmdr import ablate, alignment, bitext, datasets, pipeline, progress, reading, workdir
from jdmdr.metrics import AVERAGE
from jdmdr.recipe import Recipe
from jdmdr.types import UserError

SOURCE, CLEAN, TEST = "en", "clean", "test"
BEFORE, FIRST, SECOND, BOTH = "before", "stage 1", "stage 2 alone", "stage 1, then 2"
DIRECTIONS = ("En-En", "L-En", "En-L", "L-L")
XQUAD_PAIRS = "xquad"
PICTURE = "kdr-translations.svg"


# ------------------------------------------------------------------------------------------------------------- the data


def xquad_pairs(root: pathlib.Path, out: pathlib.Path) -> None:
    """Writes XQuAD-R's paragraphs and questions of articles that no `clean` question is about, as LANG-en.train.tsv.

    A paragraph that has as many sentences in both languages is there sentence by sentence too.
    """
    languages = datasets.discover(root)
    if CLEAN not in languages[SOURCE].topics:
        raise UserError(f"--xquad {root} has no topics/{SOURCE}.{CLEAN}.tsv")
    judged, _ = reading.qrels(languages[SOURCE].qrels[TEST])
    about = {_number(qid): {_parts(docid)[0] for docid in of} for qid, of in judged.items()}
    barred = {article for qid, _ in reading.topics(languages[SOURCE].topics[CLEAN]) for article in about[_number(qid)]}
    texts: dict[str, dict[Any, list[str]]] = {}  # language: {paragraph or question: it, and its sentences}
    for lang, files in languages.items():
        of = texts.setdefault(lang, {})
        for path in files.corpus:
            for number, line in reading.lines(path):
                row = reading.json_object(line, path, number)
                place = _parts(row["docid"])
                if place[0] not in barred:
                    of.setdefault(place, [_blank(row["context"])]).append(_blank(row["text"]))
        for qid, text in reading.topics(files.topics[TEST]):
            if not about[_number(qid)] & barred:
                of[_number(qid)] = [_blank(text)]
    for lang, of in texts.items():
        if lang != SOURCE:
            lines = []
            for key, own in of.items():
                theirs = texts[SOURCE].get(key, [])
                whole = zip(own[:1], theirs[:1], strict=False)
                lines += zip(own, theirs, strict=True) if len(own) == len(theirs) else whole
            workdir.write_text(out / f"{lang}-{SOURCE}.train.tsv", "".join(f"{a}\t{b}\n" for a, b in lines))


def _blank(text: str) -> str:
    return " ".join(text.split())


def _number(qid: str) -> str:
    return qid.partition("-")[2]


def _parts(docid: str) -> tuple[str, str]:
    """Article and paragraph of `LANG-ARTICLE-PARAGRAPH#SENTENCE`."""
    _, article, rest = docid.split("-")
    return article, rest.partition("#")[0]


# ------------------------------------------------------------------------------------------------------------ the cells


def recipe(arguments: argparse.Namespace) -> ConfigDict:
    """The rows, each a recipe of its own; rows of two stages start from the first one's export."""
    config = kdr_stage2.get_config("alone")
    pairs = f"{arguments.bitext},{arguments.out / XQUAD_PAIRS}"
    langs = sorted(datasets.discover(pathlib.Path(arguments.data), arguments.langs))
    with config.unlocked(), config.ignore_type():
        config.data.root, config.data.langs = arguments.data, arguments.langs
        config.data.splits = ",".join([TEST, *(f"to_{lang}={TEST}:{TEST}:{lang}" for lang in langs)])
        config.evaluate.bootstrap = 100
        config.distill.bitext, config.distill.cache = pairs, str(arguments.out / "teacher")
        config.tokenizer.vocab_size = arguments.vocab_size
        first = {
            **_changes(kdr_stage1.get_config(), ("objective.name", "passages_per_query", "epochs")),
            "distill.langs": "",
        }
        second = {"train.replay_share": 0.1, "distill.langs": SOURCE}
        rows = [
            (BEFORE, {"train.steps": 0}),
            (FIRST, {**first, "mine.retrievers": "bm25"}),
            (SECOND, {}),
            (BOTH, {**second, "encoder.name": f"{ablate.FROM_ROW}{FIRST}"}),
        ]
        config.ablation = {
            "rows": tuple(("Distillation", *row) for row in rows),
            "seeds": tuple(arguments.seeds),
            "reference": BEFORE,
        }
    return config


def _changes(config: ConfigDict, keys: Sequence[str]) -> dict[str, Any]:
    found = {}
    for key in keys:
        value = config.train
        for part in key.split("."):
            value = value[part]
        found[f"train.{key}"] = value
    return found


def on_xquad(root: pathlib.Path, cell: pathlib.Path, out: pathlib.Path) -> pathlib.Path:
    """A working directory that evaluates a cell's export on XQuAD-R."""
    config = default.get_config()
    langs = sorted(datasets.discover(root))
    with config.unlocked(), config.ignore_type():
        config.name = "kdr"
        config.data.root, config.data.fields = str(root), "text"
        splits = [f"{TEST}={CLEAN}:{TEST}:own", *(f"to_{lang}={CLEAN}:{TEST}:{lang}" for lang in langs)]
        config.data.splits = ",".join(splits)
        config.encoder.name, config.train.epochs, config.evaluate.bootstrap = str(cell / "export"), 0.0, 10
    with workdir.locked(out):
        pipeline.run(config, out, "evaluate", True)
    return out


# ---------------------------------------------------------------------------------------------------------- the figures


def directions(evaluated: pathlib.Path, system: str = "kdr") -> dict[str, Any]:
    """{direction: nDCG@10, mean over the other languages}, and "languages": {language: L-En}."""
    metrics = workdir.read_json(evaluated / "evaluate" / "metrics.json")
    of = lambda split: metrics[split]["systems"][system]["ndcg@10"]
    langs = [lang for lang in of(TEST) if lang not in (AVERAGE, SOURCE)]
    to_source = {lang: of(f"to_{SOURCE}")[lang] for lang in langs}
    return {
        "En-En": of(TEST)[SOURCE],
        "L-En": float(np.mean([*to_source.values()])),
        "En-L": float(np.mean([of(f"to_{lang}")[SOURCE] for lang in langs])),
        "L-L": float(np.mean([of(TEST)[lang] for lang in langs])),
        "languages": to_source,
    }


def translation_accuracy(config: ConfigDict, cell: pathlib.Path, data: pathlib.Path) -> dict[str, float]:
    """{language: mean accuracy of both ways on Tatoeba's test pairs}."""
    with tempfile.TemporaryDirectory() as scratch:
        embed, search = bitext.open_encoder(config, cell, "train", pathlib.Path(scratch))
        found = bitext.evaluate(bitext.find(data, TEST), embed, search)
    return {name.partition("-")[0]: (of["there"] + of["back"]) / 2 for name, of in found.items()}


def picture(cells: pathlib.Path, configs: Mapping[str, ConfigDict], seed: int) -> tuple[str, list[list[str]]]:
    """English and Korean test queries and passages before, after stage 1 and after both, as an SVG file; and in figures."""
    own = {name: cells / ablate.cell_name(ablate.Row("", name, {}), seed) for name in configs}
    recipe = Recipe(configs[FIRST], own[FIRST])
    split = next(split for split in recipe.splits if split.corpus == "own")
    pairs = alignment.choose(recipe.library, split, SOURCE, "ko")
    stages = {
        "before": (FIRST, "embeddings-warmup"),
        "after stage 1": (FIRST, "embeddings"),
        "after both": (BOTH, "embeddings"),
    }
    panels = {title: alignment.panel(own[row] / stage, pairs, seed) for title, (row, stage) in stages.items()}
    svg = (
        alignment.picture("translations", panels, pairs).replace("currentColor", "#444").replace("var(--grid)", "#bbb")
    )
    rows = [
        [
            title,
            *(f"{panel.figures[kind][key]:.2f}" for kind in pairs.rows for key in ("translations", "others", "own")),
        ]
        for title, panel in panels.items()
    ]
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1), rows


def measure(arguments: argparse.Namespace) -> None:
    """The command: the cells that are not done, then the tables."""
    xquad_pairs(pathlib.Path(arguments.xquad), arguments.out / XQUAD_PAIRS)
    config = recipe(arguments)
    cells = arguments.out / "cells"
    found: dict[str, dict[int, Any]] = {}
    seeds = config.ablation.seeds
    for seed in seeds:
        for line in config.ablation.rows:
            row = ablate.Row(*line)
            name, own = ablate.cell_name(row, seed), ablate.cell_config(config, row, seed, cells)
            progress.say(f"{row.name}, seed {seed}")
            ablate.run_cell(own, cells, name, "export")
            result = arguments.out / "found" / f"{name}.json"
            exported = workdir.file_digest(cells / name / "export" / workdir.MANIFEST)
            known = workdir.read_json(result)
            if not known or known["export"] != exported:
                xquad = on_xquad(pathlib.Path(arguments.xquad), cells / name, arguments.out / XQUAD_PAIRS / name)
                known = {
                    "export": exported,
                    "tinypedia": directions(cells / name),
                    "xquad": directions(xquad),
                    "bitext": translation_accuracy(own, cells / name, pathlib.Path(arguments.bitext)),
                }
                workdir.write_json(result, known)
            found.setdefault(row.name, {})[seed] = known
    text = page(found)
    configs = {row[1]: ablate.cell_config(config, ablate.Row(*row), seeds[0], cells) for row in config.ablation.rows}
    svg, rows = picture(cells, configs, seeds[0])
    heads = [
        "",
        *(f"{kind}: {of}" for kind in ("queries", "passages") for of in ("translations", "others", "own language")),
    ]
    text += f"\n\n**Cosines, and own language among the ten nearest (0.5: no preference), en and ko, seed {seeds[0]}**\n\n{_table(rows, heads)}"
    print(text)
    if arguments.docs:
        workdir.write_text(arguments.docs.with_name(PICTURE), svg)
        text += f"\n\n![t-SNE of English and Korean queries and passages of tinypedia `test`]({PICTURE})"
        command.replace_section(arguments.docs, "distillation", text)


def page(found: Mapping[str, Mapping[int, Any]]) -> str:
    """The tables: directions on both data sets, then languages; means over the seeds, and their spread for L-En."""
    seeds = sorted(next(iter(found.values())))
    parts = [f"Seed {', '.join(map(str, seeds))}; nDCG@10."]
    for data, title in (("tinypedia", "tinypedia, `test`"), ("xquad", "XQuAD-R, `clean`")):
        rows = []
        for name, of in found.items():
            values = {way: [of[seed][data][way] for seed in seeds] for way in DIRECTIONS}
            spread = [f"{min(values['L-En']):.3f} to {max(values['L-En']):.3f}"] if len(seeds) > 1 else []
            rows.append([name, *(f"{np.mean(values[way]):.3f}" for way in DIRECTIONS), *spread])
        parts.append(
            f"**{title}**\n\n" + _table(rows, ["", *DIRECTIONS, *(["L-En over the seeds"] if len(seeds) > 1 else [])])
        )
    for key, title in ((("tinypedia", "languages"), "L-En by language, tinypedia `test`"),
                       (("xquad", "languages"), "L-En by language, XQuAD-R `clean`"),
                       (("bitext",), "Accuracy of finding translations, Tatoeba test pairs, mean of both ways")):  # fmt: skip
        by_row = {name: [_get(of[seed], key) for seed in seeds] for name, of in found.items()}
        langs = [lang for lang in next(iter(by_row.values()))[0] if lang != AVERAGE]
        rows = []
        for name, of in by_row.items():
            means = [np.mean([values[lang] for values in of]) for lang in langs]
            rows.append([name, *(f"{mean:.3f}" for mean in means), f"{np.mean(means):.3f}"])
        parts.append(f"**{title}**\n\n" + _table(rows, ["", *langs, "mean"]))
    return "\n\n".join(parts)


def _get(value: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        value = value[key]
    return value


def _table(rows: list[list[str]], headers: list[str]) -> str:
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, "github", disable_numparse=True, colalign=align)


if __name__ == "__main__":
    parser = command.parser_with_data(__doc__, "runs/distill")
    parser.add_argument("--bitext", required=True, help="directory of LANG-en.SPLIT.tsv")
    parser.add_argument("--xquad", required=True, help="data root of XQuAD-R")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="(%(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=24_000, help="pieces of the student's tokenizer (%(default)s)"
    )
    command.run(measure, parser)
