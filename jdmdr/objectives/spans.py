"""Extractive answers: where a span begins and where it ends.

With h_t the token vectors of question and context read together, and C the context's tokens and the first token, which stands for
"not in this window",

    L = mean over windows of ( -log softmax_{t in C}(w_s h_t)[start] - log softmax_{t in C}(w_e h_t)[end] ) / 2

Source: Devlin et al., "BERT" (2019), section 4.2 and 4.3.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jdmdr.encoders import Params
from jdmdr.encoders.attention import MASKED
from jdmdr.encoders.layers import dense
from jdmdr.objectives.protocol import Objective

HEAD = "span"  # its key among the encoder's parameters


def make_objective() -> Objective:
    """The objective; parameters have a `span` head (kernel Dx2, bias 2) beside the encoder's."""

    def loss(params, extra, batch, encode, rng, step):
        del extra, rng, step
        hidden_BxTxD = encode(params, batch["windows"], "passage", "tokens")
        logits_BxTx2 = span_logits(params[HEAD], hidden_BxTxD, batch["choices_BxT"])
        value = span_loss(logits_BxTx2, batch["spans_Bx2"])
        right = (logits_BxTx2.argmax(axis=1) == batch["spans_Bx2"]).all(axis=1).mean()
        return value, jax.lax.stop_gradient({"loss": value, "exact_spans": right})

    return Objective(loss)


def init_head(rng: jax.Array, width: int) -> Params:
    return {"kernel": 0.02 * jax.random.normal(rng, (width, 2), jnp.float32), "bias": jnp.zeros(2)}


def span_logits(head: Params, hidden_BxTxD: jax.Array, choices_BxT: jax.Array) -> jax.Array:
    """Logits of being first and last, float32 B x T x 2; tokens that are no choice get almost none."""
    logits_BxTx2 = dense(hidden_BxTxD, head["kernel"], head["bias"]).astype(jnp.float32)
    return jnp.where(choices_BxT[..., None], logits_BxTx2, MASKED)


def span_loss(logits_BxTx2: jax.Array, spans_Bx2: Any) -> jax.Array:
    """L of windows whose spans are `spans_Bx2`, (0, 0) where a window has none."""
    own_Bx2 = jnp.take_along_axis(logits_BxTx2, spans_Bx2[:, None, :], axis=1)[:, 0]
    return (jax.nn.logsumexp(logits_BxTx2, axis=1) - own_Bx2).mean()
