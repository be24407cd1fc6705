"""A student learns a teacher's scores: queries in any language, passages in the teacher's.

Row i is a query in a student's language, which the teacher read in its own. With S^T = Q^T (P^T)^T / tau_T of the teacher and
S^S = Q^S (P^S)^T / tau_S of the student over the passages of the batch, and softmax by rows A of S^T and B of S^S:

    kl           L = mean_i sum_j A_ij (log A_ij - log B_ij)
    margin_mse   L = mean over i and j != t_i of ((s^T_{i,t_i} - s^T_ij) - (s^S_{i,t_i} - s^S_ij))^2

where t_i is the column of query i's positive and s are similarities, undivided. Only scores are compared, so the widths of
the two may differ. A passage that stands twice in a batch counts once. To either, `mse_weight` adds the mean squared
differences of the vectors themselves, queries and passages, and `contrastive_weight` the contrastive loss on the positives.

Source: stage 1 of KoreaDenseRetriever, after its description (its code is not public); margin_mse is from Hofstätter et al.,
"Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation" (2020).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jdmdr import parallel
from jdmdr.objectives import temperature as temperatures
from jdmdr.objectives.blockwise import similarities
from jdmdr.objectives.contrastive import contrastive_loss, encode_sides
from jdmdr.objectives.protocol import Objective, Widths
from jdmdr.types import UserError

FORMS = ("kl", "margin_mse")
CANDIDATES = ("batch", "own")
PROJECTION = "projection"  # of the objective's own parameters: from the student's width to the teacher's


def make_objective(config: Any, mesh: Mesh | None, widths: Widths) -> Objective:
    """The objective over batches that bring `teacher_q_BxE` and `teacher_p_NxE`.

    Config keys: `form` (one of FORMS), `candidates` (one of CANDIDATES: a query's scores over the passages of the global
    batch, or over its own list), `teacher_temperature` and the keys of the student's, `mse_weight`, `contrastive_weight`,
    `teacher_projection`.

    Raises:
      UserError: `mse_weight` where the student's vectors and the teacher's cannot be compared.
    """
    own = parameters(config, widths, ("mse_weight",))

    def loss(params, extra, batch, encode, rng, step):
        del rng, step
        q_BxD, p_NxD = encode_sides(params, batch, encode, mesh)
        temperature = temperatures.value(config, extra)
        value, metrics = scores_loss(
            q_BxD, p_NxD, {**batch, "teacher_p_NxE": parallel.whole(batch["teacher_p_NxE"], mesh)}, config,
            temperature=temperature, projection=extra.get(PROJECTION),
        )  # fmt: skip
        return value, {**metrics, **temperatures.metrics(config, extra)}

    return Objective(loss, own, temperatures.figures(config))


def parameters(config: Any, widths: Widths, comparing: tuple[str, ...]) -> dict[str, jax.Array]:
    """The objective's own parameters: a learned temperature's, and with `teacher_projection` a matrix E_S x E_T.

    Args:
      comparing: the keys of the weights of terms that put a vector of the student beside one of the teacher.

    Raises:
      UserError: one of these is above 0 where the vectors have different widths, whole or as Matryoshka cuts them.
    """
    own = temperatures.parameters(config)
    if config.teacher_projection:
        return {**own, PROJECTION: jnp.eye(widths.student, widths.teacher)}
    for key in comparing:
        if getattr(config, key) and widths.student != widths.teacher:
            raise UserError(
                f"objective.{key} is {getattr(config, key)}, but the student's vectors are {widths.student} wide and the teacher's "
                f"{widths.teacher}; set it to 0, or objective.teacher_projection=True, which learns a matrix between them"
            )
        if getattr(config, key) and config.dimensions:
            raise UserError(
                f"objective.{key} is {getattr(config, key)}, and objective.dimensions cuts the student's vectors, not the teacher's; "
                "set one of them off, or objective.teacher_projection=True, which learns a matrix between them"
            )
    return own


def projected(x_NxD: jax.Array, projection: jax.Array | None) -> jax.Array:
    """The student's vectors, whole or cut, beside the teacher's: as they are, or by the learned matrix."""
    if projection is None:
        return x_NxD
    return jnp.matmul(x_NxD, projection[: x_NxD.shape[1]], precision=jax.lax.Precision.HIGHEST)


def scores_loss(
    q_BxD: jax.Array, p_NxD: jax.Array, batch: Mapping[str, Any], config: Any, *, temperature: float | jax.Array,
    projection: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:  # fmt: skip
    """The loss on embeddings and its metrics.

    Args:
      batch: `teacher_q_BxE`, `teacher_p_NxE`, `target_B`, `passage_ids_N`, `first_N`, and for the contrastive term what
        that needs.

    Returns:
      The scalar loss, and `loss`, `kl`, `teacher_entropy` (mean over rows, nats), `teacher_agreement` (share of queries for
      which both put the same passage first) and `positive_score` (the student's, undivided).
    """
    teacher = batch["teacher_q_BxE"], batch["teacher_p_NxE"]
    (student_BxK, teacher_BxK), valid_BxK, target_B = _candidates(
        [(q_BxD, p_NxD), teacher], batch, config.candidates == "own"
    )
    kl_B, entropy_B = divergence(teacher_BxK / config.teacher_temperature, student_BxK / temperature, valid_BxK)
    kl = kl_B.mean()
    loss = kl
    if config.form == "margin_mse":
        margins = [_margins(scores, target_B) for scores in (teacher_BxK, student_BxK)]
        is_other_BxK = valid_BxK & (jnp.arange(valid_BxK.shape[1]) != target_B[:, None])
        squares_BxK = jnp.where(is_other_BxK, (margins[0] - margins[1]) ** 2, 0.0)
        loss = squares_BxK.sum() / jnp.maximum(is_other_BxK.sum(), 1)
    if config.mse_weight:
        pairs = zip((q_BxD, p_NxD), teacher, strict=True)
        loss += config.mse_weight * sum(jnp.mean((projected(own, projection) - theirs) ** 2) for own, theirs in pairs)
    if config.contrastive_weight:
        contrastive, _ = contrastive_loss(q_BxD, p_NxD, batch, temperature=temperature, mode="none")
        loss += config.contrastive_weight * contrastive
    best = [jnp.where(valid_BxK, scores, -jnp.inf).argmax(axis=1) for scores in (student_BxK, teacher_BxK)]
    metrics = {
        "loss": loss,
        "kl": kl,
        "teacher_entropy": entropy_B.mean(),
        "teacher_agreement": (best[0] == best[1]).mean(),
        "positive_score": jnp.take_along_axis(student_BxK, target_B[:, None], axis=1).mean(),
    }
    return loss, jax.lax.stop_gradient(metrics)


def divergence(teacher_BxK: jax.Array, student_BxK: jax.Array, valid_BxK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """KL(teacher || student) of the softmax of each row over its valid columns, and the teacher's entropy; both B.

    A row without a valid column has 0 and no gradient.
    """
    log_A_BxK, log_B_BxK = (_log_softmax(scores, valid_BxK) for scores in (teacher_BxK, student_BxK))
    A_BxK = jnp.where(valid_BxK, jnp.exp(log_A_BxK), 0.0)
    return (A_BxK * (log_A_BxK - log_B_BxK)).sum(axis=1), -(A_BxK * log_A_BxK).sum(axis=1)


def _log_softmax(scores_BxK: jax.Array, valid_BxK: jax.Array) -> jax.Array:
    """0 at invalid columns, where an infinity would make NaN of a gradient that is multiplied by 0."""
    masked_BxK = jnp.where(valid_BxK, scores_BxK, -1e30)
    return jnp.where(valid_BxK, masked_BxK - jax.nn.logsumexp(masked_BxK, axis=1, keepdims=True), 0.0)


def _candidates(
    sides: list[tuple[jax.Array, jax.Array]], batch: Mapping[str, Any], own: bool
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """Similarities BxK of each (queries, passages), which of them count, and the column of each query's positive."""
    ids_N, target_B = batch["passage_ids_N"], batch["target_B"]
    B, N = target_B.shape[0], ids_N.shape[0]
    if not own:
        is_target_BxN = jnp.arange(N) == target_B[:, None]
        valid_BxN = (batch["first_N"] & (ids_N != ids_N[target_B][:, None])) | is_target_BxN
        return [similarities(q, p) for q, p in sides], valid_BxN, target_B
    ids_BxP = ids_N.reshape(B, N // B)
    earlier_PxP = jnp.tril(jnp.ones((N // B, N // B), bool), -1)
    repeats_BxP = ((ids_BxP[:, :, None] == ids_BxP[:, None, :]) & earlier_PxP).any(axis=2)
    scores = [_listed(q, p) for q, p in sides]
    return scores, ~repeats_BxP, jnp.zeros(B, jnp.int32)


def _listed(q_BxD: jax.Array, p_NxD: jax.Array) -> jax.Array:
    """Inner products BxP of each query with its own passages."""
    p_BxPxD = p_NxD.reshape(q_BxD.shape[0], -1, p_NxD.shape[1])
    return jnp.einsum("bd,bpd->bp", q_BxD, p_BxPxD, precision=jax.lax.Precision.HIGHEST)


def _margins(scores_BxK: jax.Array, target_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(scores_BxK, target_B[:, None], axis=1) - scores_BxK
