"""A student learns a teacher's geometry from translations: sentences in the teacher's language beside others'.

Pair i is a source sentence, which the teacher reads, and its translation. T are the teacher's vectors of the sources, X the
student's of them and Y the student's of the translations. With P = softmax_row(T T^T / tau_T), KL the mean over rows of
KL(P || softmax_row(. / tau_S)), and P' that with the diagonal left out:

    anchor   KL(T X^T) + KL(T Y^T)               the student's vectors lie where the teacher's do
    self     KL'(X X^T) + KL'(Y Y^T)             each language has the teacher's geometry; without the diagonal, which is
                                                 1 for anybody and would absorb the probability at a low temperature
    cross    KL(X Y^T) + KL(Y X^T)               translations lie together
    mse      mean (X - T)^2 + mean (Y - T)^2     the vectors themselves
    L = anchor_weight anchor + self_weight self + cross_weight cross + mse_weight mse + contrastive_weight contrastive

the last over translations as queries and sources as passages. `self` and `cross` compare scores alone, so the widths of the
two may differ. A column counts once for a row, and a row's own column is the only one with its source or its translation.
Both sides are encoded as passages.

Batches of queries and passages (`teacher_q_BxE` tells) may come in between: on them it is `distill_scores`.

Source: stage 2 of KoreaDenseRetriever; its released loss is `anchor` with both temperatures 1. `self` and `cross` are this
project's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdmdr import parallel
from jdmdr.objectives import distill_scores
from jdmdr.objectives import temperature as temperatures
from jdmdr.objectives.blockwise import similarities
from jdmdr.objectives.contrastive import contrastive_loss
from jdmdr.objectives.distill_scores import PROJECTION, divergence, projected
from jdmdr.objectives.protocol import Objective, Widths
from jdmdr.types import UserError

TERMS = ("anchor_weight", "self_weight", "cross_weight", "mse_weight", "contrastive_weight")


def make_objective(config: Any, mesh: Mesh | None, widths: Widths) -> Objective:
    """The objective; config keys: TERMS, `teacher_temperature`, `teacher_projection`, the keys of the student's temperature,
    and those of `distill_scores` for batches of its kind.

    Raises:
      UserError: no term has a weight; or `anchor_weight` or `mse_weight` where vectors cannot be compared.
    """
    if not any(getattr(config, key) for key in TERMS):
        raise UserError(f"objective.name is distill_bitext and none of {', '.join(TERMS)} is above 0; raise one")
    own = distill_scores.parameters(config, widths, ("anchor_weight", "mse_weight"))
    scores = distill_scores.make_objective(config, mesh, widths)

    def loss(params, extra, batch, encode, rng, step):
        if "teacher_q_BxE" in batch:
            return scores.loss(params, extra, batch, encode, rng, step)
        y_NxD, x_NxD = (encode(params, batch[side], "passage") for side in ("queries", "passages"))
        value, metrics = bitext_loss(
            x_NxD, y_NxD, batch, config, temperature=temperatures.value(config, extra), projection=extra.get(PROJECTION),
            mesh=mesh,
        )  # fmt: skip
        return value, {**metrics, **temperatures.metrics(config, extra)}

    return Objective(loss, own, temperatures.figures(config))


def bitext_loss(
    x_NxD: jax.Array, y_NxD: jax.Array, batch: Mapping[str, Any], config: Any, *, temperature: float | jax.Array,
    projection: jax.Array | None = None, mesh: Mesh | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The loss on embeddings of N pairs and its metrics.

    Args:
      x_NxD, y_NxD: sources and translations.
      batch: `teacher_p_NxE`, and `target_B`, `passage_ids_N`, `first_N`, `positive_ids_BxM` (N of each).

    Returns:
      The scalar loss, and `loss`, each term with a weight under its name, `teacher_entropy` (mean over rows, nats) and
      `translation_accuracy` (share of translations whose own source scores highest).
    """
    t_NxE = batch["teacher_p_NxE"]
    rows = {name: parallel.by_rows(of, mesh) for name, of in (("t", t_NxE), ("x", x_NxD), ("y", y_NxD))}
    columns = {name: parallel.whole(of, mesh) for name, of in (("t", t_NxE), ("x", x_NxD), ("y", y_NxD))}
    valid_NxN = distinct(batch)
    target_NxN = similarities(rows["t"], columns["t"]) / config.teacher_temperature

    def kl(row: jax.Array, column: jax.Array, valid: jax.Array) -> jax.Array:
        return divergence(target_NxN, similarities(row, column) / temperature, valid)[0].mean()

    crossed_NxN = similarities(rows["y"], columns["x"])
    terms = {}
    if config.anchor_weight:
        terms["anchor"] = sum(kl(rows["t"], projected(columns[side], projection), valid_NxN) for side in "xy")
    if config.self_weight:
        others_NxN = valid_NxN & ~jnp.eye(len(x_NxD), dtype=bool)
        terms["self"] = sum(kl(rows[side], columns[side], others_NxN) for side in "xy")
    if config.cross_weight:
        there = divergence(target_NxN, crossed_NxN / temperature, valid_NxN)[0].mean()
        terms["cross"] = there + kl(rows["x"], columns["y"], valid_NxN)
    if config.mse_weight:
        terms["mse"] = sum(jnp.mean((projected(rows[side], projection) - rows["t"]) ** 2) for side in "xy")
    if config.contrastive_weight:
        terms["contrastive"], _ = contrastive_loss(rows["y"], columns["x"], batch, temperature=temperature, mode="none")
    loss = sum(getattr(config, f"{name}_weight") * term for name, term in terms.items())
    own_N = jnp.diagonal(crossed_NxN)
    others_NxN = valid_NxN & ~jnp.eye(len(x_NxD), dtype=bool)
    metrics = {
        "loss": loss,
        **terms,
        "teacher_entropy": divergence(target_NxN, target_NxN, valid_NxN)[1].mean(),
        "translation_accuracy": (own_N > jnp.where(others_NxN, crossed_NxN, -jnp.inf).max(axis=1)).mean(),
    }
    return loss, jax.lax.stop_gradient(metrics)


def distinct(batch: Mapping[str, Any]) -> jax.Array:
    """NxN: the columns that count for each row: its own, and the first of each source that is not of its own source or of
    another known translation of its own."""
    ids_N = batch["passage_ids_N"]
    known_NxN = (batch["positive_ids_BxM"][:, :, None] == ids_N).any(axis=1)
    return (batch["first_N"] & ~known_NxN & ~known_NxN.T) | jnp.eye(len(ids_N), dtype=bool)
