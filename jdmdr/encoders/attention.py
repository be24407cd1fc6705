"""Self-attention over padded sequences."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdmdr.encoders.layers import Dense

MASKED = -1e30  # finite: a row without real tokens attends evenly and stays free of NaN


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2), softmax in float32."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, mask_BxT: jax.Array, deterministic: bool) -> jax.Array:
        B, T, D = x_BxTxD.shape

        def by_head(name: str) -> jax.Array:
            # Explicit [B, H, T, D/H] operands: on CPU a plain batched matmul beats the equivalent einsum.
            return Dense(D, name=name)(x_BxTxD).reshape(B, T, self.heads, -1).transpose(0, 2, 1, 3)

        query, key, value = by_head("query"), by_head("key"), by_head("value")
        query = query * (query.shape[-1] ** -0.5)
        scores_BxHxTxT = jnp.matmul(query, key.transpose(0, 1, 3, 2), preferred_element_type=jnp.float32)
        scores_BxHxTxT = jnp.where(mask_BxT[:, None, None, :] > 0, scores_BxHxTxT, MASKED)
        weights_BxHxTxT = jax.nn.softmax(scores_BxHxTxT, axis=-1).astype(x_BxTxD.dtype)
        weights_BxHxTxT = nn.Dropout(self.dropout)(weights_BxHxTxT, deterministic=deterministic)
        mixed_BxTxD = jnp.matmul(weights_BxHxTxT, value).transpose(0, 2, 1, 3).reshape(B, T, D)
        return Dense(D, name="output")(mixed_BxTxD)
