"""Pairwise logistic loss over shared negatives: STAR and its baselines.

With S = Q X^T / temperature (BxN, float32), t_i the column of query i's positive and M_ij the mask of `valid_columns`
without the targets:

    L = sum_ij M_ij softplus(S_ij - S_{i,t_i}) / sum_ij M_ij

`negatives` chooses the columns. `query`: each query's own listed negatives alone; with one that the model itself ranked high
this is ANCE, whose -log softmax([s+, s-]) is softplus(s- - s+). `all`: the other queries' positives and everybody's negatives; with static hard negatives
this is STAR, with one passage a query Inbatch-Neg. `own`: the negatives that batches list (each for every query) and no
positive; with negatives drawn from the whole corpus this is Rand-Neg.

Of a passage in chunks (MaxP) the best one's score counts.

It is a mean over pairs and not a softmax: an easy pair counts little because its gradient vanishes. A passage that
stands twice in a batch counts once here; the original counts it twice.

Sources: Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives" (SIGIR 2021), section 4, pooled as
in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdmdr import maxp
from jdmdr.objectives import temperature as temperatures
from jdmdr.objectives.blockwise import similarities
from jdmdr.objectives.contrastive import encode_sides, valid_columns
from jdmdr.objectives.protocol import Collections, Objective

NEGATIVES = ("all", "own", "query")


def make_objective(config: Any, mesh: Mesh | None = None, collections: Collections | None = None) -> Objective:
    """The pairwise objective; config keys: `negatives` (one of NEGATIVES) and those of the temperature (a divisor, > 0)."""
    del collections

    def loss(params, extra, batch, encode, rng, step):
        del rng, step
        q_BxD, p_NxD = encode_sides(params, batch, encode, mesh)
        temperature = temperatures.value(config, extra)
        value, metrics = pairwise_loss(q_BxD, p_NxD, batch, temperature=temperature, negatives=config.negatives)
        return value, {**metrics, **temperatures.metrics(config, extra)}

    return Objective(loss, temperatures.parameters(config), temperatures.figures(config))


def pairwise_loss(
    q_BxD: jax.Array, p_NxD: jax.Array, batch: Mapping[str, Any], *, temperature: float | jax.Array, negatives: str
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss on embeddings and its metrics; of passages in chunks the rows of `p_NxD` are those (`batches.make_batch`).

    Returns:
      The scalar loss, and `loss`, `accuracy_at_1` (the positive beats every valid negative), `positive_score` (mean
      similarity, undivided) and `pairs` (how many the loss is a mean over).
    """
    if negatives == "query":
        return _own_pairs(q_BxD, p_NxD, batch, temperature)
    scores_BxN = similarities(q_BxD, p_NxD) / temperature
    if maxp.BATCH_KEY in batch:
        scores_BxN = maxp.best_chunk(scores_BxN, batch[maxp.BATCH_KEY])
    N = scores_BxN.shape[1]
    is_target_BxN = jnp.arange(N) == batch["target_B"][:, None]
    is_negative_BxN = valid_columns(batch) & ~is_target_BxN
    if negatives == "own":
        is_negative_BxN &= ~is_target_BxN.any(axis=0)
    target_Bx1 = jnp.take_along_axis(scores_BxN, batch["target_B"][:, None], axis=1)
    return _mean_over_pairs(scores_BxN, target_Bx1, is_negative_BxN, temperature)


def _own_pairs(q_BxD: jax.Array, p_NxD: jax.Array, batch: Mapping[str, Any], temperature: float | jax.Array):
    """Each query with the passages that follow its positive; one that is another known positive of it makes no pair."""
    B = q_BxD.shape[0]
    p_BxPxD = p_NxD.reshape(B, -1, p_NxD.shape[1])
    scores_BxP = jnp.einsum("bd,bpd->bp", q_BxD, p_BxPxD, preferred_element_type=jnp.float32) / temperature
    ids_BxP = batch["passage_ids_N"].reshape(B, -1)
    if maxp.BATCH_KEY in batch:
        scores_BxP = maxp.best_chunk(scores_BxP, batch[maxp.BATCH_KEY].reshape(*ids_BxP.shape, -1))
    known_BxP = (ids_BxP[:, :, None] == batch["positive_ids_BxM"][:, None, :]).any(axis=2)
    is_negative_BxP = ~known_BxP & (jnp.arange(ids_BxP.shape[1]) > 0)
    return _mean_over_pairs(scores_BxP, scores_BxP[:, :1], is_negative_BxP, temperature)


def _mean_over_pairs(scores_BxN, target_Bx1, is_negative_BxN, temperature) -> tuple[jax.Array, dict[str, jax.Array]]:
    pairs = is_negative_BxN.sum()
    losses_BxN = jnp.where(is_negative_BxN, jax.nn.softplus(scores_BxN - target_Bx1), 0.0)
    loss = losses_BxN.sum() / jnp.maximum(pairs, 1)
    best_negative_B = jnp.where(is_negative_BxN, scores_BxN, -jnp.inf).max(axis=1)
    metrics = {
        "loss": loss,
        "accuracy_at_1": (target_Bx1[:, 0] > best_negative_B).mean(),
        "positive_score": target_Bx1.mean() * temperature,
        "pairs": pairs.astype(jnp.float32),
    }
    return loss, jax.lax.stop_gradient(metrics)
