"""Matryoshka: an objective over the first dimensions of the embeddings too, so that a shorter vector is a good one.

With L_d the inner loss on the first d dimensions (at unit length again where the encoder normalises):

    L = L_all + sum_d c_d L_d

Source: Kusupati et al., "Matryoshka Representation Learning" (NeurIPS 2022), equation 1, with c = 1 for the whole width.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jdmdr.encoders.pooling import unit_length
from jdmdr.objectives.protocol import Encode, Objective


def matryoshka(objective: Objective, dimensions: Sequence[int], weights: Sequence[float], normalize: bool) -> Objective:
    """Wraps an objective over pooled embeddings; each side of a batch is still encoded once a step.

    Adds the metrics `loss_at_all` and `loss_at_D`; the others are those of the whole width.
    """

    def loss(params, extra, batch, encode, rng, step):
        encode = _once(encode)
        total, metrics = objective.loss(params, extra, batch, encode, rng, step)
        metrics = {**metrics, "loss_at_all": total}
        for dimension, weight in zip(dimensions, weights, strict=True):
            first = _first(encode, dimension, normalize)
            value, _ = objective.loss(params, extra, batch, first, rng, step)
            metrics[f"loss_at_{dimension}"] = value
            total += weight * value
        return total, {**metrics, "loss": total}

    return objective._replace(loss=loss)


def _once(encode: Encode) -> Encode:
    """`encode` that remembers; its arguments are kept too, so that no other array gets their id."""
    known = {}

    def remembered(params, block, side, output="pooled"):
        key = id(params), tuple(map(id, jax.tree.leaves(block))), side, output
        if key not in known:
            known[key] = encode(params, block, side, output), params, block
        return known[key][0]

    return remembered


def _first(encode: Encode, dimension: int, normalize: bool) -> Encode:
    def truncated(params, block, side, output="pooled"):
        vectors = encode(params, block, side, output)
        if output != "pooled":
            return vectors
        return unit_length(vectors[:, :dimension]) if normalize else vectors[:, :dimension]

    return truncated
