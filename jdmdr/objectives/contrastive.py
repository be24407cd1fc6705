"""Contrastive loss over shared negatives, with DMDR's language and topic weights.

With B queries and P passages each (positive first, N = B*P), S = Q X^T / temperature is BxN in float32, t_i the column
of query i's positive and M_ij the mask of `valid_columns`:

    l_i = -S_{i,t_i} + log( exp S_{i,t_i} + sum_{j != t_i} M_ij exp S_ij )

    none             L = mean_i l_i
    example          L = mean_i wbar_i l_i,  wbar_i the mean weight of query i's own P-1 negatives
    negative         as none, with log(w_j / mean w) added to the negatives' scores
    literal_trainer  L = (mean_i l_i) * (mean_i (alpha_{l_i} + beta_{c_i}))

with w_j = alpha[language] + beta[topic of passage j], constants of the batch.

Source: Huang et al., "Boosting Data Utilization for Multilingual Dense Retrieval" (EMNLP 2025), section 3.5;
`literal_trainer` is the form of the authors' released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdmdr import parallel
from jdmdr.objectives import blockwise
from jdmdr.objectives import temperature as temperatures
from jdmdr.objectives.protocol import Collections, Objective
from jdmdr.types import UserError

MODES = ("none", "example", "negative", "literal_trainer")


def make_objective(config: Any, mesh: Mesh | None = None, collections: Collections | None = None) -> Objective:
    """The contrastive objective; config keys: `mode` (one of MODES) and those of the temperature (a divisor, > 0).

    With a mesh the queries' rows of the score matrix stay sharded over its axis "data" while every device sees all
    passages.
    """
    del collections
    mode = config.mode
    if mode not in MODES:
        raise UserError(f"objective.mode is {mode!r}; choose one of {', '.join(MODES)}.")
    parameters = temperatures.parameters(config)

    def loss(params, extra, batch, encode, rng, step):
        del rng, step
        temperature = temperatures.value(config, extra)
        order_N = None
        if blockwise.exceeds_one_block(len(batch["target_B"]), len(batch["passage_ids_N"]), mesh):
            # passages stay where they were encoded: the loss does not ask in which order the columns come
            order_N = batch["passages"].order_N
            q_BxD = encode(params, batch["queries"], "query")
            p_NxD = encode(params, dataclasses.replace(batch["passages"], order_N=None), "passage")
        else:
            q_BxD, p_NxD = encode_sides(params, batch, encode, mesh)
        value, metrics = contrastive_loss(
            q_BxD, p_NxD, batch, temperature=temperature, mode=mode, order_N=order_N, mesh=mesh
        )
        return value, {**metrics, **temperatures.metrics(config, extra)}

    return Objective(loss, parameters, temperatures.figures(config))


def encode_sides(params: Any, batch: Mapping[str, Any], encode: Any, mesh: Mesh | None) -> tuple[jax.Array, jax.Array]:
    """q_BxD and p_NxD of the global batch; with a mesh the queries stay sharded and every device sees all passages."""
    q_BxD = encode(params, batch["queries"], "query")
    p_NxD = encode(params, batch["passages"], "passage")
    return parallel.by_rows(q_BxD, mesh), parallel.whole(p_NxD, mesh)


def contrastive_loss(
    q_BxD: jax.Array,
    p_NxD: jax.Array,
    batch: Mapping[str, Any],
    *,
    temperature: float | jax.Array,
    mode: str,
    order_N: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss on embeddings and its metrics.

    Args:
      batch: `target_B`, `passage_ids_N`, `first_N`, `positive_ids_BxM` for the mask, and `weight_N`, `query_weight_B`
        for the weighted modes.
      order_N: the row of `p_NxD` that each column's passage is; None: in order.

    Returns:
      The scalar loss, and `loss`, `unweighted_loss` (mean l_i), `accuracy_at_1` (the positive beats every valid
      negative), `positive_score` (mean similarity, undivided) and `masked_fraction` (of the B*(N-1) negatives).
    """
    B, N = q_BxD.shape[0], p_NxD.shape[0]
    rows, columns = blockwise.of_batch(batch, weighted=mode == "negative")
    if order_N is not None:
        columns = blockwise.reordered(columns, order_N)
    target_B, log_sum_RxB, highest_B, weight_RxB = blockwise.softmax(
        q_BxD.astype(jnp.float32) / temperature, p_NxD, rows, columns, mesh
    )
    # l = -t + log(e^t + e^n) = log(1 + e^(n - t)), with n the log-sum-exp of the negatives
    example_B = jax.nn.softplus(log_sum_RxB[0] - target_B)
    unweighted = example_B.mean()
    negatives_B = weight_RxB[0]
    match mode:
        case "none":
            loss = unweighted
        case "example":
            loss = (_example_weight(batch, B, N) * example_B).mean()
        case "negative":
            # Relative to the mean weight of the negatives, so that alpha does not shift them all against the positive.
            mean_weight = jnp.where(negatives_B.sum() > 0, weight_RxB[1].sum() / negatives_B.sum(), 1.0)
            loss = jax.nn.softplus(log_sum_RxB[1] - jnp.log(mean_weight) - target_B).mean()
        case "literal_trainer":
            loss = unweighted * batch["query_weight_B"].mean()

    metrics = {
        "loss": loss,
        "unweighted_loss": unweighted,
        "accuracy_at_1": (target_B > highest_B).mean(),
        "positive_score": target_B.mean() * temperature,
        "masked_fraction": (N - 1 - negatives_B.mean()) / max(N - 1, 1),
    }
    return loss, jax.lax.stop_gradient(metrics)


def valid_columns(batch: Mapping[str, Any]) -> jax.Array:
    """M, BxN: the columns that count in the softmax of each query.

    A column is out if its passage is a known positive of the query or repeats one of an earlier column; a query's own
    target is always in. Both are decided by id, so the layout of the batch does not matter.
    """
    is_target_BxN, is_negative_BxN = blockwise.kinds(*blockwise.of_batch(batch))
    return is_target_BxN | is_negative_BxN


def _example_weight(batch: Mapping[str, Any], B: int, N: int) -> jax.Array:
    """Mean weight of each query's own negatives; without own negatives, the weight of the query itself."""
    if N == B:
        return batch["query_weight_B"]
    return batch["weight_N"].reshape(B, N // B)[:, 1:].mean(axis=1)
