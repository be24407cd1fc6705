import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import encoders, lora, trainable
from jdmdr.encoders.config import EncoderConfig
from jdmdr.objectives import Objective
from jdmdr.optim import make_optimiser, named_leaves
from jdmdr.step import init_state, make_step
from jdmdr.types import Tokens, UserError

TRANSFORMER = EncoderConfig(kind="transformer", vocab_size=20, width=8, layers=1, heads=2, ffn=12, max_positions=12)
STATIC = EncoderConfig(kind="static", vocab_size=20, width=8)
TARGET = "attention/(query|value)/kernel$|(^|/)embedding$"
TOKENS = Tokens(*(np.ones((3, 4), np.int32) * x for x in (np.arange(1, 13).reshape(3, 4), 1)))


def keys(**changes):
    return SimpleNamespace(**{"rank": 2, "alpha": 6.0, "target": TARGET, "dropout": 0.0, **changes})


def section(**changes):
    own = {"lora": keys(), "trainable": "", "learning_rate": 0.1, "learning_rates": (), "warmup_share": 0.0, "steps": 9, "horizon": None,
           "decay": "constant", "weight_decay": 0.0, "clip": 0.0, "optimiser": "adamw", "no_decay": ""}  # fmt: skip
    return SimpleNamespace(**{**own, **changes})


@pytest.fixture(scope="module", params=[TRANSFORMER, STATIC], ids=lambda c: c.kind)
def model(request):
    encoder = encoders.build(request.param)
    return encoder, encoder.init(jax.random.key(0))


def trained_adapters(params, **changes):
    """Adapters with no zeros left."""
    adapters = lora.init(keys(**changes), params, 0)
    return jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(x.size), x.shape), adapters)


def named(tree):
    return {name: np.asarray(leaf) for name, leaf in named_leaves(tree)}


def test_new_adapters_leave_every_parameter_as_it_is(model):
    _, params = model
    adapters = lora.init(keys(), params, 0)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(params, adapters, keys()), params)
    again, other = lora.init(keys(), params, 0), lora.init(keys(), params, 1)
    jax.tree.map(np.testing.assert_array_equal, again, adapters)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(adapters), strict=True))


def test_merged_weights_are_the_sum_of_the_formula_where_adapted_and_nowhere_else(model):
    _, params = model
    adapters = trained_adapters(params)
    before, after, parts = named(params), named(lora.merge(params, adapters, keys())), named(adapters)
    adapted = {name.rsplit("/", 1)[0] for name in parts}
    assert adapted in ({"embedding"}, {f"layer_0/attention/{name}/kernel" for name in ("query", "value")})
    for name, weight in before.items():
        added = 6 / 2 * parts[f"{name}/a"] @ parts[f"{name}/b"] if name in adapted else 0
        np.testing.assert_allclose(after[name], weight + added, atol=1e-5)


def test_merged_layer_computes_what_layer_and_adapter_compute_apart():
    encoder = encoders.build(TRANSFORMER)
    params = encoder.init(jax.random.key(0))
    adapter = trained_adapters(params)["layer_0"]["attention"]["query"]["kernel"]
    kernel = params["layer_0"]["attention"]["query"]["kernel"]
    merged = lora.merge(params, trained_adapters(params), keys())["layer_0"]["attention"]["query"]["kernel"]
    x = np.random.default_rng(0).normal(size=(5, 8)).astype(np.float32)
    apart = x @ np.asarray(kernel) + 3 * (x @ np.asarray(adapter.a)) @ np.asarray(adapter.b)
    np.testing.assert_allclose(x @ np.asarray(merged), apart, atol=1e-5)


def test_gradient_of_an_adapter_is_that_of_its_matrix_through_the_other_factor(model):
    encoder, params = model
    adapters = trained_adapters(params)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8)), jnp.float32)
    value = lambda tree: jnp.sum(weights * encoder.apply(tree, TOKENS))
    dense = named(jax.grad(value)(lora.merge(params, adapters, keys())))
    got = jax.grad(lambda a: value(lora.merge(params, a, keys())))(adapters)
    parts = named(adapters)
    for name, gradient in named(got).items():
        matrix, factor = name.rsplit("/", 1)
        a, b = parts[f"{matrix}/a"], parts[f"{matrix}/b"]
        expected = 3 * (dense[matrix] @ b.T if factor == "a" else a.T @ dense[matrix])
        np.testing.assert_allclose(gradient, expected, atol=1e-5, err_msg=name)


