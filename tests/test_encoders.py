import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import encoders
from jdmdr.encoders import attention, layers, pooling, static
from jdmdr.encoders.config import EncoderConfig
from jdmdr.types import Tokens, UserError

TRANSFORMER = EncoderConfig(
    kind="transformer", family="bert", vocab_size=50, width=16, layers=1, heads=4, ffn=24, max_positions=12,
    hidden_dropout=0.1, attention_dropout=0.1,
)  # fmt: skip
STATIC = EncoderConfig(kind="static", vocab_size=50, width=16)
TOKENS = Tokens(
    np.random.default_rng(0).integers(1, 50, (4, 8)).astype(np.int32),
    (np.arange(8) < np.array([[8], [5], [1], [0]])).astype(np.int32),
)


@functools.cache
def start(config):
    return encoders.build(config).init(jax.random.key(0))


@functools.cache
def jitted(config):
    return jax.jit(encoders.build(config).apply, static_argnames=("output", "widths"))


@pytest.fixture(scope="module", params=[TRANSFORMER, STATIC], ids=lambda c: c.kind)
def config(request):
    return request.param


def test_config_survives_its_dictionary():
    config = dataclasses.replace(TRANSFORMER, original={"model_type": "bert"})
    back = EncoderConfig.from_dict(config.to_dict())
    assert back == config and back.original == config.original


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"pooling": "max"}, "encoder.pooling"),
        ({"dtype": "float16"}, "encoder.dtype"),
        ({"kind": "mlp"}, "encoder.kind"),
        ({"heads": 3}, "3 heads"),
        ({"towers": "both"}, "encoder.towers"),
        ({"kind": "static", "pooling": "cls"}, "static"),
    ],
)
def test_impossible_configurations_are_refused_by_key(change, named):
    with pytest.raises(UserError, match=named):
        dataclasses.replace(TRANSFORMER, **change)


def test_unknown_configuration_key_is_refused():
    with pytest.raises(UserError, match="colour"):
        EncoderConfig.from_dict({**STATIC.to_dict(), "colour": "blue"})


def test_parameters_are_float32_and_depend_on_the_key_alone(config):
    init = encoders.build(config).init
    one, same, other = start(config), init(jax.random.key(0)), init(jax.random.key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(one)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


@pytest.mark.parametrize(
    "config",
    [STATIC, *(dataclasses.replace(TRANSFORMER, pooling=name) for name in ("cls", "mean", "last"))],
    ids=lambda c: f"{c.kind}-{c.pooling}",
)
def test_rows_without_tokens_give_finite_embeddings_and_gradients(config):
    loss = lambda params: jnp.sum(encoders.build(config).apply(params, TOKENS) ** 3)
    value, gradient = jax.jit(jax.value_and_grad(loss))(start(config))
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_embeddings_have_unit_length_where_asked(config):
    lengths = np.linalg.norm(jitted(config)(start(config), TOKENS)[:3], axis=1)
    np.testing.assert_allclose(lengths, 1, rtol=1e-6)
    raw = jitted(dataclasses.replace(config, normalize=False))(start(config), TOKENS)[:3]
    assert np.all(np.abs(np.linalg.norm(raw, axis=1) - 1) > 1e-3)


PACKED_KINDS = {
    "bert, cls": dict(pooling="cls"),
    "roberta, mean": dict(family="roberta", pooling="mean"),
    "bert, last": dict(pooling="last"),
    "longformer": dict(family="longformer", window=4, pooling="cls"),
    "remat": dict(remat=True),
}


@pytest.mark.parametrize("widths", [(8, 8, 1), (9, 5, 5), None])
@pytest.mark.parametrize("kind", [*PACKED_KINDS, "static"])
def test_packed_sequences_have_the_embeddings_and_gradients_of_each_alone(kind, widths):
    if kind == "static":
        config = STATIC
    else:
        config = dataclasses.replace(TRANSFORMER, pad_token_id=1, max_positions=14, **PACKED_KINDS[kind])
    if widths is None and (config.window or kind == "static"):
        pytest.skip("sliding windows and static encoders need widths")
    texts = [TOKENS.ids_BxT[i, :length] for i, length in enumerate((8, 5, 1))]
    row = np.concatenate([*texts, np.ones(3, np.int32)])[None]
    packed = Tokens(row, (np.arange(17) < 14).astype(np.int32)[None], lengths_BxS=np.array([[8, 5, 1, 3]], np.int32))
    weights = np.arange(48.0).reshape(3, 16)

    def together(params):
        return jnp.sum(weights * encoders.build(config).apply(params, packed, widths=widths))

    def alone(params):
        rows = [
            encoders.build(config).apply(params, Tokens(ids[None], np.ones((1, len(ids)), np.int32))) for ids in texts
        ]
        return jnp.sum(weights * jnp.concatenate(rows))

    (value, gradient), (expected, expected_gradient) = (
        jax.jit(jax.value_and_grad(function))(start(config)) for function in (together, alone)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), gradient, expected_gradient)


