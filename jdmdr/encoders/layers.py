"""Dense layer and LayerNorm with hand-written gradients.

XLA's column sums are slow enough to dominate the gradients of biases and LayerNorm scales; here they are products with
rows of ones. In bfloat16 the gradients of all parameters are accumulated, and come out, in float32.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp


def _column_sum(y_NxD: jax.Array) -> jax.Array:
    # On accelerators 8 rows, all alike: a product with a single row would be turned back into a sum.
    ones_RxN = jnp.ones((1 if jax.default_backend() == "cpu" else 8, y_NxD.shape[0]), y_NxD.dtype)
    return jnp.matmul(ones_RxN, y_NxD, preferred_element_type=jnp.float32)[0]


def _rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


@jax.custom_vjp
def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    """`x @ kernel + bias` over the last axis, in the dtype of `x`; `kernel` is [in, out] and float32."""
    return jnp.matmul(x, kernel.astype(x.dtype)) + bias.astype(x.dtype)


def _dense_forward(x, kernel, bias):
    return dense(x, kernel, bias), (x, kernel)


def _dense_backward(residuals, g):
    x, kernel = residuals
    g_NxO = _rows(g)
    kernel_gradient = jnp.matmul(_rows(x).T, g_NxO, preferred_element_type=jnp.float32)
    return jnp.matmul(g, kernel.astype(g.dtype).T), kernel_gradient, _column_sum(g_NxO)


dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Normalises the last axis to mean 0 and variance 1, then scales and shifts (Ba et al. 2016).

    Statistics are float32; the result has the dtype of `x`.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _standardise(x, mean, rstd):
    return (x.astype(jnp.float32) - mean) * rstd


def _layer_norm_forward(x, scale, bias, eps):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    rstd = jax.lax.rsqrt(jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True) + eps)
    y = _standardise(x, mean, rstd) * scale + bias
    return y.astype(x.dtype), (x, mean, rstd, scale)


def _layer_norm_backward(residuals, g):
    x, mean, rstd, scale = residuals
    g = g.astype(jnp.float32)
    standard = _standardise(x, mean, rstd)
    inner = g * scale
    x_gradient = rstd * (
        inner - jnp.mean(inner, axis=-1, keepdims=True) - standard * jnp.mean(inner * standard, axis=-1, keepdims=True)
    )
    # In the dtype of `x` again: half the memory to pass through, and rounding that evens out in sums over tokens.
    return x_gradient.astype(x.dtype), *(_column_sum(_rows(y.astype(x.dtype))) for y in (g * standard, g)), None


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact Gaussian error linear unit (Hendrycks and Gimpel 2016); its gradient needs `x` alone in memory."""
    return jax.nn.gelu(x, approximate=False)


def _gelu_backward(x, g):
    wide = x.astype(jnp.float32)
    slope = 0.5 * (1 + jax.lax.erf(wide * 0.5**0.5)) + wide * jnp.exp(-0.5 * jnp.square(wide)) * (2 * jnp.pi) ** -0.5
    return ((g.astype(jnp.float32) * slope).astype(x.dtype),)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


class Dense(nn.Module):
    """`dense` with its parameters `kernel` and `bias`."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return dense(x, kernel, bias)


class LayerNorm(nn.Module):
    """`layer_norm` with its parameters `scale` and `bias`."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, self.eps)
