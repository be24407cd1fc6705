"""Sliding-window self-attention with a global prefix: cost and memory linear in the length of the text.

With c = window / 2, G the first `prefix` tokens of a row and N(i) the other real tokens within c places of i,

    i not in G   o_i = sum over j in G u N(i) of softmax_j( q_i . k_j / sqrt(d) ) v_j      one softmax over both groups
    i in G       o_i = sum over all real j of softmax_j( q'_i . k'_j / sqrt(d) ) v'_j      projections of their own

which is Longformer's attention (Beltagy et al. 2020, section 3) with the global tokens in front: a query before its
document (Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval", WWW 2021), or the first token alone.
Being a prefix they are a slice, and need no gather.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdmdr.encoders.attention import MASKED
from jdmdr.encoders.layers import Dense

BLOCK = 64  # tokens, at least: a smaller block has too little work for a matrix unit
MOST_GLOBAL = 64  # tokens of a prefix: the shape of what sees everything is fixed


class SlidingAttention(nn.Module):
    """Multi-head attention over a window and a prefix of at most `most_global` tokens, softmax in float32.

    Parameters: those of `SelfAttention`, and `query_global`, `key_global` and `value_global` beside them.
    """

    heads: int
    dropout: float
    window: int  # tokens that one token sees of its neighbourhood, half of them on each side, without itself; even
    most_global: int

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, mask_BxT: jax.Array, prefix_Bx1: jax.Array, deterministic: bool
    ) -> jax.Array:
        """Args: prefix_Bx1: int32, how many leading tokens of each row are global; beyond `most_global` they are local."""
        B, T, D = x_BxTxD.shape
        drop = nn.Dropout(self.dropout, deterministic=deterministic)

        def by_head(name: str, x: jax.Array) -> jax.Array:
            return Dense(D, name=name)(x).reshape(B, -1, self.heads, D // self.heads).transpose(0, 2, 1, 3)

        G = min(self.most_global, T)
        global_BxT = (jnp.arange(T) < jnp.minimum(prefix_Bx1, G)) & (mask_BxT > 0)
        scale = (D // self.heads) ** -0.5
        local = windowed(
            by_head("query", x_BxTxD) * scale, by_head("key", x_BxTxD), by_head("value", x_BxTxD),
            (mask_BxT > 0) & ~global_BxT, global_BxT[:, :G], self.window // 2, drop,
        )  # fmt: skip
        # The rows of the prefix see every real token.
        query_BxHxGxE = by_head("query_global", x_BxTxD[:, :G]) * scale
        key_BxHxTxE, value_BxHxTxE = by_head("key_global", x_BxTxD), by_head("value_global", x_BxTxD)
        weights = _softmax(_scores(query_BxHxGxE, key_BxHxTxE), (mask_BxT > 0)[:, None, None, :])
        whole = jnp.matmul(drop(weights.astype(x_BxTxD.dtype)), value_BxHxTxE)
        first = jnp.where(global_BxT[:, None, :G, None], whole, local[:, :, :G])
        mixed_BxTxD = jnp.concatenate([first, local[:, :, G:]], axis=2).transpose(0, 2, 1, 3).reshape(B, T, D)
        return Dense(D, name="output")(mixed_BxTxD)


def windowed(
    query_BxHxTxE: jax.Array, key_BxHxTxE: jax.Array, value_BxHxTxE: jax.Array, local_BxT: jax.Array,
    global_BxG: jax.Array, reach: int, drop=lambda weights: weights, block: int | None = None,
) -> jax.Array:  # fmt: skip
    """Attention of every token to the local tokens within `reach` places and to the global ones among the first G.

    Computed block by block: a block of queries sees the keys of its own block and of the two beside it.

    Args:
      query_BxHxTxE: scaled already; E is the width of a head.
      local_BxT, global_BxG: which keys count, each in its group; no token is in both.
      block: tokens a block; more than `reach` changes nothing but the speed. None: a size that suits the devices.

    Returns:
      B x H x T x E. Rows without any key attend evenly.
    """
    B, H, T, E = query_BxHxTxE.shape
    G = global_BxG.shape[1]
    block = min(block or max(reach, BLOCK), T)
    beside = (0,) if block == T else (-1, 0, 1)  # one block sees itself alone
    nb = -(-T // block)
    padding = nb * block - T

    def blocks(x: jax.Array) -> jax.Array:
        """B x ... x T x E -> B x ... x nb x block x E."""
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, padding), (0, 0)])
        return x.reshape(*x.shape[:-2], nb, block, x.shape[-1])

    def neighbours(x: jax.Array) -> jax.Array:
        """Each block with those beside it: ... x nb x (len(beside) * block) x E."""
        own = blocks(x)
        padded = jnp.pad(own, [(0, 0)] * (own.ndim - 3) + [(1, 1), (0, 0), (0, 0)])
        parts = [jax.lax.slice_in_dim(padded, 1 + i, 1 + i + nb, axis=own.ndim - 3) for i in beside]
        return jnp.concatenate(parts, axis=-2)

    keys = neighbours(key_BxHxTxE)  # B x H x nb x K x E
    queries = blocks(query_BxHxTxE)
    here = jnp.arange(block)[:, None]
    there = jnp.concatenate([i * block + jnp.arange(block) for i in beside])
    near = jnp.abs(here - there) <= reach  # block x K
    counts = near & (neighbours(local_BxT[..., None])[..., 0])[:, None, :, None, :]  # B x 1 x nb x block x K
    prefix = jnp.broadcast_to(global_BxG[:, None, None, None, :], (B, 1, nb, block, G))
    scores = jnp.concatenate(
        [_scores(queries, keys), _scores(queries, key_BxHxTxE[:, :, None, :G])], axis=-1
    )  # B x H x nb x block x (K + G)
    weights = drop(_softmax(scores, jnp.concatenate([counts, prefix], axis=-1)).astype(value_BxHxTxE.dtype))
    K = keys.shape[-2]
    mixed = jnp.matmul(weights[..., :K], neighbours(value_BxHxTxE))
    mixed += jnp.matmul(weights[..., K:], value_BxHxTxE[:, :, None, :G])
    return mixed.reshape(B, H, nb * block, E)[:, :, :T]


def _scores(queries: jax.Array, keys: jax.Array) -> jax.Array:
    return jnp.matmul(queries, jnp.swapaxes(keys, -1, -2), preferred_element_type=jnp.float32)


def _softmax(scores: jax.Array, counts: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(counts, scores, MASKED), axis=-1)
