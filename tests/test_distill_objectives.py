"""The distillation losses equal their formulas; masks, widths, devices and the teacher's place in a batch."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contrastive import make_case
from test_contrastive import oracle as contrastive_oracle

from jdmdr import objectives
from jdmdr.encoders.config import EncoderConfig
from jdmdr.objectives.distill_bitext import bitext_loss, distinct
from jdmdr.objectives.distill_scores import scores_loss
from jdmdr.objectives.protocol import Widths
from jdmdr.types import UserError

KEYS = {
    "temperature": 0.3, "teacher_temperature": 0.2, "learn_temperature": False, "form": "kl", "candidates": "batch",
    "cross_weight": 0.0, "self_weight": 0.0, "anchor_weight": 0.0, "mse_weight": 0.0, "contrastive_weight": 0.0,
    "teacher_projection": False, "dimensions": (), "dimension_weights": (),
}  # fmt: skip


def config_of(**changes):
    return SimpleNamespace(**{**KEYS, **changes})


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def softmax(x, valid):
    exp = np.where(valid, np.exp(x - x.max(axis=1, keepdims=True)), 0.0)
    return exp / np.maximum(exp.sum(axis=1, keepdims=True), 1e-300)


def kl(teacher, student, valid):
    """Mean over rows of KL(softmax teacher || softmax student), float64, term by term."""
    A, B = softmax(teacher, valid), softmax(student, valid)
    total = 0.0
    for i, j in zip(*np.nonzero(valid), strict=True):
        total += A[i, j] * (np.log(A[i, j]) - np.log(B[i, j]))
    return total / len(A)


# ------------------------------------------------------------------------------------------------------------- stage 1


def scores_case(E=7, seed=0):
    q_BxD, p_NxD, batch = make_case(B=4, P=3, seed=seed)
    rng = np.random.default_rng(seed + 9)
    batch |= {
        "teacher_q_BxE": rng.normal(size=(4, E)).astype(np.float32),
        "teacher_p_NxE": rng.normal(size=(12, E)).astype(np.float32),
    }
    return q_BxD, p_NxD, batch


def scores_oracle(q, p, batch, config):
    teacher = [batch[key].astype(np.float64) for key in ("teacher_q_BxE", "teacher_p_NxE")]
    ids, target = batch["passage_ids_N"], batch["target_B"]
    student_BxN, teacher_BxN = q.astype(np.float64) @ p.T, teacher[0] @ teacher[1].T
    valid = np.zeros(student_BxN.shape, bool)
    for i in range(len(q)):
        seen = [ids[target[i]]]
        for j in range(len(p)) if config.candidates == "batch" else range(3 * i, 3 * i + 3):
            valid[i, j] = j == target[i] or ids[j] not in seen
            seen += [ids[j]] if valid[i, j] else []
    if config.form == "kl":
        return kl(teacher_BxN / config.teacher_temperature, student_BxN / config.temperature, valid)
    squares = [
        ((teacher_BxN[i, target[i]] - teacher_BxN[i, j]) - (student_BxN[i, target[i]] - student_BxN[i, j])) ** 2
        for i, j in zip(*np.nonzero(valid), strict=True)
        if j != target[i]
    ]
    return np.mean(squares)


@pytest.mark.parametrize("form", ["kl", "margin_mse"])
@pytest.mark.parametrize("candidates", ["batch", "own"])
def test_scores_loss_equals_the_oracle_at_any_widths(form, candidates):
    config = config_of(form=form, candidates=candidates)
    q, p, batch = scores_case()
    loss, metrics = scores_loss(q, p, batch, config, temperature=config.temperature)
    np.testing.assert_allclose(loss, scores_oracle(q, p, batch, config), rtol=1e-5)
    np.testing.assert_allclose(metrics["kl"], scores_oracle(q, p, batch, config_of(candidates=candidates)), rtol=1e-5)


def test_scores_of_the_teacher_itself_have_no_loss_and_no_gradient():
    config = config_of(temperature=0.2)
    _, _, batch = scores_case()
    teacher = batch["teacher_q_BxE"], batch["teacher_p_NxE"]
    value = lambda q, p: scores_loss(q, p, batch, config, temperature=0.2)[0]
    loss, gradients = jax.value_and_grad(value, argnums=(0, 1))(*teacher)
    assert abs(loss) < 1e-5
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_mse_and_contrastive_terms_are_added():
    config = config_of(mse_weight=0.7, contrastive_weight=0.3)
    q, p, batch = scores_case(E=5)
    loss, metrics = scores_loss(q, p, batch, config, temperature=0.3)
    mse = np.mean((q - batch["teacher_q_BxE"]) ** 2) + np.mean((p - batch["teacher_p_NxE"]) ** 2)
    expected = scores_oracle(q, p, batch, config_of()) + 0.7 * mse
    expected += 0.3 * contrastive_oracle(q, p, batch, "none", 0.3)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------------- stage 2


def bitext_case(N=6, D=5, E=5, seed=0, repeats=False):
    rng = np.random.default_rng(seed)
    ids = np.arange(N, dtype=np.int32) + 40
    known = [[int(i)] for i in ids]
    if repeats:
        ids[3] = ids[1]  # rows 1 and 3 have one source
        known[3] = [int(ids[1])]
        known[0].append(int(ids[4]))  # source 4 is another known translation of text 0
    width = max(map(len, known))
    batch = {
        "passage_ids_N": ids,
        "first_N": np.array([ids[j] not in ids[:j] for j in range(N)]),
        "positive_ids_BxM": np.array([row + [-1] * (width - len(row)) for row in known], np.int32),
        "target_B": np.arange(N, dtype=np.int32),
        "teacher_p_NxE": unit(rng.normal(size=(N, E))).astype(np.float32),
    }
    x, y = (unit(rng.normal(size=(N, D))).astype(np.float32) for _ in range(2))
    return x, y, batch


def bitext_oracle(x, y, batch, config, valid=None):
    t, x, y = (of.astype(np.float64) for of in (batch["teacher_p_NxE"], x, y))
    valid = np.ones((len(x), len(x)), bool) if valid is None else valid
    others = valid & ~np.eye(len(x), dtype=bool)
    target = t @ t.T / config.teacher_temperature
    terms = {
        "cross": lambda: kl(target, x @ y.T / config.temperature, valid) + kl(target, y @ x.T / config.temperature, valid),
        "self": lambda: kl(target, x @ x.T / config.temperature, others) + kl(target, y @ y.T / config.temperature, others),
        "anchor": lambda: kl(target, t @ x.T / config.temperature, valid) + kl(target, t @ y.T / config.temperature, valid),
        "mse": lambda: np.mean((x - t) ** 2) + np.mean((y - t) ** 2),
    }  # fmt: skip
    weights = {name: getattr(config, f"{name}_weight") for name in terms}
    return sum(weight * terms[name]() for name, weight in weights.items() if weight)


TERMS = {"cross_weight": 1.3, "self_weight": 0.4, "anchor_weight": 0.8, "mse_weight": 2.0}


@pytest.mark.parametrize("term", [*TERMS, "all"])
def test_bitext_loss_equals_the_oracle(term):
    config = config_of(**(TERMS if term == "all" else {term: TERMS[term]}))
    x, y, batch = bitext_case()
    loss, _ = bitext_loss(x, y, batch, config, temperature=config.temperature)
    np.testing.assert_allclose(loss, bitext_oracle(x, y, batch, config), rtol=1e-5)


@pytest.mark.parametrize("weights", [{"cross_weight": 1.0}, {"self_weight": 1.0}])
def test_terms_over_scores_take_any_width(weights):
    config = config_of(**weights)
    x, y, batch = bitext_case(D=4, E=9)
    loss, _ = bitext_loss(x, y, batch, config, temperature=config.temperature)
    np.testing.assert_allclose(loss, bitext_oracle(x, y, batch, config), rtol=1e-5)


def test_the_released_loss_and_its_gradient_in_closed_form():
    """anchor at temperature 1 and N = 6; dL/ds_j = (1 / N tau) sum_i (R_ij - P_ij) t_i for a column of either language."""
    config = config_of(anchor_weight=1.0, temperature=1.0, teacher_temperature=1.0)
    x, y, batch = bitext_case(N=6)
    value = lambda x, y: bitext_loss(x, y, batch, config, temperature=1.0)[0]
    loss, gradients = jax.value_and_grad(value, argnums=(0, 1))(x, y)
    np.testing.assert_allclose(loss, bitext_oracle(x, y, batch, config), rtol=1e-5)
    t, every = batch["teacher_p_NxE"].astype(np.float64), np.ones((6, 6), bool)
    P = softmax(t @ t.T, every)
    for side, gradient in zip((x, y), gradients, strict=True):
        np.testing.assert_allclose(gradient, (softmax(t @ side.T, every) - P).T @ t / 6, atol=1e-6)


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient():
    config = config_of(**TERMS, temperature=0.2)
    _, _, batch = bitext_case()
    t = batch["teacher_p_NxE"]
    value = lambda x, y: bitext_loss(x, y, batch, config, temperature=0.2)[0]
    loss, gradients = jax.value_and_grad(value, argnums=(0, 1))(t, t)
    assert abs(loss) < 1e-5
    for gradient in gradients:
        np.testing.assert_allclose(gradient, 0, atol=1e-5)


def test_repeated_sources_and_known_translations_are_no_columns():
    x, y, batch = bitext_case(repeats=True)
    expected = np.ones((6, 6), bool)
    expected[:, 3] = False  # repeats the source of column 1
    expected[1, 3] = expected[3, 1] = False
    expected[0, 4] = expected[4, 0] = False  # 4 is a known translation of 0
    expected |= np.eye(6, dtype=bool)
    np.testing.assert_array_equal(distinct(batch), expected)
    config = config_of(cross_weight=1.0, self_weight=1.0)
    loss, _ = bitext_loss(x, y, batch, config, temperature=config.temperature)
    np.testing.assert_allclose(loss, bitext_oracle(x, y, batch, config, expected), rtol=1e-5)
    only_self = config_of(self_weight=1.0)
    gradient = jax.grad(lambda x: bitext_loss(x, y, batch, only_self, temperature=0.3)[0])(x)
    assert np.all(np.isfinite(gradient)) and np.any(gradient)


def test_one_pair_repeated_leaves_nothing_to_compare_and_no_nan():
    x, y, batch = bitext_case()
    batch |= {
        "passage_ids_N": np.full(6, 4),
        "first_N": np.arange(6) == 0,
        "positive_ids_BxM": np.full((6, 1), 4, np.int32),
    }
    config = config_of(cross_weight=1.0, self_weight=1.0, contrastive_weight=1.0)
    value = lambda x: bitext_loss(x, y, batch, config, temperature=0.3)[0]
    loss, gradient = jax.value_and_grad(value)(x)
    np.testing.assert_allclose([loss, *np.abs(gradient).ravel()], 0, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ the objectives


def build(name, student=5, teacher=5, **changes):
    encoder = EncoderConfig("static", vocab_size=9, width=student)
    return objectives.build(config_of(name=name, **changes), encoder, None, Widths(student, teacher))


def run(objective, sides, batch, extra=None):
    calls = []

    def encode(params, chunks, side, output="pooled"):
        calls.append((chunks, side))
        return sides[chunks]

    batch = {**batch, "queries": "queries", "passages": "passages"}
    loss, metrics = objective.loss({}, objective.parameters if extra is None else extra, batch, encode, None, 0)
    return float(loss), metrics, calls


def test_bitext_is_encoded_as_passages_and_queries_as_such_in_between():
    x, y, batch = bitext_case()
    objective = build("distill_bitext", cross_weight=1.0, self_weight=0.5)
    loss, _, calls = run(objective, {"queries": y, "passages": x}, batch)
    np.testing.assert_allclose(loss, bitext_oracle(x, y, batch, config_of(cross_weight=1.0, self_weight=0.5)), rtol=1e-5)  # fmt: skip
    assert sorted(calls) == [("passages", "passage"), ("queries", "passage")]
    q, p, scored = scores_case(E=5)
    loss, _, calls = run(objective, {"queries": q, "passages": p}, scored)
    np.testing.assert_allclose(loss, scores_oracle(q, p, scored, config_of()), rtol=1e-5)
    assert sorted(calls) == [("passages", "passage"), ("queries", "query")]


def test_vectors_of_other_widths_are_compared_through_a_learned_matrix_alone():
    with pytest.raises(
        UserError, match="anchor_weight is 1.0, but the student's vectors are 4 wide and the teacher's 5"
    ):
        build("distill_bitext", 4, anchor_weight=1.0)
    with pytest.raises(UserError, match="objective.mse_weight is 1.0, and objective.dimensions cuts"):
        build("distill_scores", mse_weight=1.0, dimensions=(2,))
    with pytest.raises(UserError, match="none of anchor_weight"):
        build("distill_bitext")
    x, y, batch = bitext_case(D=4, E=5)
    W = np.random.default_rng(3).normal(size=(4, 5)).astype(np.float32)
    weights = {"anchor_weight": 1.0, "mse_weight": 0.5}
    objective = build("distill_bitext", 4, **weights, teacher_projection=True, dimensions=(2,))
    np.testing.assert_array_equal(objective.parameters["projection"], np.eye(4, 5))
    loss, metrics, _ = run(objective, {"queries": y, "passages": x}, batch, {"projection": jnp.asarray(W)})
    at = [bitext_oracle(a @ w, b @ w, batch, config_of(**weights))
          for a, b, w in ((x, y, W), (unit(x[:, :2]), unit(y[:, :2]), W[:2]))]  # fmt: skip
    np.testing.assert_allclose([metrics["loss_at_all"], metrics["loss_at_2"], loss], [*at, sum(at)], rtol=1e-5)


def test_eight_devices_equal_one_in_loss_and_gradient(on_devices):
    program = """
        import jax, numpy as np
        from jax.sharding import AxisType
        from jdmdr import objectives, parallel
        from jdmdr.encoders.config import EncoderConfig
        from jdmdr.objectives.protocol import Widths
        from test_distill_objectives import TERMS, bitext_case, config_of, scores_case

        x, y, pairs = bitext_case(N=16, D=5, E=5)
        q, p, scored = scores_case(E=5)
        tile = lambda a: np.concatenate([a] * 2)
        scored = {**scored, "teacher_q_BxE": tile(scored["teacher_q_BxE"]), "teacher_p_NxE": tile(scored["teacher_p_NxE"]),
                  "target_B": np.arange(8) * 3, "passage_ids_N": np.arange(24), "first_N": np.ones(24, bool),
                  "positive_ids_BxM": (np.arange(8) * 3)[:, None]}
        cases = {"distill_bitext": (pairs, y, x), "distill_scores": (scored, tile(q), tile(p))}

        def run(devices, name):
            mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
            batch, queries, passages = cases[name]
            config = config_of(name=name, **TERMS, contrastive_weight=0.5)
            encoder = EncoderConfig("static", vocab_size=9, width=5)
            objective = objectives.build(config, encoder, mesh, Widths(5, 5))
            batch = parallel.put_batch({**batch, "queries": queries, "passages": passages}, mesh)
            encode = lambda params, block, side, output="pooled": block @ params
            step = lambda w, batch: objective.loss(w, {}, batch, encode, None, 0)
            weights = jax.device_put(np.eye(5, dtype=np.float32), parallel.replicated(mesh))
            return jax.device_get(jax.jit(jax.value_and_grad(step, has_aux=True))(weights, batch))

        for name in cases:
            for one, eight in zip(jax.tree.leaves(run(1, name)), jax.tree.leaves(run(8, name)), strict=True):
                np.testing.assert_allclose(one, eight, rtol=1e-5, atol=1e-6)
        print("equal")
    """
    assert on_devices(8, program).strip().endswith("equal")
