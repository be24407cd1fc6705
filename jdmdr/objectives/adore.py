"""ADORE: the query encoder alone is trained, on what it retrieves from the whole collection in this very step.

For query i with the exact top K of the frozen passage vectors, y_r = 1 where the passage at rank r is a known positive;
if none is, the positives follow at ranks K+1, K+2, ... With u_r = 1/r up to the metric's cut and 0 behind it,

    l_i = mean over pairs (positive a, other b) of |u_a - u_b| softplus(s_b - s_a),    L = mean_i l_i

so a pair counts by what the reciprocal rank would change if the two swapped. `metric: ndcg` takes
u_r = 1/log2(1 + r). The scores are recomputed against the frozen vectors; only the query's vector has a gradient.

Source: Zhan et al., "Optimizing Dense Retrieval Model Training with Hard Negatives" (SIGIR 2021), section 5; the pair
weights are LambdaRank's (Burges 2010).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jdmdr import parallel
from jdmdr.index import resident
from jdmdr.objectives import temperature as temperatures
from jdmdr.objectives.protocol import Collections, Objective
from jdmdr.types import NO_HIT, UserError

METRICS = ("mrr", "ndcg")
MISSING = ("append_if_none", "append_all")
SCOPES = ("own", "all")


def make_objective(config: Any, mesh: Mesh, collections: Collections) -> Objective:
    """The ADORE objective over frozen passage vectors, which it puts on the mesh.

    Config keys: `top_k` (K), `metric_cut`, `metric` (one of METRICS), `missing` (one of MISSING: positives are appended
    for queries that retrieve none of theirs, or always), `scope` (one of SCOPES: a query searches the collection of its
    language, or all), `index_dtype` (resident.DTYPES) and those of the temperature (a divisor of the scores). The batch
    brings `positive_ids_BxM`, every known positive of each query, and `lang_B`.

    Raises:
      UserError: a metric cut beyond the smallest collection that is searched.
    """
    bases = np.asarray(collections.bases, np.int32)
    first_L, end_L = (bases[:-1], bases[1:]) if config.scope == "own" else np.broadcast_arrays(bases[0], bases[-1:])
    first_L, end_L = (np.broadcast_to(of, len(bases) - 1) for of in (first_L, end_L))
    smallest = int((end_L - first_L).min())
    if config.metric_cut > smallest:
        raise UserError(
            f"objective.metric_cut is {config.metric_cut}, but the smallest collection that is searched has {smallest} "
            "passages; no rank lies beyond that"
        )
    arrays = {
        "collections": resident.place(collections.blocks, mesh, config.index_dtype),
        **parallel.put({"first_row_L": first_L, "end_row_L": end_L}, parallel.replicated(mesh)),
    }

    def loss(params, extra, batch, encode, rng, step):
        del rng, step
        vectors = batch["collections"]
        q_BxD = encode(params, batch["queries"], "query")
        q_BxD = jax.lax.with_sharding_constraint(q_BxD, parallel.replicated(mesh))
        first_B, end_B = (batch[name][batch["lang_B"]] for name in ("first_row_L", "end_row_L"))
        rows_BxK, _ = resident.top_k(vectors, q_BxD, config.top_k, first_B, end_B, mesh)
        rows_BxR = jnp.concatenate([rows_BxK, batch["positive_ids_BxM"]], axis=1)
        scores_BxR = resident.scores(vectors, q_BxD, rows_BxR, mesh) / temperatures.value(config, extra)
        value, metrics = lambda_loss(
            scores_BxR,
            rows_BxR,
            config.top_k,
            metric_cut=config.metric_cut,
            metric=config.metric,
            missing=config.missing,
        )
        return value, {**metrics, **temperatures.metrics(config, extra)}

    return Objective(loss, temperatures.parameters(config), temperatures.figures(config), arrays)


def lambda_loss(
    scores_BxR: jax.Array, rows_BxR: jax.Array, K: int, *, metric_cut: int, metric: str = "mrr",
    missing: str = "append_if_none",
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The loss on scores and its metrics.

    Args:
      scores_BxR, rows_BxR: K retrieved passages in rank order, then the known positives of the query; `NO_HIT` pads both.

    Returns:
      The scalar loss, and `loss`, `retrieved_mrr` (reciprocal rank of the first positive among the top 10, 0 without
      one) and `retrieved_recall` (share of queries that retrieve a positive).
    """
    retrieved_BxK, positive_BxM = rows_BxR[:, :K], rows_BxR[:, K:]
    same_BxKxM = (retrieved_BxK[:, :, None] == positive_BxM[:, None, :]) & (positive_BxM[:, None, :] != NO_HIT)
    hit_BxK = same_BxKxM.any(axis=2)
    appended_BxM = (positive_BxM != NO_HIT) & ~same_BxKxM.any(axis=1)
    if missing == "append_if_none":
        appended_BxM &= ~hit_BxK.any(axis=1, keepdims=True)
    rank_BxR = jnp.concatenate(
        [jnp.broadcast_to(jnp.arange(1, K + 1), hit_BxK.shape), K + jnp.cumsum(appended_BxM, axis=1)], axis=1
    )
    gain_BxR = 1 / rank_BxR if metric == "mrr" else 1 / jnp.log2(1.0 + rank_BxR)
    gain_BxR = jnp.where(rank_BxR <= metric_cut, gain_BxR, 0.0)

    is_positive_BxR = jnp.concatenate([hit_BxK, appended_BxM], axis=1)
    is_negative_BxK = (retrieved_BxK != NO_HIT) & ~hit_BxK
    pair_BxRxK = is_positive_BxR[:, :, None] & is_negative_BxK[:, None, :]
    weight_BxRxK = jnp.abs(gain_BxR[:, :, None] - gain_BxR[:, None, :K])
    difference_BxRxK = scores_BxR[:, None, :K] - scores_BxR[:, :, None]
    pairs_BxRxK = jnp.where(pair_BxRxK, weight_BxRxK * jax.nn.softplus(difference_BxRxK), 0.0)
    loss = (pairs_BxRxK.sum((1, 2)) / jnp.maximum(pair_BxRxK.sum((1, 2)), 1)).mean()

    first_hit_B = jnp.where(hit_BxK.any(axis=1), jnp.argmax(hit_BxK, axis=1) + 1, jnp.inf)
    metrics = {
        "loss": loss,
        "retrieved_mrr": jnp.where(first_hit_B <= 10, 1 / first_hit_B, 0.0).mean(),
        "retrieved_recall": hit_BxK.any(axis=1).mean(),
    }
    return loss, jax.lax.stop_gradient(metrics)
