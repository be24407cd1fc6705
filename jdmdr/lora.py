"""Low-rank adapters on any encoder: W + (alpha / rank) A B, with A (in x rank) and B (rank x out) trained instead of W.

The sum is made once a step, before the encoder sees the weights, so that no encoder needs to know. What this saves is
the optimiser's memory and the size of the checkpoints; the backward pass costs what it costs with W itself.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022), section 4.1.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdmdr.hashing import stable_hash
from jdmdr.optim import named_leaves
from jdmdr.types import UserError


class Adapter(NamedTuple):
    """What is added to one matrix, but for its factor."""

    a: jax.Array  # rows x rank
    b: jax.Array  # rank x columns


def init(section: Any, params: Any, seed: int) -> Any:
    """Adapters for the matrices whose path matches `section.target`; the encoder stays as it is until they train.

    Of a dense layer's kernel A is random and B zero; of a table of vectors A is zero and B random, so that a row changes
    only once its token was seen. The tree is that of `params`, with an `Adapter` for each of those matrices.

    Raises:
      UserError: no matrix matches, or the rank is not below both sides of one.
    """
    adapters: dict[str, Any] = {}
    matrices = [(name, leaf) for name, leaf in named_leaves(params) if leaf.ndim == 2]
    for name, matrix in matrices:
        if re.search(section.target, name):
            *parents, last = name.split("/")
            node = adapters
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = _new(name, matrix.shape, section.rank, seed)
    if not adapters:
        names = ", ".join(name for name, _ in matrices[:8])
        raise UserError(f"lora.target {section.target!r} matches no matrix; there are {names} ...")
    return adapters


def _new(name: str, shape: tuple[int, int], rank: int, seed: int) -> Adapter:
    if rank >= min(shape):
        raise UserError(
            f"lora.rank is {rank}, but {name} is {shape[0]} x {shape[1]}; take a rank below both, or a lora.target "
            "without it"
        )
    key = jax.random.key(stable_hash(seed, "lora", name) % 2**32)
    if name.endswith("/kernel"):
        a = jax.random.uniform(key, (shape[0], rank), jnp.float32, -1, 1) * shape[0] ** -0.5
        return Adapter(a, jnp.zeros((rank, shape[1]), jnp.float32))
    b = jax.random.normal(key, (rank, shape[1]), jnp.float32) * rank**-0.5
    return Adapter(jnp.zeros((shape[0], rank), jnp.float32), b)


def merge(params: Any, adapters: Any, section: Any, rng: jax.Array | None = None) -> Any:
    """`params` with the adapters added, float32.

    With `rng` a share `section.dropout` of A's rows is left out and the rest scaled up: dropout of the adapters' input,
    drawn once for all tokens of a step.
    """
    out = dict(params)
    for index, (key, adapter) in enumerate(sorted(adapters.items())):
        own_rng = None if rng is None else jax.random.fold_in(rng, index)
        if isinstance(adapter, Adapter):
            out[key] = params[key] + _product(adapter, section, own_rng)
        else:
            out[key] = merge(params[key], adapter, section, own_rng)
    return out


def _product(adapter: Adapter, section: Any, rng: jax.Array | None) -> jax.Array:
    a = adapter.a
    if rng is not None and section.dropout:
        kept = jax.random.bernoulli(rng, 1 - section.dropout, (len(a), 1))
        a = jnp.where(kept, a / (1 - section.dropout), 0.0)
    return section.alpha / section.rank * jnp.matmul(a, adapter.b, precision=jax.lax.Precision.HIGHEST)
