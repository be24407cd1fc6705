"""What `report.html` shows, read from a working directory; `templates/report.html` says how."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from jdmdr import alignment, encode, metrics, pictures, refresh, scores, workdir
from jdmdr.corpus import passage_text
from jdmdr.filters.explain import ALL, KINDS
from jdmdr.llm import calibration
from jdmdr.metrics import AVERAGE
from jdmdr.splits import Split, Target

if TYPE_CHECKING:
    from jdmdr.recipe import Recipe

TITLES = {"ndcg@10": "nDCG@10", "recall@100": "Recall@100", "mrr@10": "MRR@10", "map": "MAP"}
MARKS = {"bm25": "†", "warmup": "‡"}  # of a corrected p below ALPHA against that system
ALPHA = 0.05
WORST = 5  # queries a language
SHOWN_HITS = 3
TEXT = 320  # characters of a passage that are shown
POINTS = 400  # queries and passages in the picture of the embeddings
RIGHT_TO_LEFT = {"ar", "fa", "he", "ur"}


def write(recipe: Recipe, path: pathlib.Path) -> None:
    """Renders the page; all that is text in it is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jdmdr"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.globals.update(right_to_left=RIGHT_TO_LEFT)
    page = environment.get_template("report.html").render(gather(recipe))
    workdir.write_text(path, page)


def gather(recipe: Recipe) -> dict[str, Any]:
    """Everything that the template names."""
    directory, c = recipe.directory, recipe.config
    stages = {stage.name for stage in recipe.stages()}
    found = {name: workdir.read_json(directory / "evaluate" / f"{name}.json")
             for name in ("metrics", "intervals", "judged", "significance")}  # fmt: skip
    bias = directory / "evaluate" / "language_bias.json"
    splits = {split.name: split for split in recipe.splits}
    counts = {stage: workdir.counts_of(directory, stage) for stage in ("corpus", "warmup", "train", "evaluate")}
    return {
        "name": c.name,
        "splits": [_split(recipe, split, found) for split in found["metrics"]],
        "marks": MARKS,
        "alpha": ALPHA,
        "counts": counts,
        "bias": _bias(workdir.read_json(bias)) if bias.exists() else [],
        "curves": pictures.curves("curves", {stage: _curves(directory / stage) for stage in ("warmup", "train")}),
        "refreshes": _refreshes(directory / "train" / refresh.DIRECTORY / refresh.TAKEN),
        "shares": _shares(counts["train"]),
        "negatives": _negatives(directory) if "negatives" in stages else None,
        "judge": _judge(recipe) if "judge" in stages else None,
        "worst": [_worst(recipe, splits[name]) for name in found["metrics"]],
        "projection": _projection(recipe, [splits[name] for name in found["metrics"]]),
        "translations": _translations(recipe, [splits[name] for name in found["metrics"]])
        if "teacher" in stages
        else None,
        "stages": _stages(directory),
    }


# ---------------------------------------------------------------------------------------------------------- results


def _split(recipe: Recipe, split: str, found: dict[str, Any]) -> dict[str, Any]:
    systems = found["metrics"][split]["systems"]
    names = [s for s in ("bm25", "warmup", recipe.config.name, "hybrid") if s in systems]
    measures = scores.in_order(systems[names[0]])
    langs = sorted({lang for of in systems.values() for lang in of["ndcg@10"]} - {AVERAGE})
    tests = found["significance"].get(split, {})

    def cell(system: str, measure: str, lang: str) -> dict[str, Any]:
        against = {
            base: of[lang]
            for base, of in tests.get(measure, {}).get(system, {}).items()
            if base in MARKS and lang in of
        }
        notes = [
            f"{test['difference']:+.3f} [{test['low']:+.3f}, {test['high']:+.3f}] against {base}, corrected p = {test['p_corrected']:.3g}"
            for base, test in against.items()
        ]
        marks = [(MARKS[base], test["difference"] < 0) for base, test in against.items() if test["p_corrected"] < ALPHA]
        return {"value": systems[system][measure][lang], "marks": marks, "note": "; ".join(notes)}

    return {
        "name": split,
        "systems": names,
        "measures": [(m, TITLES.get(m, m)) for m in measures],
        "averages": [
            {"system": s, "cells": [cell(s, m, AVERAGE) for m in measures], "intervals": found["intervals"][split][s],
             "unjudged": {m: of[AVERAGE] for m, of in found["judged"].get(split, {}).get(s, {}).items()}}
            for s in names
        ],
        "unjudged": sorted({m for of in found["judged"].get(split, {}).values() for m in of}),
        "languages": [
            {"title": TITLES[m], "rows": [(lang, [cell(s, m, lang) for s in names]) for lang in langs]} for m in scores.TESTED
        ],
        "bars": pictures.bars(
            f"bars-{split}", langs, {s: [systems[s]["ndcg@10"][lang] for lang in langs] for s in names}, "nDCG@10"
        ),
    }  # fmt: skip


