"""Language and topic weights of DMDR: rarer languages and topics weigh more.

`p_l` is the share of language l among the training queries, `r_{c|l}` the add-one smoothed share of topic c within it:

    alpha_l    = a * p_l^-gamma_a     / sum_l' p_l' * p_l'^-gamma_a
    beta_{c|l} = b * r_{c|l}^-gamma_b / sum_c' r_{c'|l} * r_{c'|l}^-gamma_b

each clipped to [1/4, 4] times its mean (a, b). A passage weighs omega = alpha_l + beta_{c|l}. Before clipping
E[alpha] = a and E[beta] = b under the data distribution; gamma = 0 gives the constants a and b.

Source: Huang et al., "Boosting Data Utilization for Multilingual Dense Retrieval" (EMNLP 2025), section 3.5, which
leaves the function of the shares open; the power law and its defaults are this project's choice.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from jdmdr.types import UserError

TOPIC_SCOPES = ("language", "dataset", "batch")


class Weights(NamedTuple):
    """Tables of a training set; with `topic_scope="batch"` beta is recounted in each batch (see `beta_of_batch`)."""

    alpha_L: np.ndarray  # float32
    beta_LxC: np.ndarray  # float32
    b: float
    gamma_b: float
    sign: int
    topic_scope: str


def make_weights(
    lang_n: np.ndarray,
    topic_n: np.ndarray,
    n_langs: int,
    n_topics: int,
    *,
    a: float = 0.45,
    b: float = 0.40,
    gamma_a: float = 0.5,
    gamma_b: float = 0.5,
    sign: int = -1,
    topic_scope: str = "language",
) -> Weights:
    """Computes the tables from the labels of the n training queries.

    Args:
      sign: -1 favours the rare, +1 uses the share itself and favours the majority.
      topic_scope: whose queries the topic shares are counted over: "language", "dataset" or "batch".

    Raises:
      UserError: an unknown `topic_scope` or a `sign` other than -1 and +1.
    """
    if topic_scope not in TOPIC_SCOPES:
        raise UserError(f"weights.topic_scope is {topic_scope!r}; choose one of {', '.join(TOPIC_SCOPES)}.")
    if sign not in (-1, 1):
        raise UserError(f"weights.sign is {sign!r}; choose -1 (favour the rare) or 1 (favour the majority).")
    counts_LxC = np.zeros((n_langs, n_topics), np.int64)
    np.add.at(counts_LxC, (lang_n, topic_n), 1)
    alpha_L = _power_law(counts_LxC.sum(1), a, gamma_a, sign)
    if topic_scope == "language":
        beta_LxC = np.stack([_power_law(counts_C + 1, b, gamma_b, sign) for counts_C in counts_LxC])
    elif topic_scope == "dataset":
        beta_LxC = np.tile(_power_law(counts_LxC.sum(0) + 1, b, gamma_b, sign), (n_langs, 1))
    else:
        beta_LxC = np.full((n_langs, n_topics), b, np.float32)
    return Weights(alpha_L, beta_LxC, b, gamma_b, sign, topic_scope)


def beta_of_batch(weights: Weights, topic_B: np.ndarray) -> np.ndarray:
    """The topic table to use for a global batch whose queries have these topics."""
    if weights.topic_scope != "batch":
        return weights.beta_LxC
    n_langs, n_topics = weights.beta_LxC.shape
    counts_C = np.bincount(topic_B, minlength=n_topics) + 1
    return np.tile(_power_law(counts_C, weights.b, weights.gamma_b, weights.sign), (n_langs, 1))


def _power_law(counts: np.ndarray, mean: float, gamma: float, sign: int) -> np.ndarray:
    shares = counts / counts.sum()
    with np.errstate(divide="ignore"):  # an absent category gets the clip bound
        powers = shares ** (sign * gamma)
    present = shares > 0
    values = mean * powers / (shares[present] @ powers[present])
    return np.clip(values, mean / 4, mean * 4).astype(np.float32)