def test_attention_has_the_gradient_that_jax_derives():
    q, k, v, weight = (jax.random.normal(jax.random.key(i), (3, 5, 2, 4)) for i in range(4))
    mask = jnp.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])  # the last: a row without tokens

    def values_and_gradients(dropout):
        attend = functools.partial(attention.plain, dropout)
        gradient = jax.grad(lambda *x: (attend(*x, mask) * weight).sum(), argnums=(0, 1, 2))
        return attend(q, k, v, mask), *gradient(q, k, v)

    for own, derived in zip(values_and_gradients(None), values_and_gradients(lambda x: x), strict=True):
        np.testing.assert_allclose(own, derived, atol=2e-6)


def test_packed_attention_is_used_only_where_it_was_seen_to_be_right(monkeypatch):
    config = dataclasses.replace(TRANSFORMER, dtype="bfloat16", attention_dropout=0.0)
    assert not attention.packs(config)  # no GPU
    monkeypatch.setattr(attention, "has_flash", lambda dtype: True)
    for wrong in (lambda q, *_: q, lambda q, *_: q * jnp.nan, lambda q: q):
        attention.packed_error.cache_clear()
        monkeypatch.setattr(attention, "packed_flash", wrong)
        assert not attention.packs(config)
    right = functools.partial(attention.packed_plain, None)
    attention.packed_error.cache_clear()
    monkeypatch.setattr(attention, "packed_flash", right)
    assert attention.packs(config)
    assert not attention.packs(dataclasses.replace(config, attention_dropout=0.1))
    assert not attention.packs(dataclasses.replace(config, window=8, family="longformer"))
    attention.packed_error.cache_clear()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_padding_does_not_change_an_embedding(family):
    config = dataclasses.replace(TRANSFORMER, family=family, pad_token_id=1)
    row = slice(1, 2)  # 5 tokens
    short = Tokens(TOKENS.ids_BxT[row, :5], TOKENS.mask_BxT[row, :5])
    padded = Tokens(TOKENS.ids_BxT[row], TOKENS.mask_BxT[row])
    one, other = (jitted(config)(start(config), tokens) for tokens in (short, padded))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_tokens_output_pools_to_the_embedding(config):
    hidden = np.asarray(jitted(config)(start(config), TOKENS, output="tokens"))
    assert hidden.shape == (4, 8, 16) and hidden.dtype == np.float32
    mean = np.stack([h[m > 0].mean(axis=0) for h, m in zip(hidden[:3], TOKENS.mask_BxT[:3], strict=True)])
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(jitted(config)(start(config), TOKENS)[:3], expected, atol=1e-6)


def test_dropout_acts_only_where_a_key_is_given():
    params, apply = start(TRANSFORMER), jitted(TRANSFORMER)
    plain = apply(params, TOKENS)
    one, same, other = (apply(params, TOKENS, rng=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - plain)[:3].max() > 1e-3 and np.abs(one - other)[:3].max() > 1e-3
    still = jitted(dataclasses.replace(TRANSFORMER, hidden_dropout=0.0, attention_dropout=0.0))
    np.testing.assert_allclose(still(params, TOKENS, rng=jax.random.key(1)), plain, atol=1e-6)


def test_remat_changes_neither_value_nor_gradient():
    def loss(params, remat):
        encoder = encoders.build(dataclasses.replace(TRANSFORMER, remat=remat))
        return jnp.sum(encoder.apply(params, TOKENS, rng=jax.random.key(3))[:3, 0])

    (value, gradient), (expected, expected_gradient) = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(start(TRANSFORMER), remat) for remat in (True, False)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradient, expected_gradient)


