"""Token vectors without layers: a text is the weighted mean of its tokens' vectors.

It trains in seconds on a CPU. Random vectors with weights that start at the inverse document frequency begin close to
lexical matching; training moves both.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.encoders.packed import pool
from jdmdr.types import Tokens

SMALLEST_WEIGHT = 1e-3  # softplus comes near 0 only for weights so negative that they no longer learn


@dataclasses.dataclass(frozen=True)
class StaticEncoder:
    """Parameters: `embedding` VxD and `weight` V; token t counts softplus(weight_t). See `Encoder` for the members."""

    config: EncoderConfig

    def init(self, rng: jax.Array) -> Params:
        return init_from_idf(rng, self.config, np.ones(self.config.vocab_size))

    def apply(
        self,
        params: Params,
        tokens: Tokens,
        output: str = "pooled",
        rng: jax.Array | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """See `Encoder.apply`; token vectors come weighted, and there is no dropout."""

        def weighted(ids_BxT: jax.Array, mask_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.nn.softplus(params["weight"][ids_BxT]) * mask_BxT, params["embedding"][ids_BxT]

        def weighted_mean(ids_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
            weights_BxT, vectors_BxTxD = weighted(ids_BxT, mask_BxT)
            sum_BxD = jnp.matmul(weights_BxT[:, None, :], vectors_BxTxD)[:, 0]
            return sum_BxD / jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)

        ids_BxT, mask_BxT = jnp.asarray(tokens.ids_BxT), jnp.asarray(tokens.mask_BxT)
        if output == "tokens":
            weights_BxT, vectors_BxTxD = weighted(ids_BxT, mask_BxT)
            return vectors_BxTxD * weights_BxT[:, :, None]
        if tokens.lengths_BxS is not None:
            return pool(weighted_mean, widths, tokens.lengths_BxS, ids_BxT)
        return weighted_mean(ids_BxT, mask_BxT)


def init_from_idf(rng: jax.Array, config: EncoderConfig, idf_V: np.ndarray) -> Params:
    """Random vectors of expected length 1, and weights whose softplus is `idf_V` (at least 0.001)."""
    embedding_VxD = jax.random.normal(rng, (config.vocab_size, config.width), jnp.float32) * config.width**-0.5
    return {"embedding": embedding_VxD, "weight": jnp.asarray(inverse_softplus(idf_V), jnp.float32)}


def inverse_softplus(y: np.ndarray) -> np.ndarray:
    """The x with log(1 + exp(x)) = max(y, 0.001), float64."""
    y = np.maximum(np.asarray(y, np.float64), SMALLEST_WEIGHT)
    return y + np.log(-np.expm1(-y))
