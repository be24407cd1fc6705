import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr.objectives import OBJECTIVES
from jdmdr.objectives.contrastive import MODES, contrastive_loss, valid_columns
from jdmdr.types import UserError

TEMPERATURE = 0.3


def make_case(B=4, P=3, D=5, seed=0, repeats=True):
    """Random embeddings and a batch; with `repeats` some passages occur twice or are positives of other queries."""
    rng = np.random.default_rng(seed)
    N = B * P
    ids_N = rng.permutation(max(N, 100))[:N]
    known = [[int(ids_N[i * P])] for i in range(B)]
    if repeats:
        ids_N[1] = ids_N[P + 1]  # a negative of query 0 repeats one of query 1
        ids_N[2 * P] = ids_N[0]  # queries 0 and 2 share their positive
        known[2] = [int(ids_N[0])]
        known[3].append(int(ids_N[2]))  # a negative of query 0 is a positive of query 3
    width = max(map(len, known))
    positive_ids = np.array([row + [-1] * (width - len(row)) for row in known], np.int32)
    first_N = np.array([ids_N[j] not in ids_N[:j] for j in range(N)])
    p_NxD = rng.normal(size=(N, D))
    weight_N = rng.uniform(0.3, 2.0, N)
    for j in range(N):  # one passage has one embedding and one weight
        same = int(np.argmax(ids_N == ids_N[j]))
        p_NxD[j], weight_N[j] = p_NxD[same], weight_N[same]
    batch = {
        "target_B": np.arange(B, dtype=np.int32) * P,
        "passage_ids_N": ids_N.astype(np.int32),
        "first_N": first_N,
        "positive_ids_BxM": positive_ids,
        "weight_N": weight_N.astype(np.float32),
        "query_weight_B": rng.uniform(0.3, 2.0, B).astype(np.float32),
    }
    return rng.normal(size=(B, D)).astype(np.float32), p_NxD.astype(np.float32), batch


def oracle(q_BxD, p_NxD, batch, mode, temperature=TEMPERATURE):
    """The objective in float64, term by term."""
    B, N = len(q_BxD), len(p_NxD)
    ids, target = batch["passage_ids_N"], batch["target_B"]
    scores = q_BxD.astype(np.float64) @ p_NxD.T.astype(np.float64) / temperature
    negatives = []
    for i in range(B):
        known = set(batch["positive_ids_BxM"][i].tolist())
        negatives.append([j for j in range(N) if j != target[i] and ids[j] not in known and ids[j] not in ids[:j]])
    weight_N = np.ones(N)
    if mode == "negative":
        weight_N = batch["weight_N"] / np.mean([batch["weight_N"][j] for own in negatives for j in own])
    losses = []
    for i in range(B):
        positive = np.exp(scores[i, target[i]])
        losses.append(-np.log(positive / (positive + sum(weight_N[j] * np.exp(scores[i, j]) for j in negatives[i]))))
    P = N // B
    if mode == "example" and P > 1:
        return np.mean([batch["weight_N"][i * P + 1 : (i + 1) * P].mean() * losses[i] for i in range(B)])
    if mode == "example":
        return np.mean(batch["query_weight_B"] * losses)
    if mode == "literal_trainer":
        return np.mean(losses) * np.mean(batch["query_weight_B"])
    return np.mean(losses)


def value(q_BxD, p_NxD, batch, mode):
    return contrastive_loss(q_BxD, p_NxD, batch, temperature=TEMPERATURE, mode=mode)[0]