def test_dropout_leaves_rows_of_a_out_and_keeps_the_expectation():
    params = {"layer": {"kernel": jnp.zeros((40, 8))}}
    adapters, settings = trained_adapters(params, target="kernel"), keys(dropout=0.25)
    whole = np.asarray(lora.merge(params, adapters, settings)["layer"]["kernel"])
    dropped = jax.vmap(lambda key: lora.merge(params, adapters, settings, key)["layer"]["kernel"])
    found = np.asarray(dropped(jax.random.split(jax.random.key(3), 400)))
    zero = (found == 0).all(axis=2)
    np.testing.assert_allclose(
        np.where(zero[:, :, None], whole / 0.75, found), np.broadcast_to(whole / 0.75, found.shape), rtol=1e-4
    )
    assert abs(zero.mean() - 0.25) < 0.02


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"target": "attention/q$"}, "lora.target 'attention/q.' matches no matrix; there are embeddings/position"),
        ({"rank": 8}, "lora.rank is 8, but layer_0/attention/query/kernel is 8 x 8"),
    ],
)
def test_adapters_that_cannot_be_are_refused_by_key(changes, sentence):
    params = encoders.build(TRANSFORMER).init(jax.random.key(0))
    with pytest.raises(UserError, match=sentence):
        lora.init(keys(**changes), params, 0)


# --- what trains and what stays --------------------------------------------------------------------------------------


def steps(encoder, params, section, own=None, count=3):
    """The state before and after some steps of an objective that moves every parameter it can reach."""
    target = jnp.asarray(np.random.default_rng(2).normal(size=(3, encoder.config.embedding_width)), jnp.float32)

    def loss(params, extra, batch, encode, rng, step):
        value = sum(jnp.sum((encoder.apply(encoder.tower(params, s), batch) - target) ** 2) for s in encoders.SIDES)
        return value + sum(jnp.sum(x**2) for x in extra.values()), {"loss": value}

    trained, frozen = trainable.split(section, params, own or {}, 0)
    optimiser = make_optimiser(section, trained, frozen)
    step = make_step(encoder, Objective(loss, own or {}), optimiser, 0, section.lora)
    state = init_state(trained, optimiser, frozen)
    before = jax.device_get(state)
    for _ in range(count):
        state, _ = step(state, jax.tree.map(jnp.asarray, TOKENS))
    return before, jax.device_get(state)


def test_with_adapters_nothing_else_moves_and_the_optimiser_knows_nothing_else(model):
    encoder, params = model
    before, after = steps(encoder, params, section())
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], jax.device_get(params))
    moved = named(after["params"])
    assert set(moved) == set(named(before["params"])) and all(name.startswith("lora/") for name in moved)
    assert all(np.any(moved[name] != value) for name, value in named(before["params"]).items())
    moments = sum(x.size for x in jax.tree.leaves(after["opt_state"]) if x.ndim)
    assert moments == 2 * sum(x.size for x in moved.values())
    plain, _ = trainable.assemble(after["params"], after["frozen"], keys())
    assert jax.tree.structure(plain) == jax.tree.structure(params)


def test_a_new_head_trains_beside_the_adapters():
    config = dataclasses.replace(STATIC, projection=4)
    encoder = encoders.build(config)
    _, after = steps(encoder, encoder.init(jax.random.key(0)), section())
    assert set(after["params"]) == {"lora", "projection"} and set(after["frozen"]) == {"embedding", "weight"}


def test_one_tower_trains_alone_where_the_regex_says_so():
    config = dataclasses.replace(STATIC, towers="untied")
    encoder = encoders.build(config)
    own = {"log_temperature": jnp.float32(1.0)}
    params = encoder.init(jax.random.key(0))
    kept = jax.device_get(params["passage"])
    changes = {"trainable": "^query/", "lora": keys(rank=0)}
    before, after = steps(encoder, params, section(**changes), own)
    assert set(after["params"]) == {"query", "objective"}
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], {"passage": kept})
    assert all(np.any(x != before["params"]["query"][name]) for name, x in after["params"]["query"].items())
    assert after["params"]["objective"]["log_temperature"] < 1.0


def test_assemble_gives_back_what_split_was_given(model):
    _, params = model
    for pattern in ("", "weight|norm", "embedding"):
        own = {"log_temperature": jnp.float32(0.5)}
        trained, frozen = trainable.split(section(trainable=pattern, lora=keys(rank=0)), params, own, 0)
        plain, same = trainable.assemble(trained, frozen)
        jax.tree.map(np.testing.assert_array_equal, plain, params)
        assert same == own


def test_a_regex_that_matches_no_parameter_is_refused_with_the_names_there_are():
    params = encoders.build(STATIC).init(jax.random.key(0))
    with pytest.raises(UserError, match="trainable: '.query/' matches no parameter; there are embedding, weight"):
        trainable.split(section(trainable="^query/"), params, {}, 0)
