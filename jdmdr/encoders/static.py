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
from jdmdr.encoders.pooling import packed_sum
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
        mask_BxT = jnp.asarray(tokens.mask_BxT)
        vectors_BxTxD = params["embedding"][tokens.ids_BxT]
        weights_BxT = jax.nn.softplus(params["weight"][tokens.ids_BxT]) * mask_BxT
        if output == "tokens":
            return vectors_BxTxD * weights_BxT[:, :, None]
        if tokens.lengths_BxS is not None:
            sum_BxSxD = packed_sum(vectors_BxTxD * weights_BxT[:, :, None], tokens.lengths_BxS)
            return (sum_BxSxD / jnp.maximum(tokens.lengths_BxS[:, :-1, None], 1)).reshape(-1, self.config.width)
        sum_BxD = jnp.matmul(weights_BxT[:, None, :], vectors_BxTxD)[:, 0]
        return sum_BxD / jnp.maximum(mask_BxT.sum(axis=1, keepdims=True), 1)


def init_from_idf(rng: jax.Array, config: EncoderConfig, idf_V: np.ndarray) -> Params:
    """Random vectors of expected length 1, and weights whose softplus is `idf_V` (at least 0.001)."""
    embedding_VxD = jax.random.normal(rng, (config.vocab_size, config.width), jnp.float32) * config.width**-0.5
    return {"embedding": embedding_VxD, "weight": jnp.asarray(inverse_softplus(idf_V), jnp.float32)}


def inverse_softplus(y: np.ndarray) -> np.ndarray:
    """The x with log(1 + exp(x)) = max(y, 0.001), float64."""
    y = np.maximum(np.asarray(y, np.float64), SMALLEST_WEIGHT)
    return y + np.log(-np.expm1(-y))
