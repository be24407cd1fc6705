import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers

from jdmdr import encoders
from jdmdr.encoders.config import EncoderConfig
from jdmdr.export import check_parity, export
from jdmdr.tokenizer import train_unigram
from jdmdr.types import Tokens, UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
HOW = {
    "prompts": {"query": "query: ", "passage": "passage: "},
    "max_length": 20,
    "similarity": "cosine",
    "card": "# card\n",
}
TEXTS = ["w5 w17 w3", "w9", "", " ".join(f"w{i}" for i in range(60))]
WORDS = [
    "iron ore and coal",
    "a blast furnace",
    "iron and steel",
    "the tower of iron in Paris",
    "coal and limestone",
] * 8


@pytest.fixture(scope="module")
def unigram(tmp_path_factory):
    """A tokenizer trained on a few words: no special tokens around a text."""
    directory = tmp_path_factory.mktemp("unigram")
    train_unigram(WORDS, 60, directory)
    return directory


@pytest.fixture(scope="module")
def static(unigram):
    vocab_size = tokenizers.Tokenizer.from_file(str(unigram / "tokenizer.json")).get_vocab_size()
    config = EncoderConfig(kind="static", vocab_size=vocab_size, width=16)
    params = encoders.build(config).init(jax.random.key(0))
    params["weight"] = jax.random.normal(jax.random.key(1), (vocab_size,))
    return config, params


def embed(config, params, tokenizer_dir, texts, max_length=20, side="passage"):
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(length=max_length, pad_id=config.pad_token_id)
    encoded = tokenizer.encode_batch(texts)
    tokens = Tokens(*(np.array([getattr(e, key) for e in encoded], np.int32) for key in ("ids", "attention_mask")))
    encoder = encoders.build(config)
    return np.asarray(jax.jit(encoder.apply)(encoder.tower(params, side), tokens))


@pytest.mark.parametrize(
    ("family", "pooling", "normalize"),
    [("bert", "cls", True), ("roberta", "mean", False), ("xlm-roberta", "last", True)],
)
def test_exported_transformer_loads_back_equal(family, pooling, normalize, tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / family, pooling=pooling, normalize=normalize)
    export(config, params, GOLDENS / family, tmp_path / "out", **HOW)
    again, same = encoders.load_pretrained(tmp_path / "out")
    assert dataclasses.replace(again, original=None) == dataclasses.replace(config, original=None)
    jax.tree.map(np.testing.assert_array_equal, params, same)
    embeddings = embed(config, params, GOLDENS / family, TEXTS)
    assert check_parity(tmp_path / "out", TEXTS, embeddings, max_length=20) < 1e-5


@pytest.mark.parametrize("normalize", [True, False])
def test_exported_static_encoder_loads_back_with_equal_embeddings(static, unigram, normalize, tmp_path):
    config, params = static
    config = dataclasses.replace(config, normalize=normalize)
    export(config, params, unigram, tmp_path / "out", **HOW)
    again, folded = encoders.load_pretrained(tmp_path / "out")
    assert again == config
    np.testing.assert_allclose(jax.nn.softplus(folded["weight"]), 1, atol=1e-6)
    expected = embed(config, params, unigram, [*WORDS, ""])
    np.testing.assert_allclose(embed(again, folded, tmp_path / "out", [*WORDS, ""]), expected, atol=1e-6)
    assert check_parity(tmp_path / "out", [*WORDS, ""], expected, max_length=20) < 1e-6


