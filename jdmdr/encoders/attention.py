"""Self-attention over padded sequences, several of which may stand in one row."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdmdr.encoders.config import EncoderConfig
from jdmdr.encoders.layers import Dense
from jdmdr.encoders.packed import by_sequence, segments, starts
from jdmdr.types import Tokens

TOLERATED = 0.02  # relative error of bfloat16 attention; measured: 0.005
MASKED = -1e30  # finite: a row without real tokens attends evenly and stays free of NaN


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, section 3.2), softmax in float32.

    Where several sequences stand in a row (`packed.py`), each attends to itself alone.
    """

    heads: int
    dropout: float

    @nn.compact
    def __call__(
        self, x_BxTxD: jax.Array, tokens: Tokens, widths: tuple[int, ...] | None, deterministic: bool
    ) -> jax.Array:
        B, T, D = x_BxTxD.shape
        query, key, value = (
            Dense(D, name=name)(x_BxTxD).reshape(B, T, self.heads, -1) for name in ("query", "key", "value")
        )
        dropout = None if deterministic or not self.dropout else nn.Dropout(self.dropout, deterministic=False)
        on_chip = not dropout and has_flash(x_BxTxD.dtype)
        attend = flash if on_chip else functools.partial(plain, dropout)
        if tokens.lengths_BxS is None:
            mixed_BxTxHxE = attend(query, key, value, tokens.mask_BxT)
        elif widths:
            mixed_BxTxHxE = by_sequence(attend, widths, tokens.lengths_BxS, query, key, value)
        else:
            attend = packed_flash if on_chip else functools.partial(packed_plain, dropout)
            mixed_BxTxHxE = attend(query, key, value, tokens.lengths_BxS)
        return Dense(D, name="output")(mixed_BxTxHxE.reshape(B, T, D))


def plain(
    dropout: Callable[[jax.Array], jax.Array] | None,
    q_BxTxHxE: jax.Array,
    k_BxTxHxE: jax.Array,
    v_BxTxHxE: jax.Array,
    mask_BxT: jax.Array,
) -> jax.Array:
    """Attention by matmuls, on any device; the scores, BxHxTxT in float32, are written to memory."""
    return _attend(dropout, q_BxTxHxE, k_BxTxHxE, v_BxTxHxE, mask_BxT[:, None, None, :] > 0)


def packed_plain(
    dropout: Callable[[jax.Array], jax.Array] | None,
    q_BxTxHxE: jax.Array,
    k_BxTxHxE: jax.Array,
    v_BxTxHxE: jax.Array,
    lengths_BxS: jax.Array,
) -> jax.Array:
    """`plain` for sequences that stand one after another: what `packed_flash` is held against."""
    own_BxT = segments(lengths_BxS, q_BxTxHxE.shape[1])
    return _attend(dropout, q_BxTxHxE, k_BxTxHxE, v_BxTxHxE, (own_BxT[:, :, None] == own_BxT[:, None, :])[:, None])


def _attend(dropout, q_BxTxHxE, k_BxTxHxE, v_BxTxHxE, sees_BxHxTxT):
    # Explicit [B, H, T, E] operands: on CPU a plain batched matmul beats the equivalent einsum.
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (q_BxTxHxE, k_BxTxHxE, v_BxTxHxE))
    query = query * (query.shape[-1] ** -0.5)
    if dropout is None:
        return _softmax_mix(query, key, value, sees_BxHxTxT).transpose(0, 2, 1, 3)
    weights_BxHxTxT = dropout(jax.nn.softmax(_scores(query, key, sees_BxHxTxT), axis=-1).astype(query.dtype))
    return jnp.matmul(weights_BxHxTxT, value).transpose(0, 2, 1, 3)


def _scores(query, key, sees_BxHxTxT):
    scores_BxHxTxT = jnp.matmul(query, key.transpose(0, 1, 3, 2), preferred_element_type=jnp.float32)
    return jnp.where(sees_BxHxTxT, scores_BxHxTxT, MASKED)


@jax.custom_vjp
def _softmax_mix(query, key, value, sees_BxHxTxT):
    """softmax(query key^T) value. What is divided are the mixed values, not the weights, and the gradient of the softmax
    takes its sums from the mixed values too (Dao et al. 2022, "FlashAttention", section 3): fewer passes over [T, T]."""
    return _softmax_mix_forward(query, key, value, sees_BxHxTxT)[0]


def _softmax_mix_forward(query, key, value, sees_BxHxTxT):
    scores_BxHxTxT = _scores(query, key, sees_BxHxTxT)
    powers_BxHxTxT = jnp.exp(scores_BxHxTxT - scores_BxHxTxT.max(axis=-1, keepdims=True))
    shares_BxHxTx1 = 1 / powers_BxHxTxT.sum(axis=-1, keepdims=True)
    powers_BxHxTxT = powers_BxHxTxT.astype(query.dtype)
    mixed_BxHxTxE = jnp.matmul(powers_BxHxTxT, value, preferred_element_type=jnp.float32) * shares_BxHxTx1
    mixed_BxHxTxE = mixed_BxHxTxE.astype(query.dtype)
    return mixed_BxHxTxE, (query, key, value, sees_BxHxTxT, powers_BxHxTxT, shares_BxHxTx1, mixed_BxHxTxE)


