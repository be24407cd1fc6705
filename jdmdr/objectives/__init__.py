"""Training objectives: what they are, and the registry from name to factory.

An objective is a function `loss(params, extra, batch, encode, rng, step) -> (scalar, metrics)`, the parameters `extra`
and the frozen arrays that it brings. It never encodes by itself: `encode` is handed in, already sharded, cached and cast.
A new objective is one file here and one entry below.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jdmdr.encoders import EncoderConfig
from jdmdr.objectives import adore, contrastive, distill_bitext, distill_scores, pairwise
from jdmdr.objectives.matryoshka import matryoshka
from jdmdr.objectives.protocol import Collections, Encode, Loss, Objective, Widths
from jdmdr.types import UserError

__all__ = [
    "BITEXT", "DISTILLING", "OBJECTIVES", "SEARCHING", "Collections", "Encode", "Loss", "Objective", "Widths", "build",
]  # fmt: skip

# Factories take the objective's config, the mesh (None: one device), and what else it is made of: the frozen passage
# vectors, if it searches them; the widths of student and teacher, if it distils.
OBJECTIVES: dict[str, Callable[[Any, jax.sharding.Mesh | None, Collections | Widths | None], Objective]] = {
    "adore": adore.make_objective,
    "contrastive": contrastive.make_objective,
    "distill_bitext": distill_bitext.make_objective,
    "distill_scores": distill_scores.make_objective,
    "pairwise": pairwise.make_objective,
}
SEARCHING = ("adore",)  # objectives whose batches are queries alone: they find the passages themselves
BITEXT = "distill_bitext"  # its batches are pairs of translations
DISTILLING = ("distill_scores", BITEXT)  # their batches bring a teacher's vectors


def build(
    config: Any,
    encoder: EncoderConfig,
    mesh: jax.sharding.Mesh | None = None,
    made_of: Collections | Widths | None = None,
) -> Objective:
    """The objective that a recipe's `objective` keys describe, over embeddings of `encoder`.

    Raises:
      UserError: `dimensions` that the embeddings do not have; or the objective's own refusals.
    """
    objective = OBJECTIVES[config.name](config, mesh, made_of)
    if not config.dimensions:
        return objective
    wrong = [d for d in config.dimensions if not 0 < d < encoder.embedding_width]
    if wrong:
        raise UserError(
            f"objective.dimensions has {wrong[0]}; name widths below that of the embeddings, which is "
            f"{encoder.embedding_width} and always counts"
        )
    weights = config.dimension_weights or (1.0,) * len(config.dimensions)
    return matryoshka(objective, config.dimensions, weights, encoder.normalize)
