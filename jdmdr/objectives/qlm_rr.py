"""Query language modelling and relevance ranking over pairs of a query and a document read together.

With M the masked positions of the batch, w_t = 1 (0 for a place that holds none), g_t = LN(gelu(W_1 h_t + b_1)) and the word
vectors E (tied) or a matrix of its own,

    L_QLM = - sum_t w_t log softmax(E g_t + beta)[x_t] / max(sum_t w_t, 1)

and with one positive (label 1, first) and K negatives a query, s the log-odds of being relevant from the first token's vector,

    pointwise          L_RR = mean over all pairs of -log softmax((0, s))[y]
    pairwise_logistic  L_RR = mean over negatives of softplus(s- - s+)
    pairwise_hinge     L_RR = mean over negatives of max(0, margin - s+ + s-)
    listwise           L_RR = mean over queries of -log( e^{s+} / sum_k e^{s_k} )

and, which the source does not have, with the mean token vectors q_i and x_i of query and document read apart, at unit length,

    L_bi = mean_i of -log( e^{q_i x_i / t} / sum_j e^{q_i x_j / t} )      over documents j of other sections

L = qlm_weight L_QLM + rr_weight L_RR + bi_weight L_bi over what the batch holds: all, or one of them by turns. Logits are computed at masked
positions alone, B x P x V and never B x T x V.

Source: Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval" (WWW 2021); `pointwise`, its two logits as their
difference, and turns are what the released PyTorch code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdmdr.encoders import Params
from jdmdr.encoders.config import EncoderConfig
from jdmdr.encoders.cross_encoder import classify
from jdmdr.encoders.layers import dense, layer_norm
from jdmdr.encoders.pooling import mean, unit_length
from jdmdr.encoders.transformer import ACTIVATIONS
from jdmdr.objectives.blockwise import similarities
from jdmdr.objectives.protocol import Objective

RR_LOSSES = ("pointwise", "pairwise_logistic", "pairwise_hinge", "listwise")
SCHEDULES = ("joint", "alternate")
LM_HEAD, RANK_HEAD = "lm_head", "rank_head"
HEAD_OF = {"qlm": LM_HEAD, "rr": RANK_HEAD}  # what a part of the batch trains beside the encoder


def make_objective(config: Any, encoder: EncoderConfig, heads: Mapping[str, Params], per_query: int) -> Objective:
    """The objective of a recipe's `pretrain.objective` keys over an encoder that pools its first token.

    Args:
      heads: where `lm_head` (dense, norm, bias, and decoder where it is not tied) and `rank_head` (dense, out) start; one that is
        not there is not trained for, but `rr` then goes by the parameters' own `head`.
      per_query: 1 + K, documents of each query in `batch["rr"]`, its positive first.
    """

    def loss(params, extra, batch, encode, rng, step):
        del rng, step
        total, metrics = 0.0, {}
        if "qlm" in batch:
            hidden_BxTxD = encode(params, batch["qlm"], "passage", "tokens")
            word_VxD = params["embeddings"]["word"]
            value, found = qlm_loss(extra[LM_HEAD], word_VxD, hidden_BxTxD, batch, encoder)
            total, metrics = total + config.qlm_weight * value, metrics | found
        if "rr" in batch:
            first_NxD = encode(params, batch["rr"], "passage")
            scores_N = classify(extra[RANK_HEAD] if RANK_HEAD in extra else params["head"], first_NxD)[:, 0]
            value, found = rr_loss(scores_N.reshape(-1, per_query), config.rr_loss, config.margin)
            total, metrics = total + config.rr_weight * value, metrics | found
        if "bi" in batch:
            sides = [
                unit_length(mean(encode(params, side, "passage", "tokens"), side.mask_BxT)) for side in batch["bi"]
            ]
            value, found = bi_loss(*sides, batch["bi_ids_B"], config.temperature)
            total, metrics = total + config.bi_weight * value, metrics | found
        return total, {**metrics, "loss": total}

    def idle(batch: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(head for part, head in HEAD_OF.items() if part not in batch)

    return Objective(loss, dict(heads), idle=idle)


def lm_logits(head: Params, word_VxD: jax.Array, hidden_BxPxD: jax.Array, encoder: EncoderConfig) -> jax.Array:
    """Logits B x P x V, float32, of a masked language model's head."""
    activation = ACTIVATIONS[encoder.activation if encoder.family == "bert" else "gelu"]  # as transformers has it
    x_BxPxD = activation(dense(hidden_BxPxD, head["dense"]["kernel"], head["dense"]["bias"]))
    x_BxPxD = layer_norm(x_BxPxD, head["norm"]["scale"], head["norm"]["bias"], encoder.layer_norm_eps)
    return jnp.matmul(x_BxPxD, head.get("decoder", word_VxD).T, preferred_element_type=jnp.float32) + head["bias"]


