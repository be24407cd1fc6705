from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_contrastive import TEMPERATURE, make_case, oracle

from jdmdr import objectives
from jdmdr.encoders.config import EncoderConfig
from jdmdr.types import UserError

WIDTH = make_case()[0].shape[1]


def build(dimensions, weights=(), normalize=True, **changes):
    keys = {"name": "contrastive", "mode": "example", "temperature": TEMPERATURE, "learn_temperature": False,
            "min_temperature": 0.01, "max_temperature": 2.0}  # fmt: skip
    config = SimpleNamespace(dimensions=dimensions, dimension_weights=weights, **{**keys, **changes})
    return objectives.build(config, EncoderConfig("static", vocab_size=9, width=WIDTH, normalize=normalize))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def run(objective, q_BxD, p_NxD, batch, extra=None):
    """(loss, metrics), and how often each side was encoded."""
    calls, sides = [], {"query": q_BxD, "passage": p_NxD}

    def encode(params, chunks, side, output="pooled"):
        calls.append(side)
        return sides[side]

    batch = {**batch, "queries": "queries", "passages": "passages"}
    return objective.loss({}, objective.parameters if extra is None else extra, batch, encode, None, 0), calls


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("weights", [(), (0.5, 2.0)])
def test_loss_is_the_weighted_sum_over_the_prefixes(normalize, weights):
    q_BxD, p_NxD, batch = make_case()
    (loss, metrics), calls = run(build((2, 3), weights, normalize), q_BxD, p_NxD, batch)
    cut = (lambda x, d: unit(x[:, :d])) if normalize else (lambda x, d: x[:, :d])
    at = {d: oracle(cut(q_BxD, d), cut(p_NxD, d), batch, "example") for d in (2, 3)}
    whole = oracle(q_BxD, p_NxD, batch, "example")
    first, second = weights or (1, 1)
    np.testing.assert_allclose(loss, whole + first * at[2] + second * at[3], rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose([metrics["loss_at_all"], metrics["loss_at_2"], metrics["loss_at_3"]],
                               [whole, at[2], at[3]], rtol=1e-5)  # fmt: skip
    assert sorted(calls) == ["passage", "query"]


def test_gradient_is_the_sum_of_the_gradients():
    q_BxD, p_NxD, batch = make_case()
    plain, wrapped = build(()), build((2,), (0.5,))

    def value(objective, q, p=p_NxD):
        return run(objective, q, p, batch)[0][0]

    def short(q):
        cut = lambda x: x[:, :2] / jnp.linalg.norm(x[:, :2], axis=1, keepdims=True)
        return value(plain, cut(q), cut(jnp.asarray(p_NxD)))

    expected = jax.grad(lambda q: value(plain, q))(q_BxD) + 0.5 * jax.grad(short)(q_BxD)
    np.testing.assert_allclose(jax.grad(lambda q: value(wrapped, q))(q_BxD), expected, atol=1e-5)


@pytest.mark.parametrize("wrong", [0, WIDTH, WIDTH + 1])
def test_dimensions_that_the_embeddings_do_not_have_are_refused(wrong):
    with pytest.raises(UserError, match=f"objective.dimensions has {wrong}; .* which is {WIDTH} and always counts"):
        build((wrong,))


# --- learned temperature ---------------------------------------------------------------------------------------------


def test_learned_temperature_is_the_parameter_and_is_logged():
    q_BxD, p_NxD, batch = make_case()
    objective = build((), learn_temperature=True)
    (loss, metrics), _ = run(objective, q_BxD, p_NxD, batch)
    np.testing.assert_allclose(metrics["temperature"], TEMPERATURE, rtol=1e-6)
    np.testing.assert_allclose(loss, oracle(q_BxD, p_NxD, batch, "example"), rtol=1e-5)
    (loss, metrics), _ = run(objective, q_BxD, p_NxD, batch, {"log_temperature": jnp.log(2 * TEMPERATURE)})
    half = oracle(q_BxD / 2, p_NxD, batch, "example")
    np.testing.assert_allclose(loss, half, rtol=1e-5)
    assert objective.figures({"log_temperature": jnp.log(0.25)}) == {"temperature": pytest.approx(0.25)}
    assert build(()).parameters == {} and build(()).figures({}) == {}


def test_gradient_of_the_temperature_is_that_of_the_formula():
    q_BxD, p_NxD, batch = make_case()
    objective, x, eps = build((), learn_temperature=True), float(np.log(TEMPERATURE)), 1e-4
    got = jax.grad(lambda t: run(objective, q_BxD, p_NxD, batch, {"log_temperature": t})[0][0])(x)
    value = lambda t: oracle(q_BxD * TEMPERATURE / np.exp(t), p_NxD, batch, "example")
    np.testing.assert_allclose(got, (value(x + eps) - value(x - eps)) / (2 * eps), rtol=1e-3)


@pytest.mark.parametrize("bound, outward", [(0.01, -1.0), (2.0, 1.0)])
def test_temperature_stops_at_its_bound_and_can_come_back(bound, outward):
    from jdmdr.objectives import temperature

    config = SimpleNamespace(temperature=0.5, learn_temperature=True, min_temperature=0.01, max_temperature=2.0)
    value = lambda x, sign: sign * temperature.value(config, {"log_temperature": x})
    beyond = jnp.log(bound) + outward * 0.1
    np.testing.assert_allclose(value(beyond, 1.0), bound, rtol=1e-5)
    assert jax.grad(value)(beyond, -outward) == 0  # descent would lead further out
    assert jax.grad(value)(beyond, outward) * outward > 0  # descent leads back


def test_bounds_that_do_not_hold_the_start_are_refused():
    with pytest.raises(UserError, match="objective.temperature is .* min_temperature .0.5, above 0"):
        build((), learn_temperature=True, min_temperature=0.5, max_temperature=0.6)
