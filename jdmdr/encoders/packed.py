"""Several sequences in one row, one after another without padding between them (`Tokens.lengths_BxS`), so that every
matmul sees all tokens of a batch and no others; and blocks in which each is padded to a width of its own, for attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Places(NamedTuple):
    """Where the tokens of packed rows stand in blocks padded to the `widths` of their sequences, and the other way round."""

    token_BxP: jax.Array  # of each place of the blocks, its token's place in the row
    filled_BxP: jax.Array  # whether there is one
    place_BxT: jax.Array  # of each token, its place in the blocks
    real_BxT: jax.Array  # whether it is of a sequence

    @classmethod
    def of(cls, lengths_BxS: jax.Array, T: int, widths: tuple[int, ...]) -> Places:
        """For rows of T tokens."""
        sequence_P = np.repeat(np.arange(len(widths)), widths)
        first_S = np.cumsum([0, *widths[:-1]])
        own_P = np.arange(sum(widths)) - first_S[sequence_P]
        sequence_BxT = segments(lengths_BxS, T)
        real_BxT = sequence_BxT < len(widths)
        return cls(
            jnp.minimum(starts(lengths_BxS)[:, sequence_P] + own_P, T - 1),
            own_P < lengths_BxS[:, sequence_P],
            jnp.where(real_BxT, jnp.asarray(first_S)[sequence_BxT] + places(lengths_BxS, T), 0),
            real_BxT,
        )

    def spread(self, x_BxTxD: jax.Array) -> jax.Array:
        """Rows to blocks, BxPxD, zero where no token is."""
        return _take(x_BxTxD, *self)

    def collect(self, x_BxPxD: jax.Array) -> jax.Array:
        """Blocks to rows, BxTxD, zero behind the sequences."""
        return _take(x_BxPxD, self.place_BxT, self.real_BxT, self.token_BxP, self.filled_BxP)


@jax.custom_vjp
def _take(x_BxMxD, index_BxN, valid_BxN, back_BxM, valid_back_BxM):
    """Rows of x by index, zero where not valid. Each row is taken at most once, and `back` tells where it went: so the
    gradient is such a taking too, where that of a gather would be a scatter."""
    del back_BxM, valid_back_BxM
    taken_BxNxD = jnp.take_along_axis(x_BxMxD, index_BxN[:, :, None], axis=1, mode="promise_in_bounds")
    return jnp.where(valid_BxN[:, :, None], taken_BxNxD, 0)


def _take_forward(x_BxMxD, *places):
    return _take(x_BxMxD, *places), places


def _take_backward(places, g_BxNxD):
    index_BxN, valid_BxN, back_BxM, valid_back_BxM = places
    return _take(g_BxNxD, back_BxM, valid_back_BxM, index_BxN, valid_BxN), None, None, None, None


_take.defvjp(_take_forward, _take_backward)


def by_sequence(
    function: Callable[..., jax.Array], widths: tuple[int, ...], lengths_BxS: jax.Array, *blocks_BxTxM: jax.Array
) -> jax.Array:
    """Applies `function` to packed sequences, one call for each run of neighbours of one width W.

    Args:
      function: takes (B * sequences)xWxM of every block and the mask of their tokens, and returns (B * sequences)xWxM.
      widths: that each sequence of a row is padded to, none shorter than its sequence.

    Returns:
      BxTxM, packed like the blocks, zero behind the sequences.
    """
    B, T = blocks_BxTxM[0].shape[:2]
    where, found = _apply(function, widths, lengths_BxS, blocks_BxTxM)
    placed_BxPxM = jnp.concatenate([out.reshape(B, -1, math.prod(out.shape[2:])) for out in found], axis=1)
    return where.collect(placed_BxPxM).reshape(B, T, *found[0].shape[2:])


def pool(
    function: Callable[..., jax.Array], widths: tuple[int, ...], lengths_BxS: jax.Array, *blocks_BxTxM: jax.Array
) -> jax.Array:
    """As `by_sequence` for a function that gives (B * sequences)xD: a vector for each sequence, those of the first row first."""
    B = len(lengths_BxS)
    _, found = _apply(function, widths, lengths_BxS, blocks_BxTxM)
    return jnp.concatenate([out.reshape(B, -1, out.shape[-1]) for out in found], axis=1).reshape(-1, found[0].shape[-1])


def _apply(function, widths, lengths_BxS, blocks_BxTxM) -> tuple[Places, list[jax.Array]]:
    """What `function` gives for each run of neighbours of one width, from their blocks and the mask of their tokens."""
    B, T = blocks_BxTxM[0].shape[:2]
    where = Places.of(lengths_BxS, T, widths)
    spread = [where.spread(x.reshape(B, T, -1)).reshape(B, -1, *x.shape[2:]) for x in blocks_BxTxM]
    spread.append(where.filled_BxP.astype(jnp.int32))
    start, found = 0, []
    for width, run in itertools.groupby(widths):
        stop = start + width * len(list(run))
        found.append(function(*(x[:, start:stop].reshape(-1, width, *x.shape[2:]) for x in spread)))
        start = stop
    return where, found


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
