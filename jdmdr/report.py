"""What a person reads at the end: the table on the screen, `report.md`, and the model card of the export."""

from __future__ import annotations

import pathlib
import shutil
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from jdmdr import expand, judge, page, workdir
from jdmdr.objectives import BITEXT, DISTILLING, SEARCHING
from jdmdr.objectives.distill_bitext import TERMS

if TYPE_CHECKING:
    from jdmdr.recipe import Recipe

COLUMNS = ("ndcg@10", "recall@100")
TITLES = {"ndcg@10": "nDCG@10", "recall@100": "Recall@100"}


def publish(name: str, directory: pathlib.Path) -> None:
    """Puts metrics and report where a person looks for them, and prints the table."""
    for source in ("evaluate/metrics.json", "report/report.md", "report/report.html"):
        with workdir.atomic(directory / pathlib.Path(source).name) as path:
            shutil.copyfile(directory / source, path)
    metrics, intervals = _figures(directory)
    for split in metrics:
        print(f"\n{split}")
        table = _table(metrics[split]["systems"], intervals[split], name, "\n")
        print(tabulate(*table, tablefmt="simple", stralign="right", disable_numparse=True))
    print(f"\nreport:  {directory / 'report.html'}, {directory / 'report.md'}")
    print(f"metrics: {directory / 'metrics.json'}")
    print(f"model:   {directory / 'export'}")


def _figures(directory: pathlib.Path) -> tuple[dict, dict]:
    return tuple(workdir.read_json(directory / "evaluate" / f"{name}.json") for name in ("metrics", "intervals"))


def _order(systems: dict, name: str) -> list[str]:
    return [s for s in ("bm25", "warmup", name, "hybrid") if s in systems]


def _table(systems: dict, intervals: dict, name: str, separator: str = " ") -> tuple[list[list[str]], list[str]]:
    """Rows (languages, average, interval) and headers (system and measure)."""
    order = _order(systems, name)
    headers = ["lang"] + [f"{system}{separator}{TITLES[measure]}" for measure in COLUMNS for system in order]
    cells = [(system, measure) for measure in COLUMNS for system in order]
    langs = sorted({lang for s, m in cells for lang in systems[s][m]} - {"avg"})
    rows = [[lang, *(f"{systems[s][m][lang]:.3f}" for s, m in cells)] for lang in langs]
    rows.append(["average", *(f"{systems[s][m]['avg']:.3f}" for s, m in cells)])
    rows.append(["95 % low", *(f"{intervals[s][m][0]:.3f}" for s, m in cells)])
    rows.append(["95 % high", *(f"{intervals[s][m][1]:.3f}" for s, m in cells)])
    return rows, headers


def _result_tables(metrics: dict, intervals: dict, name: str) -> list[str]:
    """Markdown, one table a split."""
    lines = []
    for split in metrics:
        rows, headers = _table(metrics[split]["systems"], intervals[split], name)
        table = tabulate(rows, headers, tablefmt="github", stralign="right", disable_numparse=True)
        lines += [f"## {split}", "", table, ""]
    return lines