HEAD = {"projection": 6, "projection_bias": True, "projection_activation": "tanh"}


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("transformer", {"towers": "untied", **HEAD}),
        ("static", HEAD),
        ("static", {"towers": "untied", "projection": 6, "normalize": False}),
        ("transformer", {"projection": 6, "projection_bias": True, "projection_norm": True, "normalize": False}),
        ("static", {"towers": "untied", "projection": 6, "projection_norm": True}),
    ],
    ids=["transformer", "static-head", "static-towers", "transformer-norm", "static-norm"],
)
def test_heads_and_towers_come_back_as_they_were_exported(static, unigram, kind, changes, tmp_path):
    loaded = encoders.load_pretrained(GOLDENS / "bert") if kind == "transformer" else static
    config = dataclasses.replace(loaded[0], **{"normalize": True, **changes})
    tokenizer_dir = GOLDENS / "bert" if kind == "transformer" else unigram
    params = encoders.build(config).init(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)  # towers differ
    export(config, params, tokenizer_dir, tmp_path / "out", **HOW)
    again, same = encoders.load_pretrained(tmp_path / "out")
    assert dataclasses.replace(again, original=None) == dataclasses.replace(config, original=None)
    texts = WORDS[:5] if kind == "static" else TEXTS
    vectors = {side: embed(config, params, tokenizer_dir, texts, side=side) for side in encoders.SIDES}
    for side, expected in vectors.items():
        np.testing.assert_allclose(embed(again, same, tmp_path / "out", texts, side=side), expected, atol=1e-6)
        assert check_parity(tmp_path / "out", texts, expected, max_length=20, side=side) < 1e-5
    if config.untied:
        with pytest.raises(UserError, match="do not use it"):
            check_parity(tmp_path / "out", texts, vectors["query"], max_length=20, side="passage")


def test_export_writes_what_sentence_transformers_reads(tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / "bert", pooling="cls", normalize=True)
    export(config, params, GOLDENS / "bert", tmp_path / "out", **HOW)
    read = lambda name: json.loads((tmp_path / "out" / name).read_text())
    assert [module["type"].split(".")[-1] for module in read("modules.json")] == ["Transformer", "Pooling", "Normalize"]
    assert read("config_sentence_transformers.json")["prompts"] == {"query": "query: ", "document": "passage: "}
    assert read("config_sentence_transformers.json")["similarity_fn_name"] == "cosine"
    assert read("sentence_bert_config.json")["max_seq_length"] == 20
    assert read("1_Pooling/config.json")["pooling_mode_cls_token"] is True
    assert (tmp_path / "out" / "README.md").read_text() == "# card\n"
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_static_export_disables_truncation_and_padding(static, unigram, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(unigram / "tokenizer.json"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    export(*static, tmp_path, tmp_path / "out", **HOW)
    written = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None


def test_parity_check_refuses_other_weights(static, unigram, tmp_path):
    config, params = static
    export(config, params, unigram, tmp_path / "out", **HOW)
    embeddings = embed(config, {**params, "weight": params["weight"] + 1}, unigram, WORDS)
    with pytest.raises(UserError, match="do not use it"):
        check_parity(tmp_path / "out", WORDS, embeddings, max_length=20)
    with pytest.raises(UserError, match="difference of nan"):
        check_parity(tmp_path / "out", WORDS, embeddings * np.nan, max_length=20)


def test_export_replaces_an_earlier_export_and_nothing_else(static, unigram, tmp_path):
    out = tmp_path / "out"
    export(*static, unigram, out, **HOW)
    export(*static, unigram, out, **{**HOW, "card": "# second\n"})
    assert (out / "README.md").read_text() == "# second\n"
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files"):
        export(*static, unigram, tmp_path / "home", **HOW)
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["letter.txt"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"similarity": "euclidean"}, "similarity is 'euclidean'"),
        ({"prompts": {"query": ""}}, "prompts"),
        ({"max_length": 33}, "max_length is 33"),
    ],
)
def test_what_cannot_be_exported_is_refused_by_name(change, named, tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / "xlm-roberta")
    with pytest.raises(UserError, match=named):
        export(config, params, GOLDENS / "xlm-roberta", tmp_path / "out", **{**HOW, **change})
    assert list(tmp_path.iterdir()) == []


def test_static_export_refuses_a_tokenizer_that_adds_special_tokens(tmp_path):
    config = EncoderConfig(kind="static", vocab_size=200, width=4)
    with pytest.raises(UserError, match="adds 2 special tokens"):
        export(config, encoders.build(config).init(jax.random.key(0)), GOLDENS / "bert", tmp_path / "out", **HOW)


def test_export_refuses_a_tokenizer_larger_than_the_vocabulary(static, tmp_path):
    with pytest.raises(UserError, match="tokenizer has 200 tokens"):
        export(*static, GOLDENS / "bert", tmp_path / "out", **HOW)


def test_export_refuses_a_directory_without_a_tokenizer(static, tmp_path):
    with pytest.raises(UserError, match="tokenizer.json is missing"):
        export(*static, tmp_path, tmp_path / "out", **HOW)
