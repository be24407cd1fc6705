import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import encoders
from jdmdr.encoders.config import EncoderConfig
from jdmdr.types import Tokens, UserError

TRANSFORMER = EncoderConfig(kind="transformer", vocab_size=50, width=16, layers=1, heads=4, ffn=24, max_positions=12)
STATIC = EncoderConfig(kind="static", vocab_size=50, width=16)
TOKENS = Tokens(
    np.random.default_rng(0).integers(1, 50, (4, 8)).astype(np.int32),
    (np.arange(8) < np.array([[8], [5], [1], [3]])).astype(np.int32),
)


@functools.cache
def start(config):
    return encoders.build(config).init(jax.random.key(0))


def embed(config, params, side="passage"):
    encoder = encoders.build(config)
    return np.asarray(encoder.apply(encoder.tower(params, side), TOKENS))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module", params=[TRANSFORMER, STATIC], ids=lambda c: c.kind)
def config(request):
    return request.param


@pytest.mark.parametrize("activation, function", [("identity", lambda x: x), ("tanh", np.tanh)])
def test_head_stands_between_pooling_and_normalisation(config, activation, function):
    headed = dataclasses.replace(config, projection=6, projection_bias=True, projection_activation=activation)
    params = {**start(headed)}
    params["projection"] = {**params["projection"], "bias": jnp.arange(6.0) / 6}
    pooled = embed(dataclasses.replace(config, normalize=False), params)
    expected = function(pooled @ np.asarray(params["projection"]["kernel"]) + np.arange(6) / 6)
    np.testing.assert_allclose(embed(headed, params), unit(expected), atol=1e-6)
    plain = dataclasses.replace(headed, normalize=False)
    np.testing.assert_allclose(embed(plain, params), expected, atol=1e-6)


@pytest.mark.parametrize("width", [16, 24])
def test_new_head_that_is_wide_enough_keeps_all_inner_products(config, width):
    plain = dataclasses.replace(config, normalize=False)
    before = embed(plain, start(plain))
    after = embed(*encoders.add_head(jax.random.key(1), plain, start(plain), width, bias=True))
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)


def test_new_narrow_head_keeps_inner_products_on_average():
    config = EncoderConfig(kind="static", vocab_size=4, width=64, normalize=False)
    x_Bx64 = np.random.default_rng(0).normal(size=(4, 64))
    products = []
    for seed in range(40):
        _, params = encoders.add_head(jax.random.key(seed), config, {}, 16, bias=False)
        y = x_Bx64 @ np.asarray(params["projection"]["kernel"])
        products.append(y @ y.T)
    np.testing.assert_allclose(np.mean(products, axis=0), x_Bx64 @ x_Bx64.T, atol=8)  # lengths are 64


def test_untied_towers_start_equal_and_each_embeds_its_side(config):
    untied = dataclasses.replace(config, towers="untied", projection=6)
    params = start(untied)
    np.testing.assert_array_equal(embed(untied, params, "query"), embed(untied, params, "passage"))
    tied = dataclasses.replace(config, projection=6)
    np.testing.assert_array_equal(embed(untied, params, "query"), embed(tied, start(tied)))
    moved = {**params, "query": jax.tree.map(lambda x: x + 0.1, params["query"])}
    np.testing.assert_array_equal(embed(untied, moved, "passage"), embed(untied, params, "passage"))
    assert np.abs(embed(untied, moved, "query") - embed(untied, params, "query")).max() > 1e-3


@pytest.mark.parametrize("towers", ["tied", "untied"])
@pytest.mark.parametrize("projection", [0, 6])
@pytest.mark.parametrize("normalize", [True, False])
def test_truncated_encoder_gives_the_first_dimensions(config, towers, projection, normalize):
    whole = dataclasses.replace(config, towers=towers, projection=projection, normalize=normalize)
    params = start(whole)
    expected = embed(whole, params, "query")[:, :4]
    short, cut = encoders.truncate(whole, params, 4)
    assert short.embedding_width == 4
    np.testing.assert_allclose(embed(short, cut, "query"), unit(expected) if normalize else expected, atol=1e-6)


def test_truncation_to_more_than_there_is_is_refused():
    with pytest.raises(UserError, match="encode.dimensions is 17, but the embeddings have 16"):
        encoders.truncate(STATIC, start(STATIC), 17)


@pytest.mark.parametrize("normalize", [True, False])
def test_layer_norm_stands_behind_the_head_and_trains(config, normalize):
    plain = dataclasses.replace(config, normalize=normalize)
    headed, params = encoders.add_head(jax.random.key(1), plain, start(plain), 6, bias=True, norm=True)
    rng = np.random.default_rng(0)
    head = jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), params["projection"])
    params = {**params, "projection": head}
    pooled = embed(dataclasses.replace(config, normalize=False), start(plain))
    mapped = pooled @ head["kernel"] + head["bias"]
    centred = mapped - mapped.mean(axis=1, keepdims=True)
    expected = (
        centred / np.sqrt(mapped.var(axis=1, keepdims=True) + 1e-5) * head["norm"]["scale"] + head["norm"]["bias"]
    )
    np.testing.assert_allclose(embed(headed, params), unit(expected) if normalize else expected, atol=1e-5)
    assert jax.tree.structure(encoders.build(headed).init(jax.random.key(0))) == jax.tree.structure(params)
    gradient = jax.grad(lambda p: encoders.build(headed).apply(p, TOKENS).sum())(params)["projection"]
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["norm"]))


def test_vectors_out_of_a_layer_norm_are_not_truncated():
    config, params = encoders.add_head(jax.random.key(1), STATIC, start(STATIC), 6, bias=True, norm=True)
    with pytest.raises(UserError, match="encode.dimensions is 3, but .* LayerNorm"):
        encoders.truncate(config, params, 3)
