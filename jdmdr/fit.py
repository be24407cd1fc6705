"""Whether a training step fits into memory: compiled and not run, and the largest batch that does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jdmdr import encoders, objectives, optim, parallel, trainable
from jdmdr.encoders import attention
from jdmdr.shapes import Packed, make_side
from jdmdr.step import init_state, make_step

KNOWN_POSITIVES = 8  # of a query in a batch
MOST_GROWTH = 100  # of the batch size from one try to the next
# Machine code is not what is asked for.
OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def step_bytes(config: Any, section: Any, lengths: tuple[int, int], batch_size: int, mesh: Mesh) -> int:
    """Bytes on each device of a step with `batch_size` queries, every text as long as it may be: parameters, optimiser,
    batch and XLA's scratch.

    Args:
      config: of the encoder.
      section: the recipe's `train` or `warmup` keys, with `steps`.
      lengths: of queries and passages, tokens.
    """
    encoder = encoders.build(config)
    objective = objectives.build(section.objective, config, mesh)
    trained, frozen = split_shapes(config, section, objective.parameters)
    optimiser = optim.make_optimiser(section, trained, frozen)
    state = jax.eval_shape(lambda *params: init_state(params[0], optimiser, params[1]), trained, frozen)
    step = make_step(encoder, objective, optimiser, 0, section.lora, mesh, section.grad_cache)
    lowered = step.lower(
        _placed(state, parallel.replicated(mesh)),
        abstract_batch(section, batch_size, lengths, mesh, not attention.packs(config)),
    )
    found = lowered.compile(OPTIONS if mesh.devices.flat[0].platform == "cpu" else None).memory_analysis()
    sizes = found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes
    return sum(sizes) - found.alias_size_in_bytes


def split_shapes(config: Any, section: Any, own: Mapping[str, jax.Array]) -> tuple[Any, Any]:
    """As `trainable.split`, shapes alone."""
    return jax.eval_shape(lambda: trainable.split(section, encoders.build(config).init(jax.random.key(0)), own, 0))


def abstract_batch(section: Any, B: int, lengths: tuple[int, int], mesh: Mesh, pads: bool) -> dict[str, Any]:
    """Shapes of a batch as `batches.make_batch` gives it for an encoder that `pads` sequences (not `attention.packs`), and `parallel.put_batch`
    lays it."""
    N = B * section.passages_per_query

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def block(count: int, length: int) -> Packed | None:
        if not count:
            return None
        side = make_side(
            count, length, chunk_rows=section.chunk_rows, grad_cache=section.grad_cache, devices=mesh.devices.size,
            pads=pads,
        )  # fmt: skip
        T, *widths = side.needed(np.full((1, count), length), 1)[0].tolist()
        R, S = count // side.per_row, side.per_row + 1
        return Packed(array(R, T), array(R, T), array(R, S), array(count), side.of_sequences(widths))

    batch = {
        "queries": block(B, lengths[0]), "passages": block(N, lengths[1]), "target_B": array(B), "passage_ids_N": array(N),
        "first_N": array(N, dtype=bool), "positive_ids_BxM": array(B, KNOWN_POSITIVES), "lang_B": array(B),
        "weight_N": array(N, dtype=jnp.float32), "query_weight_B": array(B, dtype=jnp.float32), "query_index_B": array(B),
    }  # fmt: skip
    return jax.tree.map(
        lambda x: _placed(x, parallel.rows(mesh) if len(x.shape) >= 2 else parallel.replicated(mesh)), batch
    )


def largest_batch(
    bytes_of: Callable[[int], int], start: int, multiple: int, memory: float, tries: int = 5
) -> tuple[int, int]:
    """(the largest batch size found that fits, its bytes); (0, bytes of `multiple` queries) if not even that fits.

    Memory is close to a line in the batch size: each try is near where the line through two others meets `memory`.
    The result is a size that was tried.
    """
    known = {start: bytes_of(start)}
    guess = 2 * start if known[start] <= memory else multiple
    while guess not in known and len(known) < tries:
        known[guess] = bytes_of(guess)
        fitting = [size for size in sorted(known) if known[size] <= memory]
        too_large = [size for size in sorted(known) if known[size] > memory]
        low, high = (fitting[-1], too_large[0]) if fitting and too_large else sorted(known)[-2:]
        slope = max((known[high] - known[low]) / (high - low), 1e-9)
        further = min((memory - known[low]) / slope, MOST_GROWTH * high - low)
        if fitting and too_large:  # a little less than the line says, so that a curve does not end beyond memory again
            further = max(0.9 * further, multiple)
        guess = max(int(low + further) // multiple * multiple, multiple)
    fits = max((size for size in known if known[size] <= memory), default=0)
    return fits, known[fits or min(known)]


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)
