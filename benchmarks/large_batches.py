"""What makes large batches possible, and what it costs: the grad cache, and the loss that holds no scores.

    python -m benchmarks.large_batches step      2 cores: about 4 minutes
    python -m benchmarks.large_batches loss      2 cores: 1 minute
    python -m benchmarks.large_batches step --shape xlm-roberta-large --batch-size 64 --tokens 256 --grad-cache 64   a GPU

step: a training step with the grad cache against the plain step on the same batch. The floor is 4/3: a backward pass costs two
forward passes, and the cache adds one. Encoder and texts are random, without dropout: the time does not depend on what they
say. loss: the contrastive loss with its gradient, scores in blocks against all at once; larger sizes are only compiled.

Both kinds take turns; a ratio is the median over the rounds, after one that is not counted. Memory is XLA's scratch beside
the arguments, from its analysis of the compiled program.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdmdr import encoders, parallel
from jdmdr.objectives import blockwise
from jdmdr.objectives.contrastive import contrastive_loss, make_objective
from jdmdr.shapes import Packed, make_side
from jdmdr.step import init_state, make_step
from jdmdr.types import Tokens

SHAPES = {
    "small": {"layers": 6, "width": 384, "heads": 12, "ffn": 1536, "vocab_size": 30_522},
    "xlm-roberta-base": {"layers": 12, "width": 768, "heads": 12, "ffn": 3072, "vocab_size": 250_002},
    "xlm-roberta-large": {"layers": 24, "width": 1024, "heads": 16, "ffn": 4096, "vocab_size": 250_002},
}
QUERY_TOKENS = 32
PLAIN, CACHED, BLOCKS = "plain", "grad cache", "in blocks"


def batch_of_labels(B: int, P: int) -> dict[str, Any]:
    """A batch without its texts: B queries and B * P passages, all different."""
    N, target_B = B * P, np.arange(B, dtype=np.int32) * P
    return {
        "target_B": target_B, "passage_ids_N": np.arange(N, dtype=np.int32), "first_N": np.ones(N, bool),
        "positive_ids_BxM": target_B[:, None], "weight_N": np.ones(N, np.float32), "query_weight_B": np.ones(B, np.float32),
    }  # fmt: skip


class FullTexts(NamedTuple):
    """A token source whose texts all have `width` random tokens."""

    width: int
    vocab_size: int

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return np.full(len(rows), self.width, np.int32)

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        ids = np.random.default_rng(0).integers(5, self.vocab_size, (len(rows), width)).astype(np.int32)
        return Tokens(ids, np.ones_like(ids))


def random_batch(B: int, P: int, tokens: int, vocab_size: int, devices: int, grad_cache: int = 0) -> dict[str, Any]:
    """Texts of full length too."""

    def block(count: int, width: int) -> Packed:
        side = make_side(count, width, chunk_rows=16, grad_cache=grad_cache, devices=devices, pads=True)
        texts, rows = FullTexts(width, vocab_size), np.arange(count)
        return side.pack(texts, rows, side.needed(texts.lengths(rows)[None], 1)[0].tolist())

    return {**batch_of_labels(B, P), "queries": block(B, QUERY_TOKENS), "passages": block(B * P, tokens)}


def measure_step(a: argparse.Namespace) -> dict[str, Any]:
    mesh = parallel.data_mesh()
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = encoders.EncoderConfig("transformer", **SHAPES[a.shape], max_positions=514, dtype=dtype)
    encoder = encoders.build(config)
    objective = make_objective(SimpleNamespace(mode="none", temperature=0.05, learn_temperature=False), mesh)
    optimiser = optax.adamw(1e-5)
    made = random_batch(
        a.batch_size, a.passages_per_query, a.tokens, config.vocab_size, mesh.devices.size, a.grad_cache
    )
    batch = parallel.put_batch(made, mesh)
    state = jax.jit(
        lambda: init_state(encoder.init(jax.random.key(0)), optimiser), out_shardings=parallel.replicated(mesh)
    )()
    steps, memory = {}, {}
    for name, rows in ((PLAIN, 0), (CACHED, a.grad_cache)):
        steps[name] = make_step(encoder, objective, optimiser, 0, None, mesh, rows).lower(state, batch).compile()
        memory[name] = steps[name].memory_analysis().temp_size_in_bytes
    held = [state]  # a step gives it away

    def run(name: str) -> None:
        for _ in range(a.steps):
            held[0], metrics = steps[name](held[0], batch)
        jax.block_until_ready(metrics)

    seconds = in_turns({name: functools.partial(run, name) for name in steps}, a.rounds)
    return {"dtype": dtype, "seconds": seconds, "scratch_bytes": memory}


def measure_loss(a: argparse.Namespace) -> dict[str, Any]:
    """Seconds of `a.batch_size` queries; bytes of these, and of 4 and 16 times as many."""
    sizes = [a.batch_size * times for times in (1, 4, 16)]
    kinds = {B: {PLAIN: compiled_loss(a, B, 2**62), BLOCKS: compiled_loss(a, B, blockwise.BLOCK)} for B in sizes}
    rng = np.random.default_rng(0)
    sides = [
        rng.standard_normal((rows, a.width), np.float32) / a.width**0.5
        for rows in (a.batch_size, a.batch_size * a.passages_per_query)
    ]
    batch = batch_of_labels(a.batch_size, a.passages_per_query)

    def run(kind: Callable) -> None:
        jax.block_until_ready(kind(*sides, batch))

    return {
        "seconds": in_turns({k: functools.partial(run, kind) for k, kind in kinds[sizes[0]].items()}, a.rounds),
        "scratch_bytes": {
            B: {name: kind.memory_analysis().temp_size_in_bytes for name, kind in of.items()} for B, of in kinds.items()
        },
    }


def compiled_loss(a: argparse.Namespace, B: int, block: int) -> Callable:
    """The loss and its gradient of B queries and their passages, with `block` scores at a time."""
    N = B * a.passages_per_query
    arrays = jax.ShapeDtypeStruct((B, a.width), jnp.float32), jax.ShapeDtypeStruct((N, a.width), jnp.float32)
    loss = lambda q, p, batch: contrastive_loss(q, p, batch, temperature=0.05, mode="example")
    with mock.patch.object(blockwise, "BLOCK", block):
        step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        return step.lower(*arrays, batch_of_labels(B, a.passages_per_query)).compile()


def in_turns(systems: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each by counted round; every round begins with another. Of CPUs, which others may use, processor seconds."""
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(1 + rounds):
        for name in list(systems)[:: 1 if turn % 2 else -1]:
            began = clock()
            systems[name]()
            seconds[name].append(clock() - began)
    return {name: values[1:] for name, values in seconds.items()}


