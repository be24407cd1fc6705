"""Training objectives: what they are, and the registry from name to factory.

An objective is one function, `loss(params, extra, batch, encode, rng, step) -> (scalar, metrics)`. It never encodes by
itself: `encode` is handed in, already sharded, cached and cast. A new objective is one file here and one entry below.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from jdmdr.objectives import contrastive
from jdmdr.shapes import Chunks


class Encode(Protocol):
    """Embeds one side of a batch."""

    def __call__(self, params: Any, chunks: Chunks, side: str, output: str = "pooled") -> jax.Array:
        """Args: side "query" or "passage"; output "pooled" (NxD, plan order) or "tokens"."""


class Objective(Protocol):
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
        """Returns the loss and scalar metrics; `extra` holds arrays of the objective's own (heads, teacher, corpus)."""


# Factories take the objective's config and the mesh (None: one device).
OBJECTIVES: dict[str, Callable[[Any, jax.sharding.Mesh | None], Objective]] = {
    "contrastive": contrastive.make_objective,
}
