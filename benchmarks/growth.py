"""How time and memory grow: exact search with the corpus, a training step with the batch and with the length of its texts.

    python -m benchmarks.growth                 2 cores: about 5 minutes, 3 GB of memory

Search: random float32 vectors in a memory-mapped file, by `index.exact`, by a flat faiss index and by torch's matmul and topk,
in turns; a ratio is the median over the rounds. Step: the contrastive step with AdamW on a random
encoder of MiniLM's shape, texts of full length. Time is the processor's, which others' work disturbs least. Memory of a search is
what the process has got for it beside the file, the smaller searches before it included, and of a step XLA's scratch. An exponent b is the slope of log y over log x: y grows as x ** b.
Writes OUT/growth.json.
"""

from __future__ import annotations

import functools
import pathlib
import subprocess
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import faiss
import jax
import numpy as np
import optax
from tabulate import tabulate

from benchmarks import command
from benchmarks.large_batches import SHAPES, random_batch
from benchmarks.peer import find_torch
from jdmdr import encoders, parallel, progress
from jdmdr.index.exact import ExactSearcher
from jdmdr.objectives.contrastive import make_objective
from jdmdr.step import init_state, make_step
from jdmdr.workdir import write_json

WIDTH, QUERIES, K = 384, 64, 100
BATCHES, LENGTHS = (4, 8, 16, 32), (32, 64, 128, 256)  # of one at the first of the other
OURS, FAISS, TORCH = "jdmdr", "faiss flat", "torch matmul + topk"
PASSAGES_PER_QUERY = 2

# Reads the path of a file of vectors and searches it at every further line; answers with seconds and a file of rows.
TORCH_SEARCH = """
import sys, time, numpy as np, torch
path, out, k = sys.argv[1], sys.argv[2], int(sys.argv[3])
passages, queries = (torch.from_numpy(np.load(path + name, mmap_mode=mode)) for name, mode in (("p.npy", "c"), ("q.npy", None)))
for _ in sys.stdin:
    began = time.process_time()
    rows = torch.topk(queries @ passages.T, k).indices
    taken = time.process_time() - began
    np.save(out, rows.numpy())
    print(taken, flush=True)
"""


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = function()
    return time.process_time() - began, found


def own_bytes() -> int:
    """Memory of this process without mapped files."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")))


def write_vectors(path: pathlib.Path, rows: int, rng: np.random.Generator) -> None:
    """In small parts, whose memory a search cannot make use of afterwards."""
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (rows, WIDTH))
    for first in range(0, rows, WIDTH):
        part = vectors[first : first + WIDTH]
        part[:] = rng.standard_normal(part.shape, np.float32)


def vectors(rows: int, scratch: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Passages, mapped, and queries."""
    rng = np.random.default_rng(rows)
    write_vectors(scratch / "p.npy", rows, rng)
    write_vectors(scratch / "q.npy", QUERIES, rng)
    return np.load(scratch / "p.npy", mmap_mode="r"), np.load(scratch / "q.npy")


def search_bytes(sizes: list[int], scratch: pathlib.Path) -> list[int]:
    """What the process gets for searches of so many vectors, from the smallest on, before any other system is in it."""
    before, found = own_bytes(), []
    for rows in sizes:
        passages, queries = vectors(rows, scratch)
        ExactSearcher([passages], parallel.own_mesh()).search(queries, K)
        found.append(own_bytes() - before)
    return found


