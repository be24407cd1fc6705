"""The targets of docs/performance.md beside what the other benchmarks measured on this machine: one table.

    python -m benchmarks.targets            reads runs/bench/speed.json and its like; `make bench` runs all and then this

A figure that is not there yet has an empty line. Writes OUT/targets.json.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from benchmarks import command, growth, loop, speed
from jdmdr import perf, train
from jdmdr.workdir import read_json, write_json

FILES = {
    "speed": "bench/speed.json", "search": "bench-search/search.json", "loop": "loop/loop.json",
    "growth": "growth/growth.json", "large": "large-batches/step.json",
}  # fmt: skip


class Target(NamedTuple):
    """`figure` of the JSON of one benchmark should be at least, or at most, `bound`."""

    what: str
    benchmark: str
    figure: Callable[[Mapping[str, Any]], float]
    holds: Callable[[float, float], bool]
    bound: float


def against(kind: str, system: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda found: found["ratios"][kind][system]["median"]


def slowest_search(system: str) -> Callable[[Mapping[str, Any]], float]:
    """Of all sizes of the corpus the least ratio."""
    return lambda found: min(
        float(np.median(np.divide(of["seconds"][system], of["seconds"][growth.OURS]))) for of in found["search"]
    )


def waiting(found: Mapping[str, Any]) -> float:
    seconds = found[loop.WARM]["goodput"]["seconds"]
    return seconds[perf.WAITING] / (seconds[perf.WAITING] + seconds[perf.COMPUTING])


def padding(found: Mapping[str, Any]) -> float:
    return float(np.mean([line["padding_share"] for line in found[loop.WARM]["log"]]))


def stall(found: Mapping[str, Any]) -> float:
    return max(line.get(train.HELD_UP, 0.0) for line in found[loop.WARM]["log"])


def warm_compiling(found: Mapping[str, Any]) -> float:
    seconds = [found[name]["goodput"]["seconds"][perf.COMPILING] for name in (loop.WARM, loop.COLD)]
    return seconds[0] / seconds[1]


AT_LEAST, AT_MOST = operator.ge, operator.le
TARGETS = (
    Target("encoding, times as fast as sentence-transformers", "speed", against("encode", speed.DEFAULT), AT_LEAST, 1.3),
    Target("encoding, beside it tuned", "speed", against("encode", speed.TUNED), AT_LEAST, 1.0),
    Target("training, times as fast as sentence-transformers", "speed", against("train", speed.DEFAULT), AT_LEAST, 1.2),
    Target("training, beside it tuned", "speed", against("train", speed.TUNED), AT_LEAST, 1.0),
    Target("exact search, times as fast as faiss flat, least of all sizes", "growth", slowest_search(growth.FAISS), AT_LEAST, 1.0),
    Target("exact search, beside torch matmul + topk", "growth", slowest_search(growth.TORCH), AT_LEAST, 1.0),
    Target("step with ADORE's search, of one without", "search", lambda found: found["step_ratio"]["median"], AT_MOST, 2.0),
    Target("step with grad cache, of the plain one", "large", lambda found: found["median_ratio"], AT_MOST, 1.45),
    Target("padding in training batches", "loop", padding, AT_MOST, 0.15),
    Target("time of steps that waits for input", "loop", waiting, AT_MOST, 0.05),
    Target("compiling with what an earlier run left, of without", "loop", warm_compiling, AT_MOST, 0.5),
    Target("longest stall by a checkpoint, seconds", "loop", stall, AT_MOST, 2.0),
)  # fmt: skip


def table(found: Mapping[str, Mapping[str, Any] | None]) -> list[dict[str, Any]]:
    """A row a target; without a figure where its benchmark has not run."""
    rows = []
    for target in TARGETS:
        row: dict[str, Any] = {"what": target.what, "bound": target.bound, "at_least": target.holds is AT_LEAST}
        if found.get(target.benchmark):
            row["figure"] = target.figure(found[target.benchmark])
            row["met"] = bool(target.holds(row["figure"], target.bound))
        rows.append(row)
    return rows


def text(rows: list[dict[str, Any]], form: str) -> str:
    lines = [
        [row["what"], f"{'at least' if row['at_least'] else 'at most'} {row['bound']:g}",
         f"{row['figure']:.2f}" if "figure" in row else "", {True: "yes", False: "no"}.get(row.get("met"), "")]
        for row in rows
    ]  # fmt: skip
    return tabulate(lines, ["", "target", "measured", "met"], form, disable_numparse=True)


def main(a: Any) -> None:
    rows = table({name: read_json(a.out / path) for name, path in FILES.items()})
    write_json(a.out / "targets.json", rows)
    print(text(rows, "simple"))
    if a.docs:
        command.replace_section(a.docs, "targets", text(rows, "github"))


if __name__ == "__main__":
    command.run(main, command.parser(__doc__, "runs"))
