"""How far a judge can be trusted: what it says about pairs that people judged, per language.

    calibration.json    {lang: {"relevant", "irrelevant", "kept_relevant", "kept_irrelevant", "unjudged", "precision", "recall", "fit"}}
    calibration.md      the same as a table

Of the passages that the judge keeps as hard negatives, *precision* is the share that people found irrelevant, if there are as
many relevant as irrelevant ones; of the irrelevant ones, *recall* is the share that it keeps. A kept relevant passage teaches
the encoder a wrong thing; a dropped irrelevant one costs a few calls. So precision is what a judge has to have.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import hashing, progress, workdir
from jdmdr.corpus import passage_text
from jdmdr.library import Library, TrainingQuery
from jdmdr.llm.client import Client
from jdmdr.llm.judging import Pair, Question, Verdict, judge_pair, question_of

FEW = 10  # pairs of a kind below which nothing is said about a language
Judged = tuple[Question, Pair, bool]  # the last: relevant


def pairs_of(lang: str, library: Library, training: Sequence[TrainingQuery], config: ConfigDict) -> list[Judged]:
    """`judge.calibrate` relevant and as many irrelevant pairs of a language's training queries, chosen by a hash.

    A relevant passage is compared with another positive of its query, and with none where it is the only one.
    """
    index = library.langs.index(lang)
    collection, base = library.collections[index], int(library.bases[index])
    text = lambda row: passage_text(collection.passage(int(row) - base))
    queries = [query for query in training if query.lang == index]
    kinds = [
        [(query, int(row), relevant) for query in queries for row in (query.positives if relevant else query.judged)]
        for relevant in (True, False)
    ]
    count = min(config.judge.calibrate, *map(len, kinds))
    order = lambda of: (hashing.stable_hash(config.seed, "calibration", lang, of[0].qid, of[1] - base), of[1])
    chosen = [of for kind in kinds for of in sorted(kind, key=order)[:count]]
    docids = collection.docids([row - base for _, row, _ in chosen]) if chosen else []
    return [
        (question_of(query, lang, text, config, row), Pair(docid, text(row)), relevant)
        for (query, row, relevant), docid in zip(chosen, docids, strict=True)
    ]


def calibrate(
    langs: Sequence[str], library: Library, training: Sequence[TrainingQuery], client: Client, config: ConfigDict,
    out_dir: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Asks about the judged pairs of these languages, writes the files, and warns where the judge is not fit."""
    found = {}
    for lang in langs:
        pairs = pairs_of(lang, library, training, config)
        ask = lambda of: judge_pair(client, config.judge, of[0], of[1], "calibration")
        verdicts = client.map(ask, pairs, f"  calibrating {lang}", "pairs") if pairs else []
        if verdicts:
            found[lang] = measure(verdicts, [relevant for _, _, relevant in pairs], config.judge)
    workdir.write_json(out_dir / "calibration.json", found)
    if not found:
        progress.say("  no calibration: the data hold no passages judged irrelevant, or judge.calibrate is 0")
        return found
    workdir.write_text(
        out_dir / "calibration.md", f"# What the judge says about judged pairs\n\n{table(found, 'github')}\n"
    )
    for warning in warnings(found, config.judge):
        progress.say(f"  warning: {warning}")
    return found


def measure(verdicts: Sequence[Verdict], relevant: Sequence[bool], judge: ConfigDict) -> dict[str, Any]:
    """Precision and recall of "keep"; `fit` is None where there are too few pairs to say."""
    count = {kind: relevant.count(kind) for kind in (True, False)}
    kept = {
        kind: sum(v.kept and v.label is not None for v, of in zip(verdicts, relevant, strict=True) if of is kind)
        for kind in (True, False)
    }
    share = {kind: kept[kind] / max(count[kind], 1) for kind in (True, False)}
    precision = share[False] / (share[True] + share[False]) if share[True] + share[False] else 0.0
    fit = precision >= judge.least_precision and share[False] >= judge.least_recall
    return {
        "relevant": count[True], "irrelevant": count[False], "kept_relevant": kept[True], "kept_irrelevant": kept[False],
        "unjudged": sum(v.label is None for v in verdicts), "precision": round(precision, 4), "recall": round(share[False], 4),
        "fit": fit if min(count.values()) >= FEW else None,
    }  # fmt: skip


def warnings(found: Mapping[str, Mapping[str, Any]], judge: ConfigDict) -> Iterable[str]:
    """A sentence for each language where the judge is not fit."""
    for lang, of in found.items():
        if of["fit"] is False:
            yield (
                f"the judge is not fit for {lang}: precision {of['precision']:.2f} (judge.least_precision="
                f"{judge.least_precision:g}), recall {of['recall']:.2f} (judge.least_recall={judge.least_recall:g}) of "
                f"{of['relevant']} relevant and {of['irrelevant']} irrelevant judged pairs; try another model, or leave the "
                "language to the rule filters (judge.langs)"
            )


def table(found: Mapping[str, Mapping[str, Any]], form: str = "simple") -> str:
    headers = [
        "lang",
        "relevant",
        "of them kept",
        "irrelevant",
        "of them kept",
        "unjudged",
        "precision",
        "recall",
        "fit",
    ]
    rows = [
        [lang, of["relevant"], of["kept_relevant"], of["irrelevant"], of["kept_irrelevant"], of["unjudged"],
         f"{of['precision']:.3f}", f"{of['recall']:.3f}", {True: "yes", False: "NO", None: "too few pairs"}[of["fit"]]]
        for lang, of in found.items()
    ]  # fmt: skip
    return tabulate(rows, headers, form, disable_numparse=True, colalign=["left", *["right"] * 7, "left"])
