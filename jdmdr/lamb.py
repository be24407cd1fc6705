"""LAMB as STAR and ANCE train with it; `optax.lamb` differs in bias correction and in the clamp.

Per parameter tensor w with gradient g:

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   u = m / (sqrt(v) + eps) + decay w
    w <- w - rate * min(|w|, 10) / |u| * u                the ratio is 1 where either norm is 0

Sources: You et al., "Large Batch Optimization for Deep Learning" (ICLR 2020), first version, which clamps the weight
norm and corrects no bias; Xiong et al. (ICLR 2021) and Zhan et al. (SIGIR 2021) for its use.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

LARGEST_NORM = 10.0


class Moments(NamedTuple):
    """Running means of the gradient and of its square."""

    first: Any
    second: Any


def lamb(
    rate: optax.ScalarOrSchedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.0,
    mask: Any = None,
) -> optax.GradientTransformation:  # fmt: skip
    """The transformation above; `mask` is a tree of booleans, or a function to one, of the tensors that decay."""
    return optax.chain(
        _scale_by_moments(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask),
        _scale_by_trust_ratio(),
        optax.scale_by_learning_rate(rate),
    )


def _scale_by_moments(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    def init(params):
        return Moments(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))

    def update(gradient, state, params=None):
        first = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.first, gradient)
        second = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.second, gradient)
        scaled = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return scaled, Moments(first, second)

    return optax.GradientTransformation(init, update)


def _scale_by_trust_ratio() -> optax.GradientTransformation:
    def scale(u, w):
        weight_norm = jnp.minimum(jnp.linalg.norm(w), LARGEST_NORM)
        update_norm = jnp.linalg.norm(u)
        known = (weight_norm > 0) & (update_norm > 0)
        return u * jnp.where(known, weight_norm / jnp.where(known, update_norm, 1), 1)

    return optax.stateless(lambda updates, params: jax.tree.map(scale, updates, params))