def qlm_loss(
    head: Params, word_VxD: jax.Array, hidden_BxTxD: jax.Array, batch: Mapping[str, jax.Array], encoder: EncoderConfig
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_QLM of token vectors; `batch` has `mask_pos_BxP`, `mask_tgt_BxP` and `mask_w_BxP` (places, tokens, 1 or 0)."""
    masked_BxPxD = jnp.take_along_axis(hidden_BxTxD, batch["mask_pos_BxP"][:, :, None], axis=1)
    logits_BxPxV = lm_logits(head, word_VxD, masked_BxPxD, encoder)
    target_BxP, weight_BxP = batch["mask_tgt_BxP"], batch["mask_w_BxP"]
    of_target_BxP = jnp.take_along_axis(logits_BxPxV, target_BxP[:, :, None], axis=2)[:, :, 0]
    loss_BxP = jax.nn.logsumexp(logits_BxPxV, axis=2) - of_target_BxP
    total = jnp.maximum(weight_BxP.sum(), 1)
    loss = (weight_BxP * loss_BxP).sum() / total
    right = (weight_BxP * (logits_BxPxV.argmax(axis=2) == target_BxP)).sum() / total
    return loss, jax.lax.stop_gradient({"qlm_loss": loss, "qlm_accuracy": right})


def rr_loss(scores_BxK: jax.Array, name: str, margin: float) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_RR of log-odds, each query's positive first."""
    positive_Bx1, negative_BxK = scores_BxK[:, :1], scores_BxK[:, 1:]
    match name:
        case "pointwise":
            loss = jnp.concatenate([jax.nn.softplus(-positive_Bx1), jax.nn.softplus(negative_BxK)], axis=1).mean()
        case "pairwise_logistic":
            loss = jax.nn.softplus(negative_BxK - positive_Bx1).mean()
        case "pairwise_hinge":
            loss = jnp.maximum(0, margin - positive_Bx1 + negative_BxK).mean()
        case "listwise":
            loss = (jax.nn.logsumexp(scores_BxK, axis=1) - positive_Bx1[:, 0]).mean()
    ahead = (positive_Bx1 > negative_BxK).all(axis=1).mean()
    return loss, jax.lax.stop_gradient({"rr_loss": loss, "rr_accuracy": ahead})


def bi_loss(
    q_BxD: jax.Array, x_BxD: jax.Array, ids_B: jax.Array, temperature: float
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L_bi of embeddings; documents of one section (equal ids) are no negatives of each other's queries."""
    scores_BxB = similarities(q_BxD, x_BxD) / temperature
    own_B = jnp.diagonal(scores_BxB)
    twin_BxB = (ids_B[:, None] == ids_B) & ~jnp.eye(len(ids_B), dtype=bool)
    scores_BxB = jnp.where(twin_BxB, -jnp.inf, scores_BxB)
    loss = (jax.nn.logsumexp(scores_BxB, axis=1) - own_B).mean()
    right = (own_B >= scores_BxB.max(axis=1)).mean()
    return loss, jax.lax.stop_gradient({"bi_loss": loss, "bi_accuracy": right})


def init_heads(rng: jax.Array, config: EncoderConfig, tied: bool) -> dict[str, Params]:
    """Both heads at random, float32, as a checkpoint without them needs."""
    D, V = config.width, config.vocab_size
    keys = jax.random.split(rng, 4)
    normal = lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.float32)
    layer = lambda key, width: {"kernel": normal(key, (D, width)), "bias": jnp.zeros(width)}
    lm_head = {"dense": layer(keys[0], D), "norm": {"scale": jnp.ones(D), "bias": jnp.zeros(D)}, "bias": jnp.zeros(V)}
    if not tied:
        lm_head["decoder"] = normal(keys[1], (V, D))
    return {LM_HEAD: lm_head, RANK_HEAD: {"dense": layer(keys[2], D), "out": layer(keys[3], 1)}}
