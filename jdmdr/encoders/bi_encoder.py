"""A bi-encoder of any kind: one tower for queries and passages or one for each, and what comes behind the pooling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdmdr.encoders.config import Encoder, EncoderConfig, Params
from jdmdr.encoders.layers import layer_norm
from jdmdr.encoders.pooling import unit_length
from jdmdr.types import Tokens, UserError

SIDES = ("query", "passage")
HEAD = "projection"  # its key among a tower's parameters
HEAD_ACTIVATIONS = {"identity": lambda x: x, "tanh": jnp.tanh}
HEAD_EPS = 1e-5  # of its LayerNorm: torch's default, which RoBERTa's published heads have


@dataclasses.dataclass(frozen=True)
class BiEncoder:
    """`encoder` of `config.kind`, a linear head behind its pooling where `config.projection` is set, and unit length
    where `config.normalize` is.

    Parameters: those of the encoder with `projection/kernel` DxE and perhaps `projection/bias` E beside them, and with a
    LayerNorm `projection/norm/scale` and `projection/norm/bias` E; untied, such a tree under `query` and one under
    `passage`.
    """

    config: EncoderConfig
    encoder: Encoder

    def init(self, rng: jax.Array) -> Params:
        """Random parameters, float32; both towers start equal."""
        params = self.encoder.init(rng)
        if self.config.projection:
            params = {**params, HEAD: init_head(jax.random.fold_in(rng, 1), self.config)}
        return untie(params) if self.config.untied else params

    def tower(self, params: Params, side: str) -> Params:
        """The parameters that embed one side, `query` or `passage`: what `apply` takes."""
        return params[side] if self.config.untied else params

    def apply(
        self,
        params: Params,
        tokens: Tokens,
        output: str = "pooled",
        rng: jax.Array | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """Embeddings, float32 BxE (`output='pooled'`), or token vectors, float32 BxTxD (`'tokens'`), by one tower.

        See `Encoder.apply`.
        """
        out = self.encoder.apply(params, tokens, output, rng, widths)
        if output == "tokens":
            return out
        if self.config.projection:
            out = project(params[HEAD], out, self.config.projection_activation)
        return unit_length(out) if self.config.normalize else out


def project(head: Params, pooled_BxD: jax.Array, activation: str) -> jax.Array:
    """The linear head and what stands behind it, in float32."""
    out_BxE = jnp.matmul(pooled_BxD, head["kernel"], precision=jax.lax.Precision.HIGHEST) + head.get("bias", 0.0)
    out_BxE = HEAD_ACTIVATIONS[activation](out_BxE)
    return layer_norm(out_BxE, head["norm"]["scale"], head["norm"]["bias"], HEAD_EPS) if "norm" in head else out_BxE


def init_head(rng: jax.Array, config: EncoderConfig) -> Params:
    """A random orthogonal map: inner products stay as they are, or nearly so if it is narrower than the vectors."""
    wide, narrow = config.width, config.projection
    scale = max(1.0, wide / narrow) ** 0.5
    head = {"kernel": jax.nn.initializers.orthogonal(scale)(rng, (wide, narrow), jnp.float32)}
    if config.projection_bias:
        head["bias"] = jnp.zeros(narrow, jnp.float32)
    if config.projection_norm:
        head["norm"] = {"scale": jnp.ones(narrow, jnp.float32), "bias": jnp.zeros(narrow, jnp.float32)}
    return head


def add_head(
    rng: jax.Array, config: EncoderConfig, params: Params, width: int, bias: bool, norm: bool = False
) -> tuple[EncoderConfig, Params]:
    """The encoder with a new head of this width, the same in both towers."""
    config = dataclasses.replace(config, projection=width, projection_bias=bias, projection_norm=norm)
    return config, _map_towers(config, params, lambda tower: {**tower, HEAD: init_head(rng, config)})


def untie(params: Params) -> Params:
    """A tower for each side, equal and in memory of their own: the step donates its buffers, each once."""
    return {side: jax.tree.map(jnp.array, params) for side in SIDES}


def truncate(config: EncoderConfig, params: Params, dimensions: int) -> tuple[EncoderConfig, Params]:
    """The encoder that gives the first `dimensions` of the embeddings, at unit length again if `config.normalize`.

    The head is cut; an encoder without one gets one that copies the first dimensions.

    Raises:
      UserError: the embeddings have fewer, or come out of a LayerNorm.
    """
    if config.projection_norm:
        raise UserError(
            f"encode.dimensions is {dimensions}, but the encoder's head ends in a LayerNorm, whose vectors cannot be cut; set "
            "it to 0"
        )
    if dimensions > config.embedding_width:
        raise UserError(f"encode.dimensions is {dimensions}, but the embeddings have {config.embedding_width}")

    def cut(tower: Params) -> Params:
        head = tower.get(HEAD, {"kernel": jnp.eye(config.width, dtype=jnp.float32)})
        return {**tower, HEAD: {name: array[..., :dimensions] for name, array in head.items()}}

    return dataclasses.replace(config, projection=dimensions), _map_towers(config, params, cut)


def _map_towers(config: EncoderConfig, params: Params, change: Callable[[Params], Params]) -> Params:
    return {side: change(params[side]) for side in SIDES} if config.untied else change(params)
