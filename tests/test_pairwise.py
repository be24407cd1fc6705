from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr.objectives import OBJECTIVES
from jdmdr.objectives.pairwise import NEGATIVES, pairwise_loss
from tests.test_contrastive import TEMPERATURE, make_case


def oracle(q_BxD, p_NxD, batch, negatives, temperature=TEMPERATURE):
    """The mean over pairs in float64, pair by pair."""
    ids, target = batch["passage_ids_N"], batch["target_B"]
    scores = q_BxD.astype(np.float64) @ p_NxD.T.astype(np.float64) / temperature
    losses = []
    for i in range(len(q_BxD)):
        known = set(batch["positive_ids_BxM"][i].tolist())
        for j in range(len(p_NxD)):
            repeated = ids[j] in ids[:j]
            if negatives == "query":  # its own alone, whoever else has the same
                if j // (len(p_NxD) // len(q_BxD)) == i and j != target[i] and ids[j] not in known:
                    losses.append(np.log1p(np.exp(scores[i, j] - scores[i, target[i]])))
                continue
            if j == target[i] or ids[j] in known or repeated or (negatives == "own" and j in target):
                continue
            losses.append(np.log1p(np.exp(scores[i, j] - scores[i, target[i]])))
    return np.mean(losses)


def loss_of(negatives):
    def value(q_BxD, p_NxD, batch):
        return pairwise_loss(q_BxD, p_NxD, batch, temperature=TEMPERATURE, negatives=negatives)[0]

    return value


def test_golden_value_of_star():
    # P = [[1, 0], [.5, .5]], X = [[0, 1], [1, 1]]; X_0 is a known positive of query 1
    passages = np.array([[1, 0], [0, 1], [0.5, 0.5], [1, 1]], np.float32)
    batch = {
        "target_B": np.array([0, 2]),
        "passage_ids_N": np.arange(4),
        "first_N": np.ones(4, bool),
        "positive_ids_BxM": np.array([[0, -1], [2, 1]]),
    }
    loss, metrics = pairwise_loss(np.eye(2, dtype=np.float32), passages, batch, temperature=1.0, negatives="all")
    assert float(loss) == pytest.approx(0.585728, abs=1e-6)
    assert float(metrics["pairs"]) == 5


def test_golden_value_of_ance_and_a_negative_that_two_queries_share():
    # s+ = 3, s- = 2 for both; the second query has the first one's negative, and the first one's positive stays out
    batch = {
        "target_B": np.array([0, 2]),
        "passage_ids_N": np.array([0, 7, 1, 7]),
        "first_N": np.array([True, True, True, False]),
        "positive_ids_BxM": np.array([[0, -1], [1, -1]]),
    }
    passages = np.array([[3, 0], [2, 0], [3, 0], [2, 0]], np.float32)
    queries = np.array([[1, 0], [1, 0]], np.float32)
    loss, metrics = pairwise_loss(queries, passages, batch, temperature=1.0, negatives="query")
    assert float(loss) == pytest.approx(0.313262, abs=1e-6)
    assert float(metrics["pairs"]) == 2


@pytest.mark.parametrize("P", [2, 3, 5])
@pytest.mark.parametrize("negatives", NEGATIVES)
def test_equals_the_formula_and_its_finite_differences(negatives, P):
    q, p, batch = make_case(P=P)
    value = loss_of(negatives)
    assert float(value(q, p, batch)) == pytest.approx(oracle(q, p, batch, negatives), rel=1e-5)
    gradient = jax.grad(value)(jnp.asarray(q), p, batch)
    direction = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
    h = 1e-3
    ahead, behind = (oracle(q + s * h * direction, p, batch, negatives) for s in (1, -1))
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / (2 * h), rel=1e-3, abs=1e-5)


def test_without_own_negatives_the_other_queries_positives_are_all_there_is():
    q, p, batch = make_case(P=1, repeats=False)
    assert float(loss_of("all")(q, p, batch)) == pytest.approx(oracle(q, p, batch, "all"), rel=1e-5)
    assert float(loss_of("own")(q, p, batch)) == 0


def test_known_positives_have_no_gradient_from_queries_that_they_answer():
    q, p, batch = make_case(repeats=False)
    batch["positive_ids_BxM"] = np.tile(batch["passage_ids_N"][[0, 1, 2, 3]], (len(q), 1))
    gradient = np.asarray(jax.grad(loss_of("all"), argnums=1)(q, jnp.asarray(p), batch))
    assert not np.abs(gradient[[1, 2]]).any()
    assert np.abs(gradient[4:]).any()


def test_is_finite_at_score_gaps_of_hundreds():
    q, p, batch = make_case()
    value, gradient = jax.value_and_grad(loss_of("all"))(jnp.asarray(q) * 1000, p, batch)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_objective_encodes_both_sides_once():
    q, p, batch = make_case()
    calls = []

    def encode(params, chunks, side, output="pooled"):
        calls.append(side)
        return jnp.asarray({"query": q, "passage": p}[side])

    config = SimpleNamespace(negatives="all", temperature=TEMPERATURE, learn_temperature=False)
    batch = {**batch, "queries": None, "passages": None}
    value, _ = OBJECTIVES["pairwise"](config, None, None).loss({}, {}, batch, encode, None, None)
    assert calls == ["query", "passage"]
    assert float(value) == pytest.approx(oracle(q, p, batch, "all"), rel=1e-5)
