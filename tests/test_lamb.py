import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdmdr.lamb import LARGEST_NORM, lamb


def oracle(params, gradients, rate, decay, eps=1e-8, b1=0.9, b2=0.999):
    """Plain loops in float64 over tensors; `decay` by name."""
    w = {name: value.astype(np.float64) for name, value in params.items()}
    m = {name: np.zeros_like(value) for name, value in w.items()}
    v = {name: np.zeros_like(value) for name, value in w.items()}
    for gradient in gradients:
        for name, g in gradient.items():
            g = g.astype(np.float64)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            u = m[name] / (np.sqrt(v[name]) + eps) + decay[name] * w[name]
            norm, length = min(np.linalg.norm(w[name]), LARGEST_NORM), np.linalg.norm(u)
            w[name] -= rate * (norm / length if norm and length else 1) * u
    return w


def run(optimiser, params, gradients):
    params = jax.tree.map(jnp.asarray, params)
    state = optimiser.init(params)
    for gradient in gradients:
        updates, state = optimiser.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_first_step_has_the_published_size():
    moved = run(lamb(0.01), {"w": np.array([3.0, 4.0], np.float32)}, [{"w": jnp.ones(2)}])
    np.testing.assert_allclose(np.array([3.0, 4.0]) - moved["w"], 0.0353553, rtol=1e-5)


def test_equals_the_formula_with_clamped_norms_zero_tensors_and_decay_on_some_tensors():
    rng = np.random.default_rng(0)
    params = {
        "large": rng.normal(size=(40, 40)).astype(np.float32),
        "zero": np.zeros(5, np.float32),
        "bias": rng.normal(size=5).astype(np.float32),
    }
    assert np.linalg.norm(params["large"]) > LARGEST_NORM
    gradients = [{k: rng.normal(size=v.shape).astype(np.float32) for k, v in params.items()} for _ in range(5)]
    gradients[0]["bias"] = np.zeros(5, np.float32)
    optimiser = lamb(1e-2, weight_decay=0.1, mask={"large": True, "zero": True, "bias": False})
    expected = oracle(params, gradients, 1e-2, {"large": 0.1, "zero": 0.1, "bias": 0})
    for name, value in run(optimiser, params, gradients).items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-5, atol=1e-6)


def test_differs_from_the_lamb_of_optax():
    params = {"w": np.random.default_rng(1).normal(size=(60, 60)).astype(np.float32)}
    gradients = [{"w": np.random.default_rng(i).normal(size=(60, 60)).astype(np.float32)} for i in range(5)]
    ours, theirs = (run(make(1e-2), params, gradients)["w"] for make in (lamb, optax.lamb))
    assert np.abs(ours - theirs).max() > 1e-3
