"""Exports loaded by sentence-transformers in an environment of its own, which has torch."""

import dataclasses
import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest
import tokenizers

from jdmdr import encoders
from jdmdr.encoders.config import EncoderConfig
from jdmdr.export import export
from jdmdr.tokenizer import train_unigram
from jdmdr.types import Tokens

HERE = pathlib.Path(__file__).parent
GOLDENS = HERE.parent / "goldens"
PYTHON = os.environ.get("JDMDR_TORCH_PYTHON")
POOLINGS = {"bert": "cls", "roberta": "last", "xlm-roberta": "mean"}
PROMPTS = {"query": "w1 w2 ", "passage": "w3 "}
TEXTS = ["w5 w17 w3", "w9", "w4 w4 w190 w8 w7", " ".join(f"w{i}" for i in range(12))]
LONG = " ".join(f"w{i}" for i in range(60))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON,
        reason="set JDMDR_TORCH_PYTHON to a python that has sentence-transformers; `make torch-env` makes one",
    ),
]


def random_transformer(family):
    """A checkpoint's shape with new random parameters, none of them idle."""
    config, params = encoders.load_pretrained(GOLDENS / family, pooling=POOLINGS[family], normalize=family != "roberta")
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(len(family)), len(leaves))
    return config, tree.unflatten(
        x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)
    )


def random_static(tokenizer_dir):
    train_unigram([*TEXTS, LONG] * 4, 90, tokenizer_dir)
    size = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    config = EncoderConfig(kind="static", vocab_size=size, width=24)
    params = encoders.build(config).init(jax.random.key(0))
    return config, {**params, "weight": jax.random.normal(jax.random.key(1), (size,))}


def with_head_and_towers(config, params):
    """The same with a linear head, and towers that differ."""
    config, params = encoders.add_head(jax.random.key(5), config, params, 7, bias=True)
    config, params = dataclasses.replace(config, towers="untied"), encoders.untie(params)
    moved = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params["query"])
    return config, {**params, "query": moved}


def embed(config, params, tokenizer_dir, texts, max_length, side):
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=config.pad_token_id)
    encoded = tokenizer.encode_batch(texts)
    tokens = Tokens(*(np.array([getattr(e, key) for e in encoded], np.int32) for key in ("ids", "attention_mask")))
    encoder = encoders.build(config)
    return np.asarray(encoder.apply(encoder.tower(params, side), tokens))


def test_sentence_transformers_gives_our_embeddings(tmp_path):
    expected, directories = {}, []
    systems = {family: (*random_transformer(family), GOLDENS / family, 20) for family in POOLINGS}
    systems["static"] = (*random_static(tmp_path / "unigram"), tmp_path / "unigram", 1000)
    for name in ("bert", "static"):
        config, params, tokenizer_dir, max_length = systems[name]
        systems[f"{name}-untied"] = (*with_head_and_towers(config, params), tokenizer_dir, max_length)
    texts = [*TEXTS, LONG]  # the long one is cut by a transformer and read whole by a static embedding
    for name, (config, params, tokenizer_dir, max_length) in systems.items():
        similarity = "cosine" if config.normalize else "dot"
        directories.append(tmp_path / name)
        export(
            config, params, tokenizer_dir, directories[-1], prompts=PROMPTS, max_length=max_length,
            similarity=similarity, card="# tiny\n",
        )  # fmt: skip
        expected[f"{name}/similarity"] = similarity
        for side, prompt in PROMPTS.items():
            expected[f"{name}/{side}"] = embed(
                config, params, tokenizer_dir, [prompt + t for t in texts], max_length, side
            )

    (tmp_path / "texts.json").write_text(json.dumps(texts))
    out = tmp_path / "out.npz"
    command = [PYTHON, HERE / "embed_with_torch.py", tmp_path / "texts.json", out, *directories]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = np.load(out)
    for key, value in expected.items():
        if key.endswith("similarity"):
            assert str(found[key]) == value
        else:
            np.testing.assert_allclose(found[key], value, atol=1e-5, err_msg=key)
    for family in POOLINGS:
        problems = json.loads(str(found[f"{family}/problems"]))
        missing = problems.pop("missing_keys")
        assert problems == {} and all(key.startswith("pooler.") for key in missing)