def write(recipe: Recipe, out_dir: pathlib.Path) -> dict[str, Any]:
    """Writes `report.md` (tables, training, filter counts, settings) and `report.html`."""
    directory, c = recipe.directory, recipe.config
    stages = {stage.name for stage in recipe.stages()}
    metrics, intervals = _figures(directory)
    counts = {stage: workdir.counts_of(directory, stage) for stage in ("corpus", "warmup", "train", "evaluate")}
    lines = [f"# {c.name}: report", ""]
    lines += _result_tables(metrics, intervals, c.name)
    lines += [
        "Averages are over languages, unweighted; the 95 % interval is a bootstrap over queries within each language.",
        f"The hybrid gives the encoder's score the weight {counts['evaluate']['hybrid_weight']:g} and BM25's the rest, "
        f"chosen on {counts['evaluate']['held_out_queries']} held-out training queries, which choose the checkpoints too.",
        "", "## Training", "",
    ]  # fmt: skip
    keys = ("steps", "best_step", "valid_ndcg@10", "skipped_updates")
    rows = [[stage, *(_short(counts[stage].get(key, "-")) for key in keys)] for stage in ("warmup", "train")]
    lines += [tabulate(rows, ["run", *keys], tablefmt="github", stralign="right", disable_numparse=True), ""]
    if counts["train"]["steps"] and not counts["train"]["best_step"]:
        lines += [f"On the held-out queries no checkpoint of {c.name} did better than the warm-up, which is kept.", ""]
    if "language_shares" in counts["train"]:
        shares = sorted(counts["train"]["language_shares"].items())
        rows = [["aimed at", *(f"{wanted:.3f}" for _, (wanted, _) in shares)]]
        rows.append(["in the batches", *(f"{had:.3f}" for _, (_, had) in shares)])
        headers = ["share of the queries", *(lang for lang, _ in shares)]
        lines += [tabulate(rows, headers, tablefmt="github", disable_numparse=True), ""]
    if "negatives" in stages:
        table = _negatives_table(workdir.counts_of(directory, "negatives")["languages"])
        lines += ["## Negatives", "", "Candidates, how many each rule dropped, and where the negatives come from.", ""]
        lines += [tabulate(*table, tablefmt="github"), ""]
        judged = workdir.counts_of(directory, "judge") if "judge" in stages else None
        paragraphs = judge.report(judged, c)
        if "expand" in stages:
            paragraphs += expand.report(workdir.counts_of(directory, "expand"), c)
        lines += [line for paragraph in paragraphs for line in (paragraph, "")]
    lines += ["## Data", "", tabulate(*_data_table(counts["corpus"]), tablefmt="github"), ""]
    lines += [f"- {warning}" for lang in sorted(counts["corpus"]) for warning in counts["corpus"][lang]["warnings"]]
    lines += ["", "## Settings", ""]
    lines += [tabulate(sorted(_flat(c.to_dict())), ["key", "value"], tablefmt="github", disable_numparse=True), ""]
    (out_dir / "report.md").write_text("\n".join(lines), encoding="utf-8")
    page.write(recipe, out_dir / "report.html")
    return {}


