"""What an objective is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jdmdr.shapes import Packed
from jdmdr.types import Tokens


class Encode(Protocol):
    """Embeds one side of a batch."""

    def __call__(self, params: Any, block: Packed | Tokens, side: str, output: str = "pooled") -> jax.Array:
        """Args: side "query" or "passage"; output "pooled" (NxD, plan order) or, of one block of Tokens, "tokens" (NxTxD)."""


class Loss(Protocol):
    """The loss of a global batch."""

    def __call__(
        self,
        params: Any,
        extra: Any,
        batch: Mapping[str, Any],
        encode: Encode,
        rng: jax.Array,
        step: jax.Array,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss and scalar metrics; `extra` are the objective's own parameters at this step, and `batch` holds its
        arrays too."""


class Objective(NamedTuple):
    """A loss, and the parameters that it brings: they train with the encoder's, under the path `objective/...`."""

    loss: Loss
    parameters: Mapping[str, jax.Array] = {}  # where they start
    figures: Callable[[Any], dict[str, float]] = lambda extra: {}  # what a person wants to know of them in the end
    arrays: Mapping[str, Any] = {}  # on the devices; each step gets them beside its batch, and no step changes them
    # batch -> names of own parameters that it does not train: they, and the optimiser's memory of them, stay as they are
    idle: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda batch: ()


class Collections(NamedTuple):
    """Passage vectors that stay as they are while the queries' encoder trains."""

    blocks: Sequence[np.ndarray]  # [rows, D] each, memory-mapped as a rule; global rows in order
    bases: np.ndarray  # [L + 1]: collection l is the global rows bases[l] .. bases[l + 1] - 1


class Widths(NamedTuple):
    """Of the embeddings that a distillation compares."""

    student: int
    teacher: int
