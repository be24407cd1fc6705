"""From token vectors to one embedding a text."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jdmdr.encoders.packed import segments, starts


def cls(hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The first token's vector."""
    return hidden_BxTxD[:, 0]


def mean(hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The mean over real tokens; zero for a text without any."""
    mask_BxT = mask_BxT.astype(hidden_BxTxD.dtype)
    # The masked sum as a product of [1, T] and [T, D]: nothing of the size of the token vectors is written.
    sum_BxD = jnp.matmul(mask_BxT[:, None, :], hidden_BxTxD)[:, 0]
    return sum_BxD / jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)


def last(hidden_BxTxD: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """The last real token's vector."""
    index_B = jnp.maximum(mask_BxT.sum(axis=1) - 1, 0)
    return jnp.take_along_axis(hidden_BxTxD, index_B[:, None, None], axis=1)[:, 0]


def packed_cls(hidden_BxTxD: jax.Array, lengths_BxS: jax.Array) -> jax.Array:
    return jnp.take_along_axis(hidden_BxTxD, starts(lengths_BxS)[:, :-1, None], axis=1)


def packed_mean(hidden_BxTxD: jax.Array, lengths_BxS: jax.Array) -> jax.Array:
    own_BxSxT = segments(lengths_BxS, hidden_BxTxD.shape[1])[:, None] == jnp.arange(lengths_BxS.shape[1] - 1)[:, None]
    sum_BxSxD = jnp.matmul(own_BxSxT.astype(jnp.float32), hidden_BxTxD, precision=jax.lax.Precision.HIGHEST)
    return sum_BxSxD / jnp.maximum(lengths_BxS[:, :-1, None], 1)


def packed_last(hidden_BxTxD: jax.Array, lengths_BxS: jax.Array) -> jax.Array:
    last_BxS = starts(lengths_BxS) + jnp.maximum(lengths_BxS, 1) - 1
    return jnp.take_along_axis(hidden_BxTxD, last_BxS[:, :-1, None], axis=1)


POOLINGS = {"cls": cls, "mean": mean, "last": last}
# The same for rows of sequences without padding between them (`Tokens.lengths_BxS`), of which the last is padding:
# Bx(S - 1)xD.
PACKED_POOLINGS = {"cls": packed_cls, "mean": packed_mean, "last": packed_last}


def unit_length(x_BxD: jax.Array) -> jax.Array:
    """Rows divided by their Euclidean length; a zero row stays zero, and so does its gradient's direction."""
    square_Bx1 = jnp.sum(jnp.square(x_BxD), axis=-1, keepdims=True)
    return x_BxD * jax.lax.rsqrt(jnp.maximum(square_Bx1, 1e-24))
