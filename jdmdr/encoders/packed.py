"""Several sequences in one row of a block, one after another, so that every matmul sees all tokens of a batch at once.

Two ways, told apart by `Tokens.lengths_BxS`. Without it every row holds sequences of the same `widths`, padding included,
which are part of the program. With it the lengths are data and no padding stands between sequences, which attention
has to be able to deal with (`attention.packs`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp


def by_sequence(function: Callable[..., jax.Array], widths: Sequence[int], *blocks_BxM: jax.Array) -> jax.Array:
    """Applies `function` to blocks of whole sequences, one call for each run of neighbours of one width T.

    Args:
      function: takes (B * sequences)xTx... of every block and returns (B * sequences)xSx..., S places a sequence.
      blocks_BxM: BxMx... with M the sum of the widths.

    Returns:
      Bx(K * S)x..., what the K sequences of a row give, one after another.
    """
    B, start, found = blocks_BxM[0].shape[0], 0, []
    for width, run in itertools.groupby(widths):
        stop = start + width * len(list(run))
        out = function(*(x[:, start:stop].reshape(-1, width, *x.shape[2:]) for x in blocks_BxM))
        found.append(out.reshape(B, -1, *out.shape[2:]))
        start = stop
    return jnp.concatenate(found, axis=1)


def pool(function: Callable[..., jax.Array], widths: Sequence[int], *blocks_BxM: jax.Array) -> jax.Array:
    """One vector a sequence, (B * K)xD: those of the first row, in order, then those of the next."""
    out_BxKxD = by_sequence(lambda *blocks: function(*blocks)[:, None], widths, *blocks_BxM)
    return out_BxKxD.reshape(-1, out_BxKxD.shape[-1])


def segments(lengths_BxS: jax.Array, T: int) -> jax.Array:
    """Which sequence of its row each of T tokens belongs to, int32 BxT."""
    ends_BxS = jnp.cumsum(lengths_BxS, axis=1)
    return (jnp.arange(T)[:, None] >= ends_BxS[:, None, :]).sum(axis=2, dtype=jnp.int32)


def starts(lengths_BxS: jax.Array) -> jax.Array:
    """Where in its row each sequence begins, BxS."""
    return jnp.cumsum(lengths_BxS, axis=1) - lengths_BxS


def places(lengths_BxS: jax.Array, T: int) -> jax.Array:
    """Place of each of T tokens in its own sequence, BxT, from 0."""
    return jnp.arange(T) - jnp.take_along_axis(starts(lengths_BxS), segments(lengths_BxS, T), axis=1)
