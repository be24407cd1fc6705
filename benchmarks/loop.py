"""What a training run spends beside its steps: input, padding, compiling with and without what an earlier run left, saving.

    python -m benchmarks.loop                   2 cores: about 5 minutes

`jdmdr.train` on a checkpoint, twice from the same negatives: first with an empty compile cache, then with the one that the first
run filled. The figures are those that every run leaves (goodput.json and log.jsonl). The input pipeline alone makes the batches of as
many steps without an encoder. Writes OUT/loop.json.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks import command, material
from configs.quickstart_minilm import checkpoint
from jdmdr import batches, perf, progress, sources, train
from jdmdr.types import UserError
from jdmdr.workdir import read_json, write_json

LENGTH, PASSAGES_PER_QUERY = 128, 4
COLD, WARM = "empty cache", "second run"


def run(a: Any, home: pathlib.Path) -> dict[str, Any]:
    """Trains afresh with the compile cache of `home`: {"goodput", "log": [lines of steps]}."""
    directory = a.out / "workdir"
    shutil.rmtree(directory / "train", ignore_errors=True)
    words = {
        "encoder.layers": a.layers, "data.root": a.data, "data.langs": a.langs or "en", "train.steps": a.steps,
        "train.batch_size": a.batch_size, "train.passages_per_query": PASSAGES_PER_QUERY, "train.log_every": 1,
        "train.checkpoint_every": max(a.steps // 3, 1), "train.keep": "last", "train.max_profiles": 4, "train.valid_pool": 1000,
        "encoder.passage_length": LENGTH,
    }  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "jdmdr.train", "--config", "configs/quickstart_minilm.py", f"--workdir={directory}",
         *(f"--config.{key}={value}" for key, value in words.items())],
        env={**environment, "XDG_CACHE_HOME": str(home.resolve())}, stderr=subprocess.PIPE, text=True, cwd=pathlib.Path(__file__).parents[1],
    )  # fmt: skip
    if done.returncode:
        raise UserError(f"jdmdr.train ended with code {done.returncode}: {done.stderr.splitlines()[-1]}")
    lines = [json.loads(line) for line in (directory / "train" / train.LOG).read_text().splitlines()]
    return {"goodput": read_json(directory / "train" / train.GOODPUT), "log": [x for x in lines if "loss" in x]}


def input_alone(a: Any) -> dict[str, float]:
    """Batches a second of the pipeline by itself, and the padding of one like them."""
    start = material.cut_checkpoint(pathlib.Path(checkpoint()), a.out / "checkpoint", a.layers, LENGTH)
    recipe = material.prepare(a.data, a.langs or "en", start, LENGTH, a.out / "input")
    section = material.section(steps=a.steps, batch_size=a.batch_size, passages_per_query=PASSAGES_PER_QUERY)
    found = [sources.Source(material.training_set(recipe, 0), 1.0, PASSAGES_PER_QUERY)]
    make, shapes, _ = sources.batch_maker(
        found, section, recipe.config.weights, (LENGTH, LENGTH), 1, 0, len(recipe.library.langs), 1
    )
    began = time.perf_counter()
    made = list(batches.batch_iterator(make, 0, a.steps))
    return {"batches_per_second": len(made) / (time.perf_counter() - began), "shapes": shapes}


def text(found: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    rows = []
    for name in (COLD, WARM):
        goodput = found[name]["goodput"]
        seconds, steps = goodput["seconds"], goodput["steps"]
        rows.append([name, f"{goodput['total']:.0f} s", f"{seconds[perf.COMPILING]:.1f} s", f"{steps / seconds[perf.COMPUTING]:.2f}",
                     f"{seconds[perf.WAITING] / (seconds[perf.WAITING] + seconds[perf.COMPUTING]):.1%}",
                     f"{goodput['flops_per_second'] / goodput['peak_flops_per_second']:.2f}",
                     f"{max(line.get(train.HELD_UP, 0.0) for line in found[name]['log']):.2f} s"])  # fmt: skip
    heads = [
        "",
        "run",
        "compiling",
        "steps a second",
        "of these waiting for input",
        "of the matmul peak",
        "longest save",
    ]
    table = tabulate(rows, heads, "github", disable_numparse=True, colalign=["left"] + ["right"] * 6)
    padding = np.mean([line["padding_share"] for line in found[WARM]["log"]])
    return (
        f"{found['machine']}.\n\n{table}\n\n{found['steps']} steps of {found['batch_size']} queries with {PASSAGES_PER_QUERY} passages, "
        f"{found['layers']} layers of MiniLM. The input pipeline alone makes {found['input']['batches_per_second']:,.0f} such batches a second. Padding: "
        f"{padding:.0%}. The step is compiled for each of at most {found['input']['shapes']:.0f} shapes and never again: a further "
        "compilation ends the run with an error."
    )


def main(a: Any) -> None:
    for left in ("home", "workdir"):
        shutil.rmtree(a.out / left, ignore_errors=True)
    found: dict[str, Any] = {"machine": command.machine("no peer"), "steps": a.steps, "batch_size": a.batch_size, "layers": a.layers}  # fmt: skip
    for name in (COLD, WARM):
        progress.say(f"  {name}")
        found[name] = run(a, a.out / "home")
    found["input"] = input_alone(a)
    write_json(a.out / "loop.json", found)
    print(text(found))
    print(f"\n{a.out / 'loop.json'}")
    if a.docs:
        command.replace_section(a.docs, "loop", text(found))


if __name__ == "__main__":
    arguments = command.parser_with_data(__doc__, "runs/loop")
    arguments.add_argument("--steps", type=int, default=60, help="of training (%(default)s)")
    command.run(main, arguments)