@pytest.mark.parametrize("P", [1, 2, 4])
@pytest.mark.parametrize("mode", MODES)
def test_loss_equals_the_oracle(mode, P):
    case = make_case(P=P, repeats=P > 2)
    np.testing.assert_allclose(value(*case, mode), oracle(*case, mode), rtol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_gradient_equals_finite_differences(mode):
    q_BxD, p_NxD, batch = make_case()
    gradients = jax.grad(value, argnums=(0, 1))(q_BxD, p_NxD, batch, mode)
    for side, gradient in enumerate(gradients):
        for row, column in [(0, 0), (1, 3), (3, 4)]:
            ends = []
            for shift in (1e-4, -1e-4):
                moved = [q_BxD.astype(np.float64), p_NxD.astype(np.float64)]
                moved[side][row, column] += shift
                ends.append(oracle(*moved, batch, mode))
            np.testing.assert_allclose(gradient[row, column], (ends[0] - ends[1]) / 2e-4, rtol=2e-3, atol=1e-5)


def test_one_negative_and_equal_weights_make_example_omega_times_infonce():
    q_BxD, p_NxD, batch = make_case(P=2, repeats=False)
    batch["weight_N"] = np.full(8, 0.85, np.float32)
    np.testing.assert_allclose(
        value(q_BxD, p_NxD, batch, "example"), 0.85 * value(q_BxD, p_NxD, batch, "none"), rtol=1e-6
    )


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_equal_weights_make_negative_plain_infonce(weight):
    q_BxD, p_NxD, batch = make_case()
    batch["weight_N"] = np.full(12, weight, np.float32)
    np.testing.assert_allclose(value(q_BxD, p_NxD, batch, "negative"), value(q_BxD, p_NxD, batch, "none"), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_order_of_negatives_does_not_matter(mode):
    q_BxD, p_NxD, batch = make_case(P=4)
    order = np.concatenate([[4 * i, 4 * i + 3, 4 * i + 1, 4 * i + 2] for i in range(4)])
    ids = batch["passage_ids_N"][order]
    permuted = {
        **batch,
        "passage_ids_N": ids,
        "weight_N": batch["weight_N"][order],
        "first_N": np.array([ids[j] not in ids[:j] for j in range(len(ids))]),
    }
    np.testing.assert_allclose(value(q_BxD, p_NxD[order], permuted, mode), value(q_BxD, p_NxD, batch, mode), rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_weights_change_the_loss_unless_there_are_none(mode):
    q_BxD, p_NxD, batch = make_case()
    heavier = {**batch, "weight_N": batch["weight_N"] ** 2, "query_weight_B": batch["query_weight_B"] * 2}
    same = np.isclose(value(q_BxD, p_NxD, batch, mode), value(q_BxD, p_NxD, heavier, mode), rtol=1e-4)
    assert same == (mode == "none")


def test_known_positives_and_repeats_are_no_negatives():
    _, _, batch = make_case()
    valid = np.asarray(valid_columns(batch))
    expected = np.ones((4, 12), bool)
    expected[:, 4] = False  # repeats column 1
    expected[:, 6] = False  # repeats column 0 ...
    expected[2, 6] = True  # ... but is the target of query 2,
    expected[2, 0] = False  # which therefore does not see column 0
    expected[3, 2] = False  # a known positive of query 3
    np.testing.assert_array_equal(valid, expected)


@pytest.mark.parametrize("mode", MODES)
def test_masked_duplicates_give_zero_gradient(mode):
    q_BxD, p_NxD, batch = make_case()
    gradient = np.asarray(jax.grad(value, argnums=1)(q_BxD, p_NxD, batch, mode))
    assert not np.any(gradient[4]), "a repeated negative"
    assert np.all(np.abs(gradient[[0, 1, 5]]).sum(1) > 0)


def test_a_batch_of_one_passage_repeated_has_zero_loss_and_finite_gradient():
    q_BxD, p_NxD, batch = make_case(P=1, repeats=False)
    batch |= {"passage_ids_N": np.full(4, 9), "first_N": np.arange(4) == 0, "positive_ids_BxM": np.full((4, 1), 9)}
    for mode in MODES:
        loss, gradient = jax.value_and_grad(value)(q_BxD, p_NxD, batch, mode)
        assert loss == 0 and not np.any(gradient)


def test_metrics_are_what_their_names_say():
    q_BxD, p_NxD, batch = make_case()
    loss, metrics = contrastive_loss(q_BxD, p_NxD, batch, temperature=TEMPERATURE, mode="example")
    valid = np.asarray(valid_columns(batch))
    similarity = np.where(valid, q_BxD @ p_NxD.T, -np.inf)
    target = batch["target_B"]
    assert metrics["loss"] == loss
    np.testing.assert_allclose(metrics["unweighted_loss"], oracle(q_BxD, p_NxD, batch, "none"), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy_at_1"], (similarity.argmax(1) == target).mean())
    np.testing.assert_allclose(metrics["positive_score"], similarity[range(4), target].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["masked_fraction"], (~valid).sum() / (4 * 11), rtol=1e-6)


def test_equal_embeddings_do_not_count_as_accurate():
    _, p_NxD, batch = make_case()
    same = np.ones_like(p_NxD)
    _, metrics = contrastive_loss(same[:4], same, batch, temperature=1.0, mode="none")
    assert metrics["accuracy_at_1"] == 0


def test_scores_are_float32_for_half_precision_embeddings():
    q_BxD, p_NxD, batch = make_case()
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q_BxD, p_NxD)]
    loss = value(*half, batch, "none")
    assert loss.dtype == jnp.float32
    exact = oracle(*[np.asarray(x, np.float32) for x in half], batch, "none")
    np.testing.assert_allclose(loss, exact, rtol=1e-5)


def test_objective_encodes_both_sides_through_the_given_encoder():
    q_BxD, p_NxD, batch = make_case()
    objective = OBJECTIVES["contrastive"](
        SimpleNamespace(mode="example", temperature=TEMPERATURE, learn_temperature=False), None
    )
    sides = {"query": q_BxD, "passage": p_NxD}

    def encode(params, chunks, side, output="pooled"):
        assert chunks == side and output == "pooled"
        return sides[side] * params

    loss, metrics = objective.loss(2.0, {}, {**batch, "queries": "query", "passages": "passage"}, encode, None, 0)
    np.testing.assert_allclose(loss, oracle(2 * q_BxD, 2 * p_NxD, batch, "example"), rtol=1e-5)


@pytest.mark.parametrize("key, wrong", [("mode", "weighted"), ("temperature", 0.0), ("temperature", float("nan"))])
def test_a_wrong_config_is_refused_by_key(key, wrong):
    config = SimpleNamespace(**{"mode": "none", "temperature": 0.1, "learn_temperature": False, key: wrong})
    with pytest.raises(UserError, match=f"objective.{key}"):
        OBJECTIVES["contrastive"](config, None)


def test_eight_devices_equal_one_in_loss_and_gradient():
    program = """
        import jax, jax.numpy as jnp, numpy as np
        from types import SimpleNamespace
        from jax.sharding import AxisType, NamedSharding, PartitionSpec
        from jdmdr import shapes
        from jdmdr.encoders.pooling import PACKED_POOLINGS
        from jdmdr.objectives import OBJECTIVES
        from jdmdr.objectives.contrastive import MODES
        from tests.conftest import block_of
        from tests.test_contrastive import make_case

        B, P, vocabulary = 16, 4, 50
        _, _, batch = make_case(B, P)
        rng = np.random.default_rng(0)

        batch |= {"queries": block_of(rng, B, 6, vocabulary), "passages": block_of(rng, B * P, 6, vocabulary, per_row=2)}
        params = rng.normal(size=(vocabulary, 8)).astype(np.float32)

        def mean(p, tokens, key, widths):
            return PACKED_POOLINGS["mean"](p[tokens.ids_BxT], tokens.lengths_BxS).reshape(-1, p.shape[1])

        def encode(params, block, side, output="pooled"):
            return shapes.encode_rows(mean, params, block)

        def run(devices, mode):
            mesh = jax.make_mesh(
                (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
            )
            rows, replicated = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
            objective = OBJECTIVES["contrastive"](SimpleNamespace(mode=mode, temperature=0.5, learn_temperature=False), mesh)
            sharded = jax.tree.map(lambda x: jax.device_put(x, rows if x.ndim > 1 else replicated), batch)
            weights = jax.device_put(params, replicated)
            step = lambda w, batch: objective.loss(w, {}, batch, encode, None, 0)
            (loss, metrics), gradient = jax.jit(jax.value_and_grad(step, has_aux=True))(weights, sharded)
            return jax.device_get((loss, metrics, gradient))

        assert jax.device_count() == 8
        for mode in MODES:
            for one, eight in zip(jax.tree.leaves(run(1, mode)), jax.tree.leaves(run(8, mode)), strict=True):
                np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)
        print("equal")
    """
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment["PYTHONPATH"] = root
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, cwd=root
    )
    assert result.stdout.strip().endswith("equal"), result.stderr


def test_two_passages_a_query_are_dprs_in_batch_softmax_with_gradients_through_every_column():
    """Cross-entropy over all 2 B passages with target 2 i; its gradient by hand."""
    q_BxD, p_NxD, batch = make_case(B=4, P=2, repeats=False)
    objective = OBJECTIVES["contrastive"](
        SimpleNamespace(mode="none", temperature=1.0, learn_temperature=False, dimensions=())
    )
    batch |= {"queries": None, "passages": None}

    def loss(params):
        encode = lambda params, tokens, side: params[side]
        return objective.loss(params, {}, batch, encode, None, 0)[0]

    found, gradient = jax.value_and_grad(loss)({"query": jnp.asarray(q_BxD), "passage": jnp.asarray(p_NxD)})
    scores_BxN = q_BxD.astype(np.float64) @ p_NxD.T.astype(np.float64)
    share_BxN = np.exp(scores_BxN) / np.exp(scores_BxN).sum(axis=1, keepdims=True)
    target_BxN = np.eye(8)[[0, 2, 4, 6]]
    assert found == pytest.approx(-np.log((share_BxN * target_BxN).sum(axis=1)).mean(), rel=1e-6)
    np.testing.assert_allclose(gradient["passage"], (share_BxN - target_BxN).T @ q_BxD / 4, atol=1e-6)
    np.testing.assert_allclose(gradient["query"], (share_BxN - target_BxN) @ p_NxD / 4, atol=1e-6)
    assert (np.abs(gradient["passage"]).max(axis=1) > 0).all()
