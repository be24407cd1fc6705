"""The temperature of a softmax over scores: a constant of the recipe, or learned between two bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.types import UserError

LOG_TEMPERATURE = "log_temperature"


def parameters(config: Any) -> dict[str, jax.Array]:
    """The objective's own parameters: the logarithm of `config.temperature`, or none where it is a constant.

    Raises:
      UserError: it is not positive, or outside its bounds.
    """
    if not config.temperature > 0:
        raise UserError(f"objective.temperature is {config.temperature!r}; it divides the scores and must be positive.")
    if not config.learn_temperature:
        return {}
    if not 0 < config.min_temperature <= config.temperature <= config.max_temperature:
        raise UserError(
            f"objective.temperature is {config.temperature!r}; with learn_temperature it starts between "
            f"min_temperature ({config.min_temperature!r}, above 0) and max_temperature ({config.max_temperature!r})"
        )
    return {LOG_TEMPERATURE: jnp.float32(np.log(config.temperature))}


def value(config: Any, own: dict[str, jax.Array]) -> jax.Array | float:
    """The temperature of this step."""
    if LOG_TEMPERATURE not in own:
        return config.temperature
    return jnp.exp(_bounded(own[LOG_TEMPERATURE], np.log(config.min_temperature), np.log(config.max_temperature)))


def metrics(config: Any, own: dict[str, jax.Array]) -> dict[str, jax.Array | float]:
    """What a step logs of a learned temperature."""
    return {"temperature": value(config, own)} if LOG_TEMPERATURE in own else {}


def figures(config: Any) -> Callable[[Any], dict[str, float]]:
    """What a person wants to know of a learned temperature in the end."""
    return lambda own: {name: float(number) for name, number in metrics(config, own).items()}


@jax.custom_vjp
def _bounded(x: jax.Array, low: float, high: float) -> jax.Array:
    """`x` within its bounds; at a bound only a gradient that leads back inside passes, so that x can return."""
    return jnp.clip(x, low, high)


def _forward(x, low, high):
    return _bounded(x, low, high), (x, low, high)


def _backward(residuals, g):
    x, low, high = residuals
    outward = ((x <= low) & (g > 0)) | ((x >= high) & (g < 0))
    return jnp.where(outward, 0.0, g), None, None


_bounded.defvjp(_forward, _backward)
