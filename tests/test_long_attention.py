"""Sliding-window attention equals dense attention under its mask, costs memory linear in the length, and any checkpoint
can be given it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from jdmdr import encoders, models
from jdmdr.encoders.config import EncoderConfig
from jdmdr.encoders.huggingface import write_checkpoint
from jdmdr.encoders.lengthen import lengthen
from jdmdr.encoders.long_attention import windowed
from jdmdr.encoders.transformer import TransformerEncoder
from jdmdr.lengthen import lengthen as lengthen_checkpoint
from jdmdr.tokenizer import Tokenizer
from jdmdr.types import Tokens, UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"


def dense(q, k, v, sees):
    """Attention of one head in NumPy, float64: TxE each; `sees` is TxT."""
    scores = np.where(sees, q @ k.T, -np.inf)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True) @ v


@pytest.mark.parametrize("T, reach, prefix, real, block", [
    (40, 5, 7, 33, None), (64, 8, 11, 57, 8), (64, 8, 11, 57, 16), (50, 12, 0, 50, 13), (37, 40, 3, 37, None),
])  # fmt: skip
def test_blocks_equal_dense_attention_under_the_mask(T, reach, prefix, real, block):
    random = np.random.default_rng(T)
    q, k, v = random.normal(size=(3, 2, 3, T, 4))
    place = np.arange(T)
    local = (place >= prefix) & (place < real)
    G = max(prefix, 1) + 2  # more room than the prefix takes
    found = windowed(
        *(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(np.stack([local] * 2)),
        jnp.asarray(np.stack([place[:G] < prefix] * 2)), reach, block=block,
    )  # fmt: skip
    sees = (np.abs(place[:, None] - place) <= reach) & local | (place < prefix)
    for row in range(2):
        for head in range(3):
            expected = dense(q[row, head], k[row, head], v[row, head], sees)
            # rows of padding far from any real token see nothing and are nobody's
            np.testing.assert_allclose(found[row, head, :real], expected[:real], atol=2e-6)


def tokens_of(lengths, width, prefix=None, seed=0):
    ids = np.random.default_rng(seed).integers(5, 190, (len(lengths), width)).astype(np.int32)
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int32)
    segments = None
    if prefix is not None:
        segments = ((np.arange(width) >= prefix) & (mask > 0)).astype(np.int32)
        prefix = np.full((len(lengths), 1), prefix, np.int32)
    return Tokens(ids * mask, mask, segments, prefix)


@pytest.mark.parametrize("family, prefix", [("bert", 6), ("xlm-roberta", None)])
def test_a_window_over_the_whole_text_is_full_attention(family, prefix):
    config, params = encoders.load_pretrained(GOLDENS / family)
    long_config, long_params = lengthen(config, params, 96, 64)
    tokens = tokens_of([32, 20], 32, prefix)
    if family != "bert":
        tokens = tokens._replace(segments_BxT=None)
    real = tokens.mask_BxT[..., None]

    def loss(encoder_config, encoder_params):
        hidden = TransformerEncoder(encoder_config).apply(encoder_params, tokens, "tokens") * real
        return (hidden**2 * jnp.arange(hidden.shape[-1])).sum(), hidden

    (_, expected), gradient = jax.jit(jax.value_and_grad(lambda p: loss(config, p), has_aux=True))(params)
    (_, found), long_gradient = jax.jit(jax.value_and_grad(lambda p: loss(long_config, p), has_aux=True))(long_params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # what the two sets of projections get together is what the one gets
    attention, of_long = (g["layer_0"]["attention"] for g in (gradient, long_gradient))
    for name in ("query", "key", "value"):
        total = of_long[name]["kernel"] + of_long[f"{name}_global"]["kernel"]
        scale = np.abs(attention[name]["kernel"]).max()
        np.testing.assert_allclose(total, attention[name]["kernel"], atol=2e-5 * scale)


def test_padding_changes_nothing_and_the_width_neither():
    config, params = encoders.load_pretrained(GOLDENS / "bert")
    long_config, long_params = lengthen(config, params, 200, 8)
    encoder = TransformerEncoder(long_config)
    token_vectors = jax.jit(lambda tokens: encoder.apply(long_params, tokens, "tokens"))
    tokens = tokens_of([150, 90], 160, 5)
    expected = token_vectors(tokens)
    garbage = tokens._replace(ids_BxT=np.where(tokens.mask_BxT > 0, tokens.ids_BxT, 7))
    found = token_vectors(garbage)
    wider = Tokens(*(None if x is None else np.pad(x, ((0, 0), (0, 37))) if x.shape[1] > 1 else x for x in tokens))
    for other in (found, token_vectors(wider)):
        for row, length in enumerate((150, 90)):
            np.testing.assert_allclose(other[row, :length], expected[row, :length], atol=2e-5)


@pytest.mark.parametrize("pooling, far", [("cls", True), ("mean", False)])
def test_a_text_alone_has_a_global_first_token_where_that_is_pooled(pooling, far):
    config, params = encoders.load_pretrained(GOLDENS / "bert")
    config, params = lengthen(dataclasses.replace(config, pooling=pooling, layers=1), params, 200, 4)
    one = tokens_of([120], 120)
    other = one._replace(ids_BxT=one.ids_BxT.copy())
    other.ids_BxT[0, 100] += 1
    token_vectors = jax.jit(lambda tokens: TransformerEncoder(config).apply(params, tokens, "tokens")[0])
    a, b = token_vectors(one), token_vectors(other)
    assert (np.abs(a - b)[0].max() > 1e-4) == far
    assert np.abs(a - b)[99:102].max() > 1e-3 and np.abs(a - b)[50].max() < (1.0 if far else 1e-6)


def test_positions_are_tiled_whatever_the_length():
    for family, first in (("bert", 0), ("xlm-roberta", 2)):
        config, params = encoders.load_pretrained(GOLDENS / family)
        long_config, long_params = lengthen(config, params, 101, 8)
        usable = config.usable_positions
        assert (long_config.usable_positions, long_config.family) == (101, "longformer")
        learned, tiled = params["embeddings"]["position"], long_params["embeddings"]["position"]
        for place in (0, usable - 1, usable, 100):
            np.testing.assert_array_equal(tiled[long_config.first_position + place], learned[first + place % usable])


def test_a_long_checkpoint_comes_back_from_disk(tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / "xlm-roberta")
    config, params = lengthen(config, params, 80, 8)
    write_checkpoint(config, params, tmp_path)
    found, found_params = encoders.load_pretrained(tmp_path)
    assert found == config
    jax.tree.map(np.testing.assert_array_equal, found_params, params)


def test_what_cannot_be_lengthened_is_told():
    config, params = encoders.load_pretrained(GOLDENS / "bert")
    with pytest.raises(UserError, match=r"encoder.window is 7; it is an even number"):
        lengthen(config, params, 80, 7)
    with pytest.raises(UserError, match=r"has a window already; leave it 0"):
        lengthen(*lengthen(config, params, 80, 8), 90, 8)
    with pytest.raises(UserError, match="token vectors and no attention"):
        lengthen(EncoderConfig(kind="static", vocab_size=9, width=4), {}, 80, 8)


def test_memory_is_linear_in_the_length_up_to_8k_tokens():
    """Of a training step of BERT-base's width, from shapes alone: nothing is allocated."""
    config = EncoderConfig("transformer", 1000, 768, layers=1, heads=12, ffn=3072, family="longformer", window=64,
                           max_positions=8193, pooling="cls")  # fmt: skip
    encoder = TransformerEncoder(config)
    params = jax.eval_shape(encoder.init, jax.random.key(0))

    def temporary(T):
        block = jax.ShapeDtypeStruct((1, T), jnp.int32)
        prefix = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        loss = lambda p, ids, mask, prefix: encoder.apply(p, Tokens(ids, mask, None, prefix), "tokens").sum()
        compiled = jax.jit(jax.grad(loss)).lower(params, block, block, prefix).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    at = {T: temporary(T) for T in (2048, 4096, 8192)}
    assert at[8192] < 2.15 * at[4096] and at[4096] < 2.5 * at[2048], at
    assert at[8192] < 12 * 8192**2 * 4, at  # the scores of full attention alone: heads x T x T floats


def test_the_command_writes_a_checkpoint_with_its_tokenizer(tmp_path):
    out = tmp_path / "long"
    lengthen_checkpoint(str(GOLDENS / "bert"), 300, 8, out)
    config, params = encoders.load_pretrained(out)
    assert (config.window, config.usable_positions) == (8, 300)
    words = Tokenizer(out, 300).encode(["w1 " * 400])[0]
    assert len(words) == 300
    section = default.get_config().encoder
    section.name, section.pooling, section.query_length, section.passage_length = str(GOLDENS / "bert"), "mean", 32, 300
    section.window = 8
    started, started_params = models.start(section, 190, None, 0)
    assert started.window == 8 and started.usable_positions == 300
    jax.tree.map(np.testing.assert_array_equal, started_params, params)
