"""The transformer encoder: BERT, RoBERTa, XLM-R and Longformer (Devlin et al. 2019, Liu et al. 2019, Conneau et al. 2020,
Beltagy et al. 2020).

One implementation for mBERT, mDPR, mE5, BGE-M3, MiniLM and their kin; the families differ in where position ids start, and
Longformer in its attention.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdmdr.encoders.attention import SelfAttention
from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.encoders.layers import Dense, LayerNorm, gelu
from jdmdr.encoders.long_attention import MOST_GLOBAL, SlidingAttention
from jdmdr.encoders.packed import Places, by_sequence, places
from jdmdr.encoders.pooling import PACKED_POOLINGS, POOLINGS
from jdmdr.types import Tokens, UserError

ACTIVATIONS = {
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class Embeddings(nn.Module):
    """Word, position and type vectors summed and normalised."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Tokens, widths: tuple[int, ...] | None, deterministic: bool) -> jax.Array:
        c = self.config

        def table(name: str, rows: int) -> jax.Array:
            return self.param(name, nn.initializers.normal(0.02), (rows, c.width))

        T = tokens.ids_BxT.shape[1]
        x_BxTxD = table("word", c.vocab_size)[tokens.ids_BxT]
        position = table("position", c.max_positions)
        first = c.first_position
        lengths_BxS = tokens.lengths_BxS
        # Slices, not a gather by token: their gradient is a sum over rows instead of a scatter into few rows.
        if lengths_BxS is None:
            own = position[first : first + T]
        elif widths:
            own_PxD = jnp.concatenate([position[first : first + width] for width in widths])
            where = Places.of(lengths_BxS, T, widths)
            own = where.collect(jnp.broadcast_to(own_PxD, (len(x_BxTxD), *own_PxD.shape)))
        else:
            own = position[jnp.minimum(first + places(lengths_BxS, T), c.max_positions - 1)]
        if c.family == "bert":
            x_BxTxD += own
        else:  # padding keeps the padding id's own row
            x_BxTxD += jnp.where(tokens.mask_BxT[:, :, None] > 0, own, position[c.pad_token_id])
        type_ = table("type", c.type_vocab)
        x_BxTxD += type_[0] if tokens.segments_BxT is None else type_[tokens.segments_BxT]
        x_BxTxD = LayerNorm(c.layer_norm_eps, name="norm")(x_BxTxD).astype(c.dtype)
        return nn.Dropout(c.hidden_dropout)(x_BxTxD, deterministic=deterministic)


class Layer(nn.Module):
    """Self-attention and a feed-forward layer, each with a residual and LayerNorm after it."""

    config: EncoderConfig
    most_global: int = 0  # with a window

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, tokens: Tokens, widths: tuple[int, ...] | None, deterministic: bool
    ) -> jax.Array:
        c = self.config
        dropout = nn.Dropout(c.hidden_dropout, deterministic=deterministic)
        if c.window:
            attention = SlidingAttention(c.heads, c.attention_dropout, c.window, self.most_global, name="attention")

            def attend(x_BxTxD, mask_BxT):
                alone_Bx1 = jnp.full((len(mask_BxT), 1), self.most_global)
                prefix_Bx1 = alone_Bx1 if tokens.prefix_Bx1 is None else tokens.prefix_Bx1
                return attention(x_BxTxD, mask_BxT, prefix_Bx1, deterministic)

            if tokens.lengths_BxS is None:
                y_BxTxD = attend(x_BxTxD, tokens.mask_BxT)
            else:
                y_BxTxD = by_sequence(attend, widths, tokens.lengths_BxS, x_BxTxD)
        else:
            attention = SelfAttention(c.heads, c.attention_dropout, name="attention")
            y_BxTxD = attention(x_BxTxD, tokens, widths, deterministic)
        x_BxTxD = LayerNorm(c.layer_norm_eps, name="attention_norm")(x_BxTxD + dropout(y_BxTxD))
        y_BxTxD = ACTIVATIONS[c.activation](Dense(c.ffn, name="ffn_in")(x_BxTxD))
        y_BxTxD = Dense(c.width, name="ffn_out")(y_BxTxD)
        return LayerNorm(c.layer_norm_eps, name="ffn_norm")(x_BxTxD + dropout(y_BxTxD))


class Transformer(nn.Module):
    """Token sequences to token vectors, BxTxD in `config.dtype`; `widths` are for attention (`packed.by_sequence`)."""

    config: EncoderConfig

    @nn.compact
    def __call__(self, tokens: Tokens, widths: tuple[int, ...] | None, deterministic: bool) -> jax.Array:
        c = self.config
        layer = nn.remat(Layer, static_argnums=(3, 4)) if c.remat else Layer
        most_global = MOST_GLOBAL
        if tokens.prefix_Bx1 is None:  # a text alone: what is pooled from its first token must have seen all of it
            most_global = 1 if c.pooling == "cls" else 0
        x_BxTxD = Embeddings(c, name="embeddings")(tokens, widths, deterministic)
        for i in range(c.layers):
            x_BxTxD = layer(c, most_global, name=f"layer_{i}")(x_BxTxD, tokens, widths, deterministic)
        return x_BxTxD


@dataclasses.dataclass(frozen=True)
class TransformerEncoder:
    """A transformer with pooling; see `Encoder` for its members."""

    config: EncoderConfig

    def init(self, rng: jax.Array) -> Params:
        one = jnp.ones((1, 1), jnp.int32)
        init = jax.jit(Transformer(self.config).init, static_argnums=(2, 3))
        return init(rng, Tokens(one, one), (1,), True)["params"]

    def apply(
        self,
        params: Params,
        tokens: Tokens,
        output: str = "pooled",
        rng: jax.Array | None = None,
        widths: tuple[int, ...] | None = None,
    ) -> jax.Array:
        """See `Encoder.apply`.

        Raises:
          UserError: the sequences are longer than the position table.
        """
        c = self.config
        longest = tokens.ids_BxT.shape[1] if tokens.lengths_BxS is None else max(widths or (0,))
        if longest > c.usable_positions:
            raise UserError(
                f"a text has {longest} tokens, but this encoder has positions for {c.usable_positions}; lower its length"
            )
        tokens = jax.tree.map(jnp.asarray, tokens)
        rngs = None if rng is None else {"dropout": rng}
        hidden_BxTxD = Transformer(c).apply({"params": params}, tokens, widths, rng is None, rngs=rngs)
        hidden_BxTxD = hidden_BxTxD.astype(jnp.float32)
        if output == "tokens":
            return hidden_BxTxD
        if tokens.lengths_BxS is not None:
            return PACKED_POOLINGS[c.pooling](hidden_BxTxD, tokens.lengths_BxS).reshape(-1, c.width)
        return POOLINGS[c.pooling](hidden_BxTxD, tokens.mask_BxT)