def test_bfloat16_stays_close_to_float32_and_returns_float32():
    params = jax.tree.map(lambda x: x * 4, start(TRANSFORMER))

    def loss(params, config):
        embeddings = encoders.build(config).apply(params, TOKENS)
        return jnp.sum(embeddings[:3] @ jnp.arange(16.0)), embeddings

    (gradient, embeddings), (expected_gradient, expected) = (
        jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, dataclasses.replace(TRANSFORMER, dtype=dtype))
        for dtype in ("bfloat16", "float32")
    )
    assert embeddings.dtype == jnp.float32
    assert np.sum(embeddings[:3] * expected[:3], axis=1).min() > 0.999
    flat, expected = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(g)]) for g in (gradient, expected_gradient))
    assert flat.dtype == np.float32
    assert flat @ expected / np.linalg.norm(flat) / np.linalg.norm(expected) > 0.99


def test_texts_longer_than_the_position_table_are_refused():
    config = dataclasses.replace(TRANSFORMER, family="roberta", pad_token_id=1)
    assert config.usable_positions == 10
    long = Tokens(np.ones((1, 11), np.int32), np.ones((1, 11), np.int32))
    with pytest.raises(UserError, match="11 tokens.* 10;"):
        encoders.build(config).apply(start(config), long)


def _plain_dense(x, kernel, bias):
    return x @ kernel + bias


def _plain_layer_norm(x, scale, bias, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * scale + bias


@pytest.mark.parametrize(
    ("ours", "plain", "shapes"),
    [
        (layers.dense, _plain_dense, [(3, 5, 8), (8, 6), (6,)]),
        (
            lambda *a: layers.layer_norm(*a, 1e-6),
            lambda *a: _plain_layer_norm(*a, 1e-6),
            [(3, 5, 8), (8,), (8,)],
        ),
        (layers.gelu, lambda x: jax.nn.gelu(x, approximate=False), [(3, 5, 8)]),
    ],
    ids=["dense", "layer_norm", "gelu"],
)
def test_hand_written_gradients_equal_automatic_ones(ours, plain, shapes):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    args = [jax.random.normal(key, shape) + 0.5 for key, shape in zip(keys, shapes, strict=True)]
    loss = lambda f: lambda *a: jnp.sum(jnp.sin(f(*a)))
    np.testing.assert_allclose(ours(*args), plain(*args), atol=1e-5)
    of_all = tuple(range(len(args)))
    for got, expected in zip(
        jax.grad(loss(ours), argnums=of_all)(*args), jax.grad(loss(plain), argnums=of_all)(*args), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=2e-5)


def test_pooling_takes_the_tokens_that_its_name_says():
    hidden = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 3)), jnp.float32)
    mask = jnp.asarray(TOKENS.mask_BxT)
    np.testing.assert_array_equal(pooling.cls(hidden, mask), hidden[:, 0])
    np.testing.assert_array_equal(pooling.last(hidden, mask)[:3], hidden[np.arange(3), [7, 4, 0]])
    np.testing.assert_allclose(pooling.mean(hidden, mask)[1], hidden[1, :5].mean(axis=0), atol=1e-6)
    np.testing.assert_array_equal(pooling.mean(hidden, mask)[3], 0)


def test_static_embedding_is_the_idf_weighted_sum_at_unit_length():
    idf = np.random.default_rng(2).gamma(2.0, size=50)
    idf[0] = 0.0
    params = static.init_from_idf(jax.random.key(0), STATIC, idf)
    np.testing.assert_allclose(jax.nn.softplus(params["weight"]), np.maximum(idf, 1e-3), rtol=1e-4)
    got = encoders.build(STATIC).apply(params, TOKENS)
    for row in range(3):
        tokens = TOKENS.ids_BxT[row][TOKENS.mask_BxT[row] > 0]
        total = (idf[tokens][:, None] * np.asarray(params["embedding"])[tokens]).sum(axis=0)
        np.testing.assert_allclose(got[row], total / np.linalg.norm(total), atol=1e-5)
    np.testing.assert_array_equal(got[3], 0)
