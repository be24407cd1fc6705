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