def _negatives(directory: pathlib.Path) -> dict[str, Any]:
    found = workdir.read_json(directory / "negatives" / "scores.json")
    return {
        **found,
        "histograms": pictures.score_histograms("scores", found["histograms"]) if found["histograms"] else "",
        "percentages": [f"{q:.0%}" for q in found["quantiles"]],
        "all_languages": ALL,
        "kinds": KINDS,
        "rules": _rules(workdir.counts_of(directory, "negatives")["languages"]),
    }


def _bias(found: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("own_excess", "own_rank", "other_rank", "aligned")
    return [
        {"split": split, "system": system, "lang": lang, "cells": [of[key] for key in keys]}
        for split, systems in found.items()
        for system, langs in systems.items()
        for lang, of in langs.items()
    ]


# --------------------------------------------------------------------------------------------------------- training


def _curves(run: pathlib.Path) -> dict[str, tuple[list[float], list[float]]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def of(key: str) -> tuple[list[float], list[float]]:
        pairs = [(line["step"], line[key]) for line in lines if key in line]
        return [step for step, _ in pairs], [value for _, value in pairs]

    return {"loss": of("loss"), "nDCG@10 on the held-out queries": of("valid_ndcg@10")}


def _refreshes(taken: pathlib.Path) -> str:
    """MRR of the models that mined, when training took what they found, and how much of it was new."""
    if not taken.exists():
        return ""
    lines = [json.loads(line) for line in taken.read_text(encoding="utf-8").splitlines()]
    adopted = [line for line in lines if "changed" in line]
    if not adopted:
        return ""
    names = [f"{split}_{refresh.MEASURE}" for split in (refresh.DEV, refresh.VALID)]
    name = next((name for name in names if all(name in line["metrics"] for line in adopted)), None)
    quality = [(line["source_step"], line["metrics"][name]) for line in adopted] if name else []
    changed = [(line["step"], line["changed"]) for line in adopted]
    title = f"MRR@10 on {'dev' if name == names[0] else 'the held-out queries'}"
    return pictures.refreshes("refreshes", title, quality, changed, lines[-1]["step"])


def _shares(train: dict[str, Any]) -> str:
    groups = {
        title: dict(sorted(train[key].items(), key=lambda item: (len(item[0]), item[0])))
        for title, key in (("languages", "language_shares"), ("topics", "topic_shares"))
        if key in train
    }
    return pictures.shares("shares", groups) if groups else ""


def _rules(per_lang: dict[str, Any]) -> dict[str, Any]:
    """The counts of the filters as a table."""
    first = next(iter(per_lang.values()))
    return {
        "headers": [
            "candidates",
            *(name for name, _ in first["dropped"]),
            "kept",
            *(f"from {s}" for s in first["sources"]),
        ],
        "rows": [
            (lang, [of["candidates"], *(n for _, n in of["dropped"]), of["kept"], *of["sources"].values()])
            for lang, of in sorted(per_lang.items())
        ],
    }


# ------------------------------------------------------------------------------------------------------ worst queries


def _worst(recipe: Recipe, split: Split) -> dict[str, Any]:
    """Per language, the queries on which the trained encoder does worst, and what it found instead."""
    directory, name = recipe.directory / "evaluate", recipe.config.name
    table = scores.read_queries(directory / scores.queries_file(split.name))
    groups = []
    for lang, qids in table.qids.items():
        own_Q = table.values[name]["ndcg@10"][lang]
        best_Q = np.max([table.values[s]["ndcg@10"][lang] for s in table.values if s not in (name, "hybrid")], axis=0)
        order = np.lexsort((own_Q, own_Q - best_Q))[:WORST]  # where another system does better, then where all fail
        target = Target(recipe.library, lang, split)
        texts = dict(zip(*recipe.library.queries(lang, split.topics), strict=True))
        run = metrics.read_run(directory / f"{split.name}.{name}.{lang}.trec")
        rows = [
            _failure(target, qids[q], texts[qids[q]], run.get(qids[q], {}), float(own_Q[q]), float(best_Q[q]))
            for q in order
        ]
        groups.append({"lang": lang, "queries": rows})
    return {"split": split.name, "groups": groups}


def _failure(target: Target, qid: str, text: str, hits: dict[str, float], own: float, best: float) -> dict[str, Any]:
    relevant = {docid for docid, rel in target.qrels[qid].items() if rel > 0}
    ranking = metrics.ranked(hits, len(hits))
    ranks = {docid: rank for rank, docid in enumerate(ranking, 1)}
    positive = min(relevant, key=lambda docid: (ranks.get(docid, len(hits) + 1), docid), default="")
    return {
        "qid": qid,
        "text": text,
        "own": own,
        "best": best,
        "rank": ranks.get(positive),
        "positive": {"docid": positive, "text": _shown(target, positive), "score": hits.get(positive)},
        "instead": [
            {"docid": docid, "text": _shown(target, docid), "score": hits[docid]}
            for docid in itertools.islice((d for d in ranking if d not in relevant), SHOWN_HITS)
        ],
    }


def _shown(target: Target, docid: str) -> str:
    passage = target.passage(docid)
    text = passage_text(passage) if passage else ""
    return text if len(text) <= TEXT else text[: TEXT - 1].rsplit(" ", 1)[0] + " …"


def _judge(recipe: Recipe) -> dict[str, Any]:
    """What the language model did with the candidates, and for short queries."""
    counts = workdir.counts_of(recipe.directory, "judge")
    return {
        "model": recipe.config.llm.model,
        "writer": recipe.config.expand.model or recipe.config.llm.model,
        "expanded": workdir.counts_of(recipe.directory, "expand")["languages"],
        **counts,
        "warnings": list(calibration.warnings(counts["calibration"], recipe.config.judge)),
    }


# ------------------------------------------------------------------------------------------------------- the embeddings


def _projection(recipe: Recipe, splits: Sequence[Split]) -> str:
    """t-SNE of queries and their first positives, by the trained encoder."""
    split = next((s for s in splits if s.corpus == "own"), None)
    if split is None:
        return ""
    library, vectors, langs, pairs = recipe.library, [], [], []
    per_lang = max(2, POINTS // 2 // len(library.langs))
    for lang, collection in zip(library.langs, library.collections, strict=True):
        qids, _ = library.queries(lang, split.topics)
        qrels = library.qrels(lang, split.qrels)
        positives = {row: [d for d, rel in qrels.get(qid, {}).items() if rel > 0] for row, qid in enumerate(qids)}
        rows = [row for row, known in positives.items() if known and collection.rows(known[:1])[0] >= 0]
        rows = rows[:: max(1, len(rows) // per_lang)][:per_lang]
        home = recipe.directory / "embeddings" / lang
        found = collection.rows([positives[row][0] for row in rows])
        vectors.append(encode.gather_rows(encode.shards(home, f"queries.{split.topics}"), np.array(rows, int)))
        vectors.append(encode.passage_vectors(home, found))
        langs += [lang] * 2 * len(rows)
        first = len(langs) - 2 * len(rows)
        pairs += [(first + i, first + len(rows) + i) for i in range(len(rows))]
    if len(langs) < alignment.FEWEST:
        return ""
    points_Nx2 = alignment.tsne(np.concatenate(vectors).astype(np.float32), recipe.config.seed)
    return pictures.projection("projection", points_Nx2, langs, pairs)


def _translations(recipe: Recipe, splits: Sequence[Split]) -> dict[str, Any] | None:
    """Translations before and after training, as a picture and in figures; None where nothing is there in two languages."""
    c, split = recipe.config, next((s for s in splits if s.corpus == "own"), None)
    found = alignment.choose(recipe.library, split, c.distill.source, c.distill.shown) if split else None
    if found is None:
        return None
    panels = {
        title: alignment.panel(recipe.directory / stage, found, c.seed)
        for title, stage in (("before", "embeddings-warmup"), ("after", "embeddings"))
    }
    return {
        "picture": alignment.picture("translations", panels, found),
        "langs": found.langs,
        "split": split.name,
        "figures": {title: panel.figures for title, panel in panels.items()},
    }


# ---------------------------------------------------------------------------------------------------------- the manifest


def _stages(directory: pathlib.Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(directory.glob("*/manifest.json")):
        manifest = workdir.read_json(path)
        files = manifest.pop("files")
        size = sum(size for size, _ in files.values())
        found.append(
            {
                "name": manifest.pop("stage"),
                "version": manifest.pop("version"),
                "files": len(files),
                "megabytes": size / 1e6,
                "parts": [
                    (key, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True))
                    for key, value in manifest.items()
                    if value
                ],
            }
        )
    return found
