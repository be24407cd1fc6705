import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from jdmdr.optim import make_optimiser, path_name, schedule
from jdmdr.types import UserError

PARAMS = {"embedding": jnp.ones((3, 2)), "layer": {"kernel": jnp.ones(4)}, "weight": jnp.ones(5)}
GRADIENT = {"embedding": jnp.full((3, 2), 0.3), "layer": {"kernel": jnp.full(4, -2.0)}, "weight": jnp.full(5, 0.01)}


def section(**changes):
    defaults = dict(steps=20, learning_rate=1e-3, learning_rates=(), warmup_share=0.25, horizon=None, decay="linear",
                    weight_decay=0.0, no_decay="", clip=0.0, optimiser="adamw")  # fmt: skip
    return ConfigDict({**defaults, **changes})


def first_update(**changes):
    """A step of Adam on a first gradient is the learning rate against the gradient's sign, whatever its size."""
    optimiser = make_optimiser(section(warmup_share=0.0, **changes), PARAMS)
    return optimiser.update(GRADIENT, optimiser.init(PARAMS), PARAMS)[0]


@pytest.mark.parametrize("decay", ["linear", "constant"])
@pytest.mark.parametrize("warmup_share", [0.0, 0.1, 0.25, 1.0])
def test_schedule_rises_and_falls_in_straight_lines(decay, warmup_share):
    keys = section(decay=decay, warmup_share=warmup_share)
    rise = round(warmup_share * 20)
    expected = [
        2.0 * step / rise if step < rise
        else 2.0 if decay == "constant"
        else 2.0 * (20 - step) / max(20 - rise, 1) if step < 20 else 0.0
        for step in range(20)
    ]  # fmt: skip
    rates = [float(schedule(keys, 2.0)(step)) for step in range(20)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_rate_of_a_pattern_acts_on_the_parameters_it_matches_alone():
    update = first_update(learning_rates=(("^weight$", 0.5), ("kernel", 0.1), ("layer", 7.0)))
    np.testing.assert_allclose(update["weight"], -0.5, rtol=1e-4)
    np.testing.assert_allclose(update["layer"]["kernel"], 0.1, rtol=1e-4)
    np.testing.assert_allclose(update["embedding"], -1e-3, rtol=1e-4)


def test_gradient_is_clipped_by_its_norm_over_all_parameters():
    norm = float(optax.global_norm(GRADIENT))
    optimiser = make_optimiser(section(clip=norm / 10), PARAMS)
    _, state = optimiser.update(GRADIENT, optimiser.init(PARAMS), PARAMS)
    (first_moment,) = [x for x in optax.tree_utils.tree_get_all_with_path(state, "mu")][0][1:]
    np.testing.assert_allclose(first_moment["weight"], 0.1 * 0.01 / 10, rtol=1e-5)


def test_weight_decay_pulls_towards_zero_by_the_rate():
    with_decay, without = first_update(weight_decay=0.1), first_update()
    np.testing.assert_allclose(with_decay["weight"] - without["weight"], -1e-3 * 0.1, rtol=1e-3)


def test_what_no_decay_matches_does_not_decay():
    with_decay, without = first_update(weight_decay=0.1, no_decay="^weight$|kernel"), first_update()
    np.testing.assert_array_equal(with_decay["weight"], without["weight"])
    np.testing.assert_array_equal(with_decay["layer"]["kernel"], without["layer"]["kernel"])
    np.testing.assert_allclose(with_decay["embedding"] - without["embedding"], -1e-3 * 0.1, rtol=1e-3)


def test_lamb_scales_an_update_by_the_norm_of_its_tensor():
    update = first_update(optimiser="lamb")
    for name in ("embedding", "weight"):
        norm = float(jnp.linalg.norm(PARAMS[name]))
        np.testing.assert_allclose(jnp.linalg.norm(update[name]), 1e-3 * norm, rtol=1e-4)


def test_pattern_that_matches_nothing_is_refused_with_the_names_there_are():
    with pytest.raises(
        UserError, match=r"learning_rates: 'bias' matches no parameter.*embedding, layer/kernel, weight"
    ):
        make_optimiser(section(learning_rates=(("bias", 1.0),)), PARAMS)


def test_unknown_decay_is_refused():
    with pytest.raises(UserError, match="decay is 'cosine'; it is one of linear, constant"):
        make_optimiser(section(decay="cosine"), PARAMS)


def test_path_names_are_slash_joined():
    import jax

    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path({"a": [1, {"b": 2}]})]
    assert names == ["a/0", "a/1/b"]


@pytest.mark.parametrize("decay", ["linear", "constant"])
def test_a_run_shorter_than_its_horizon_has_the_beginning_of_the_longer_ones_schedule(decay):
    short, whole = section(steps=8, horizon=20, decay=decay), section(steps=20, decay=decay)
    assert [float(schedule(short, 2.0)(step)) for step in range(8)] == [
        float(schedule(whole, 2.0)(step)) for step in range(8)
    ]