def _softmax_mix_backward(residuals, g_BxHxTxE):
    query, key, value, sees_BxHxTxT, powers_BxHxTxT, shares_BxHxTx1, mixed_BxHxTxE = residuals
    g_BxHxTxE = (g_BxHxTxE * shares_BxHxTx1).astype(query.dtype)
    mean_BxHxTx1 = jnp.sum(g_BxHxTxE * mixed_BxHxTxE, axis=-1, keepdims=True, dtype=jnp.float32)
    slope_BxHxTxT = (
        jnp.matmul(g_BxHxTxE, value.transpose(0, 1, 3, 2), preferred_element_type=jnp.float32) - mean_BxHxTx1
    )
    of_scores_BxHxTxT = jnp.where(sees_BxHxTxT, powers_BxHxTxT * slope_BxHxTxT, 0).astype(query.dtype)
    to_keys = _transposed_product(of_scores_BxHxTxT, query)
    to_values = _transposed_product(powers_BxHxTxT, g_BxHxTxE)
    return jnp.matmul(of_scores_BxHxTxT, key), to_keys, to_values, None


def _transposed_product(a, b):
    """a^T b; on CPU transposing b and the result takes two thirds of what a product that reads `a` by columns takes."""
    b_transposed = jax.lax.optimization_barrier(b.transpose(0, 1, 3, 2))
    return jnp.matmul(b_transposed, a).transpose(0, 1, 3, 2)


_softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def flash(q_BxTxHxE: jax.Array, k_BxTxHxE: jax.Array, v_BxTxHxE: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Attention by cuDNN, which keeps the scores on the chip and skips padding; what padding tokens get is zero."""
    # A sequence of padding alone attends to its first token, so that it stays finite.
    lengths_B = jnp.maximum(mask_BxT.sum(axis=1), 1)
    return jax.nn.dot_product_attention(
        q_BxTxHxE,
        k_BxTxHxE,
        v_BxTxHxE,
        query_seq_lengths=lengths_B,
        key_value_seq_lengths=lengths_B,
        implementation="cudnn",
    )


def packed_flash(q_BxTxHxE: jax.Array, k_BxTxHxE: jax.Array, v_BxTxHxE: jax.Array, lengths_BxS: jax.Array) -> jax.Array:
    """`flash` for sequences that stand one after another.

    jax has this below its public function alone, which takes no offsets. Padding is a sequence too: cuDNN leaves what is
    in none unwritten.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    lengths_BxS = lengths_BxS.astype(jnp.int32)
    offsets_BxS1 = jnp.pad(starts(lengths_BxS), ((0, 0), (0, 1)), constant_values=-1)
    return dot_product_attention(
        q_BxTxHxE,
        k_BxTxHxE,
        v_BxTxHxE,
        q_seqlen=lengths_BxS,
        kv_seqlen=lengths_BxS,
        q_offsets=offsets_BxS1,
        kv_offsets=offsets_BxS1,
        scale=q_BxTxHxE.shape[-1] ** -0.5,
        mask_type=MaskType.PADDING,
    )


def has_flash(dtype: jnp.dtype) -> bool:
    """Whether cuDNN's attention runs on this machine's devices; it has no dropout of its own."""
    return jax.default_backend() == "gpu" and dtype == jnp.bfloat16


def packs(config: EncoderConfig) -> bool:
    """Whether this encoder takes packed sequences as they lie on this machine's devices; else each is padded to a width,
    which is part of the program."""
    able = config.kind == "transformer" and not config.window and not config.attention_dropout
    return able and has_flash(jnp.dtype(config.dtype)) and packed_error(config.width // config.heads) < TOLERATED


@functools.cache
def packed_error(head_width: int) -> float:
    """Relative error of `packed_flash` in bfloat16 against `packed_plain` in float32 on these devices, the largest of
    values and gradients; infinite where it does not run. A private function of jax may change or be gone."""
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (2, 96, 2, head_width)) for i in range(4))
    lengths = jnp.array([[40, 30, 1, 25], [5, 64, 26, 1]])

    def values_and_gradients(attend, dtype):
        def out(q, k, v):
            return attend(*(x.astype(dtype) for x in (q, k, v)), lengths).astype(jnp.float32)

        gradient = jax.grad(lambda *x: (out(*x) * weight).sum(), argnums=(0, 1, 2))
        return jax.jit(lambda *x: (out(*x), *gradient(*x)))(q, k, v)

    try:
        found = values_and_gradients(packed_flash, jnp.bfloat16)
    except (ImportError, TypeError, ValueError, RuntimeError, NotImplementedError):
        return math.inf
    exact = values_and_gradients(functools.partial(packed_plain, None), jnp.float32)
    errors = [jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in zip(found, exact, strict=True)]
    return float(jnp.nan_to_num(jnp.stack(errors), nan=jnp.inf).max())