def main() -> None:
    if jax.default_backend() == "cpu":
        from jdmdr import cli

        cli.restart_with_malloc_settings()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "loss"))
    parser.add_argument("--shape", choices=SHAPES, default="small", help="step: of the encoder (%(default)s)")
    parser.add_argument("--batch-size", type=int, help="queries (step: 8, loss: 1024)")
    parser.add_argument("--passages-per-query", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="step: of a passage (%(default)s)")
    parser.add_argument("--grad-cache", type=int, default=16, help="step: sequences encoded at a time (%(default)s)")
    parser.add_argument("--width", type=int, default=256, help="loss: of an embedding (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="counted (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="step: of each kind a round (%(default)s)")
    parser.add_argument("--out", help="a JSON file for the figures")
    a = parser.parse_args()
    a.batch_size = a.batch_size or {"step": 8, "loss": 1024}[a.what]
    found = (measure_step if a.what == "step" else measure_loss)(a)
    plain, other = found["seconds"].values()
    ratios = np.divide(other, plain)
    found |= {"device": f"{jax.device_count()} x {jax.devices()[0].device_kind}", "arguments": vars(a),
              "ratios": ratios.tolist(), "median_ratio": float(np.median(ratios))}  # fmt: skip
    print(json.dumps(found, indent=1))
    print(
        f"{' / '.join(reversed(found['seconds']))}: {np.median(ratios):.3f} ({ratios.min():.3f} to {ratios.max():.3f})"
    )
    if a.out:
        with open(a.out, "w", encoding="utf-8") as out:
            json.dump(found, out, indent=1)


if __name__ == "__main__":
    main()