def search(rows: int, rounds: int, torch_python: str, scratch: pathlib.Path) -> dict[str, Any]:
    """Seconds of `QUERIES` queries over that many vectors, by system and round."""
    passages, queries = vectors(rows, scratch)
    ours = ExactSearcher([passages], parallel.own_mesh())
    index = faiss.IndexFlatIP(WIDTH)
    index.add(passages)
    words = [torch_python, "-c", TORCH_SEARCH, f"{scratch}/", str(scratch / "rows.npy"), str(K)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as torch:

        def ask() -> tuple[float, np.ndarray]:
            torch.stdin.write("\n")
            torch.stdin.flush()
            seconds = float(torch.stdout.readline())
            return seconds, np.load(scratch / "rows.npy")

        systems = {
            OURS: functools.partial(timed, lambda: ours.search(queries, K).rows_QxK),
            FAISS: functools.partial(timed, lambda: index.search(queries, K)[1]),
            TORCH: ask,
        }
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        found = {}
        for turn in range(1 + rounds):
            for name in np.roll(list(systems), -turn).tolist():
                taken, found[name] = systems[name]()
                seconds[name].append(taken)
        torch.stdin.close()
    equal = {name: float(np.mean(np.sort(of) == np.sort(found[OURS]))) for name, of in found.items() if name != OURS}
    return {"rows": rows, "seconds": {name: of[1:] for name, of in seconds.items()}, "equal": equal}


def training_step(batch_size: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a step by round, and its scratch."""
    mesh = parallel.own_mesh()
    config = encoders.EncoderConfig("transformer", **SHAPES["small"], max_positions=514, dtype="float32")
    encoder, optimiser = encoders.build(config), optax.adamw(1e-5)
    objective = make_objective(SimpleNamespace(mode="none", temperature=0.05, learn_temperature=False), mesh)
    state = init_state(encoder.init(jax.random.key(0)), optimiser)
    batch = parallel.put_batch(
        random_batch(batch_size, PASSAGES_PER_QUERY, tokens, config.vocab_size, mesh.devices.size), mesh
    )
    step = make_step(encoder, objective, optimiser, 0, None, mesh).lower(state, batch).compile()
    seconds = []
    for _ in range(1 + rounds):
        taken, (state, _) = timed(lambda given=state: jax.block_until_ready(step(given, batch)))
        seconds.append(taken)
    return {"batch_size": batch_size, "tokens": tokens, "seconds": seconds[1:], "bytes": step.memory_analysis().temp_size_in_bytes}  # fmt: skip


def exponent(x: list[float], y: list[float]) -> float:
    """b of y = a x ** b, by least squares of the logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def fits(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """{what grows: {"time", "memory": exponent}}."""
    kinds = {"search": "rows", "batch": "batch_size", "length": "tokens"}
    out = {}
    for kind, key in kinds.items():
        x = [of[key] for of in found[kind]]
        seconds = [np.median(of["seconds"][OURS] if kind == "search" else of["seconds"]) for of in found[kind]]
        out[kind] = {"time": exponent(x, seconds), "memory": exponent(x, [of["bytes"] for of in found[kind]])}
    return out


def text(found: dict[str, Any]) -> str:
    """The section of docs/performance.md."""
    rows = []
    for of in found["search"]:
        ours = np.array(of["seconds"][OURS])
        ratios = [np.array(of["seconds"][name]) / ours for name in (FAISS, TORCH)]
        rows.append([f"{of['rows']:,}", f"{1e3 * np.median(ours):,.0f} ms", progress.size(of["bytes"]),
                     *(f"{np.median(r):.2f} ({r.min():.2f} to {r.max():.2f})" for r in ratios)])  # fmt: skip
    heads = ["vectors", "a search", "memory", "times as fast as faiss flat", "as torch matmul + topk"]
    searches = tabulate(rows, heads, "github", disable_numparse=True, colalign=["right"] * 5)
    rows = [[of["batch_size"], of["tokens"], f"{np.median(of['seconds']):.2f} s", progress.size(of["bytes"])] for kind in ("batch", "length") for of in found[kind]]  # fmt: skip
    steps = tabulate(rows, ["queries", "tokens", "a step", "scratch"], "github", disable_numparse=True, colalign=["right"] * 4)  # fmt: skip
    b = found["exponents"]
    grown = [[what, f"{b[kind]['time']:.2f}", f"{b[kind]['memory']:.2f}"]
             for kind, what in (("search", "search, vectors"), ("batch", "step, queries"), ("length", "step, tokens"))]  # fmt: skip
    exponents = tabulate(grown, ["grows with", "time", "memory"], "github", disable_numparse=True, colalign=["left", "right", "right"])  # fmt: skip
    least = min(min(of["equal"].values()) for of in found["search"])
    return (
        f"{found['machine']}. Seconds of processor time.\n\n{exponents}\n\n"
        f"Top {K} of {QUERIES} queries, width {WIDTH}; at least {least:.2%} of the rows equal:\n\n{searches}\n\n"
        f"A contrastive step, {PASSAGES_PER_QUERY} passages a query, 6 layers, width 384:\n\n{steps}"
    )


def main(a: Any) -> None:
    versions = f"faiss {faiss.__version__}; {find_torch(a.torch_python)}"
    found: dict[str, Any] = {"machine": command.machine(versions), "search": [], "batch": [], "length": []}
    sizes = np.geomspace(a.least, a.most, 5).astype(int).tolist()
    with tempfile.TemporaryDirectory(dir=a.out) as scratch:
        held = search_bytes(sizes, pathlib.Path(scratch))
        for rows, of in zip(progress.bar(sizes, "  searching", "sizes"), held, strict=True):
            found["search"].append({**search(rows, a.rounds, str(a.torch_python), pathlib.Path(scratch)), "bytes": of})
    for batch_size in progress.bar(BATCHES, "  batches", "sizes"):
        found["batch"].append(training_step(batch_size, LENGTHS[0], a.rounds))
    for tokens in progress.bar(LENGTHS, "  lengths", "sizes"):
        found["length"].append(training_step(BATCHES[0], tokens, a.rounds))
    found["exponents"] = fits(found)
    write_json(a.out / "growth.json", found)
    print(text(found))
    print(f"\n{a.out / 'growth.json'}")
    if a.docs:
        command.replace_section(a.docs, "growth", text(found))


if __name__ == "__main__":
    arguments = command.parser(__doc__, "runs/growth")
    arguments.add_argument("--least", type=int, default=10_000, help="vectors (%(default)s)")
    arguments.add_argument("--most", type=int, default=1_000_000, help="vectors (%(default)s)")
    arguments.add_argument("--rounds", type=int, default=3, help="counted (%(default)s)")
    command.run(main, arguments)