def _negatives_table(per_lang: dict[str, Any]) -> tuple[list[list[Any]], list[str]]:
    def row(lang: str) -> list[Any]:
        of = per_lang[lang]
        return [lang, of["candidates"], *(n for _, n in of["dropped"]), of["kept"], *of["sources"].values()]

    rows = [row(lang) for lang in sorted(per_lang)]
    totals = ["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])]
    any_lang = next(iter(per_lang.values()))
    rules = [f"- {name}" for name, _ in any_lang["dropped"]]
    return [*rows, totals], ["lang", "candidates", *rules, "kept", *(f"from {name}" for name in any_lang["sources"])]


def _data_table(corpus: dict[str, Any]) -> tuple[list[list[Any]], list[str]]:
    splits = sorted({split for of in corpus.values() for split in of["queries"]})
    rows = [[lang, of["passages"], *(of["queries"].get(s, 0) for s in splits)] for lang, of in sorted(corpus.items())]
    return rows, ["lang", "passages", *(f"{s} queries" for s in splits)]


def _short(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _flat(config: dict[str, Any], prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif prefix + key not in ("data.root", "llm.base_url", "llm.cache"):  # of this machine, not of the experiment
            if isinstance(value, str) and pathlib.Path(value).is_absolute():
                value = pathlib.Path(value).name
            yield prefix + key, "off" if value is None else repr(value).replace("|", "\\|")


def _negatives(config: Any) -> str:
    objective, members = config.train.objective, config.mine.retrievers
    if objective.name in SEARCHING:
        return f"the top {objective.top_k} that a query retrieves in each step"
    if objective.name == BITEXT:
        return "none: the other pairs of a batch are compared"
    if config.train.passages_per_query == 1:
        return "those of the other queries of a batch"
    return members if "," not in members else f"{members} fused by {config.mine.fusion}"


def _objective(recipe: Recipe) -> str:
    """In words, with what it learned of its own."""
    objective, lora = recipe.config.train.objective, recipe.config.train.lora
    counts = workdir.counts_of(recipe.directory, "train")
    learned = counts.get("objective", {}).get("temperature")
    temperature = f"{objective.temperature}" if learned is None else f"{learned:.4g} (learned)"
    weights = [f"{term.removesuffix('_weight')} {objective[term]:g}" for term in TERMS if objective[term]]
    of = {"distill_bitext": weights, "distill_scores": [objective.form, f"candidates {objective.candidates}"],
          "contrastive": [objective.mode], "pairwise": [f"negatives {objective.negatives}"],
          "adore": [f"{objective.metric} cut at {objective.metric_cut}"]}  # fmt: skip
    words = [objective.name, *of[objective.name], f"temperature {temperature}"]
    if objective.name in DISTILLING:
        words.append(f"the teacher's {objective.teacher_temperature}")
        words.append(f"teacher {pathlib.Path(recipe.config.distill.teacher).name}")
    if objective.dimensions:
        words.append(f"Matryoshka at {', '.join(map(str, objective.dimensions))}")
    if lora.rank:
        words.append(f"LoRA of rank {lora.rank}, merged")
    return ", ".join(words)


def model_card(recipe: Recipe, encoder_config: Any) -> str:
    """The README.md of the export."""
    c = recipe.config
    metrics, intervals = _figures(recipe.directory)
    langs = sorted(workdir.counts_of(recipe.directory, "corpus"))
    codes = sorted({lang.split("-")[0] for lang in langs})
    whole = " in training; a static embedding reads texts whole" if encoder_config.kind == "static" else ""
    chunks = f", in up to {c.encoder.chunks} chunks, of which the best one counts" if c.encoder.chunks > 1 else ""
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "language:"]
    lines += [f"- {code}" for code in codes]
    lines += [
        "tags:", "- sentence-transformers", "- dense-retrieval", "- multilingual", "---", "",
        f"# {c.name}", "",
        f"A bi-encoder for retrieval in {', '.join(langs)}, trained with jdmdr.", "",
        tabulate(
            [
                ["encoder", encoder_config.kind + (f", from {pathlib.Path(c.encoder.name).name}" if c.encoder.name else ", from scratch")],
                ["towers", "one for queries, one for passages" if encoder_config.untied else "one for both sides"],
                ["embedding width", encoder_config.embedding_width],
                ["pooling", encoder_config.pooling + (f", then a linear head from {encoder_config.width}" if encoder_config.projection else "")
                 + (" and a LayerNorm" if encoder_config.projection_norm else "")],
                ["similarity", "cosine" if encoder_config.normalize else "dot product"],
                ["query prompt", repr(c.encoder.query_prompt)],
                ["passage prompt", repr(c.encoder.passage_prompt)],
                ["passage text", c.data.fields.replace(",", ", one space, ")],
                ["tokens of a query / passage", f"{c.encoder.query_length} / {c.encoder.passage_length}" + whole + chunks],
                ["negatives", _negatives(c)],
                ["objective", _objective(recipe)],
            ],
            ["", ""], tablefmt="github", disable_numparse=True,
        ), "",
        "```python", "from sentence_transformers import SentenceTransformer", "",
        'model = SentenceTransformer("PATH")', 'q = model.encode_query(["..."])', 'p = model.encode_document(["..."])',
        "model.similarity(q, p)", "```", "",
    ]  # fmt: skip
    lines += _result_tables(metrics, intervals, c.name)
    return "\n".join(lines)
