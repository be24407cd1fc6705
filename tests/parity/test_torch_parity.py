"""Exports loaded by sentence-transformers in an environment of its own, which has torch."""

import dataclasses
import json
import os
import pathlib
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tokenizers

from jdmdr import encoders, lora, pairs, parallel, peft
from jdmdr.encoders import huggingface
from jdmdr.encoders.config import EncoderConfig
from jdmdr.encoders.cross_encoder import classify
from jdmdr.encoders.lengthen import lengthen
from jdmdr.encoders.transformer import TransformerEncoder
from jdmdr.export import export
from jdmdr.objectives import qlm_rr
from jdmdr.tokenizer import Tokenizer, copy_pretrained, train_unigram
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


def disturbed(params, seed):
    """Random numbers added to every parameter, so that none is idle and the towers differ."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return tree.unflatten(x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True))


def random_transformer(family, **changes):
    """A checkpoint's shape with new random parameters."""
    config, _ = encoders.load_pretrained(GOLDENS / family, pooling=POOLINGS[family], normalize=family != "roberta")
    config = dataclasses.replace(config, **changes)
    return config, disturbed(encoders.build(config).init(jax.random.key(0)), len(family))


def random_static(tokenizer_dir, **changes):
    train_unigram([*TEXTS, LONG] * 4, 90, tokenizer_dir)
    size = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")).get_vocab_size()
    config = EncoderConfig(kind="static", vocab_size=size, width=24, **changes)
    return config, disturbed(encoders.build(config).init(jax.random.key(0)), 1)


def embed(config, params, tokenizer_dir, texts, max_length, side):
    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    tokenizer.enable_truncation(max_length)
    tokenizer.enable_padding(pad_id=config.pad_token_id)
    encoded = tokenizer.encode_batch(texts)
    tokens = Tokens(*(np.array([getattr(e, key) for e in encoded], np.int32) for key in ("ids", "attention_mask")))
    encoder = encoders.build(config)
    return np.asarray(encoder.apply(encoder.tower(params, side), tokens))


def run_with_torch(script, *arguments):
    command = [PYTHON, HERE / script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]


def test_sentence_transformers_gives_our_embeddings(tmp_path):
    expected, directories = {}, []
    systems = {family: (*random_transformer(family), GOLDENS / family, 20) for family in POOLINGS}
    unigram = tmp_path / "unigram"
    systems["static"] = (*random_static(unigram), unigram, 1000)
    systems["tanh"] = (
        *random_transformer("bert", projection=6, projection_bias=True, projection_activation="tanh"), GOLDENS / "bert", 20
    )  # fmt: skip
    systems["untied"] = (*random_transformer("roberta", projection=6, towers="untied"), GOLDENS / "roberta", 20)
    systems["norm"] = (
        *random_transformer("roberta", projection=6, projection_bias=True, projection_norm=True, towers="untied"),
        GOLDENS / "roberta", 20,
    )  # fmt: skip
    systems["untied-static"] = (*random_static(unigram, projection=6, towers="untied"), unigram, 1000)
    systems["truncated"] = (*encoders.truncate(*random_transformer("bert"), 5), GOLDENS / "bert", 20)
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
    run_with_torch("embed_with_torch.py", tmp_path / "texts.json", out, *directories)
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


def test_what_sentence_transformers_saved_gives_the_same_embeddings_here(tmp_path):
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    run_with_torch("save_with_torch.py", GOLDENS / "bert", tmp_path / "texts.json", tmp_path)
    expected = np.load(tmp_path / "vectors.npz")
    for name, towers, activation in (("router", "untied", "identity"), ("dense", "tied", "tanh")):
        copy_pretrained(str(tmp_path / name), tmp_path / f"{name}-tokenizer")
        config, params = encoders.load_pretrained(tmp_path / name)
        assert (config.towers, config.projection, config.projection_activation) == (towers, 6, activation)
        assert config.normalize == (name == "router")
        for side in encoders.SIDES:
            found = embed(config, params, tmp_path / f"{name}-tokenizer", TEXTS, 20, side)
            np.testing.assert_allclose(found, expected[f"{name}/{side}"], atol=1e-5, err_msg=f"{name}/{side}")


def test_cross_encoders_score_as_transformers_and_sentence_transformers_do(tmp_path):
    length = 24
    queries, passages = ["w5 w17 w3", "w9", " ".join(f"w{i}" for i in range(14))], [*TEXTS, LONG, ""]
    pairs_N = [(query, passage) for query in queries for passage in passages]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs_N))
    run_with_torch("classify_with_torch.py", tmp_path / "pairs.json", length, tmp_path)
    expected = dict(np.load(tmp_path / "scores.npz"))
    assert len(expected) == 10
    for name, logits_NxL in expected.items():
        label = logits_NxL.shape[1] - 1
        section = SimpleNamespace(name=str(tmp_path / name), label=f"label-{label}", length=length)
        scorer = pairs.Scorer(section, "float32", parallel.data_mesh())
        query_N, passage_N = (np.ravel(x) for x in np.indices((len(queries), len(passages))))
        found_N = scorer.score(scorer.queries(queries), query_N, passages, passage_N)
        odds_N = logits_NxL[:, label]
        if label:
            p_NxL = np.exp(logits_NxL) / np.exp(logits_NxL).sum(axis=1, keepdims=True)
            odds_N = np.log(p_NxL[:, label] / (1 - p_NxL[:, label]))
        # sentence-transformers cuts the longer of the two texts, which here is the passage but for the last query
        same = slice(12) if name == "cross-encoder" else slice(None)
        np.testing.assert_allclose(found_N[same], odds_N[same], atol=2e-5, err_msg=name)
        assert np.ptp(odds_N) > 0.1


ROBERTA = {
    "vocab_size": 340, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40,
    "max_position_embeddings": 34, "type_vocab_size": 1, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "pad_token_id": 1,
    "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
SENTENCES = ["Hello World", "", "What is the Capital of the World?", "http://a.b<sep>The Title<sep>and a Body " * 3]


def test_published_dual_encoders_embed_as_torch_and_go_to_sentence_transformers(tmp_path):
    """The layouts of ANCE, STAR and ADORE, with the tokenizers that they were trained with."""
    words = {"ance": "2.3.0", "star": "2.8.0", "narrow": "2.8.0"}
    for version in set(words.values()):
        copy_pretrained(str(GOLDENS / "roberta-bpe"), tmp_path / version, version)
    tokenizer = Tokenizer(tmp_path / "2.8.0", 20)
    ids = tokenizer.encode(SENTENCES)
    length = max(map(len, ids))
    ids_BxT = np.stack([np.pad(row, (0, length - len(row)), constant_values=1) for row in ids])
    mask_BxT = (np.arange(length) < np.array([[len(row)] for row in ids])).astype(np.int32)
    np.savez(tmp_path / "tokens.npz", ids=ids_BxT, mask=mask_BxT)
    (tmp_path / "shape.json").write_text(json.dumps(ROBERTA))
    run_with_torch("rdot_with_torch.py", tmp_path / "shape.json", tmp_path / "tokens.npz", tmp_path)
    expected, directories = {}, []
    for name, version in words.items():
        config, params = encoders.load_pretrained(tmp_path / name)
        assert (config.pooling, config.normalize, config.first_position) == ("cls", False, 2)
        found = encoders.build(config).apply(params, Tokens(ids_BxT, mask_BxT))
        np.testing.assert_allclose(found, np.load(tmp_path / f"{name}.npy"), atol=1e-5, err_msg=name)
        directories.append(tmp_path / f"{name}-export")
        export(config, params, tmp_path / version, directories[-1], prompts={"query": "", "passage": ""}, max_length=20,
               similarity="dot", card="# tiny\n")  # fmt: skip
        expected[name] = embed(config, params, tmp_path / version, SENTENCES, 20, "query")
    (tmp_path / "texts.json").write_text(json.dumps(SENTENCES))
    run_with_torch("embed_with_torch.py", tmp_path / "texts.json", tmp_path / "out.npz", *directories)
    vectors = np.load(tmp_path / "out.npz")
    for name, value in expected.items():
        np.testing.assert_allclose(vectors[f"{name}-export/query"], value, atol=2e-5, err_msg=name)


def test_peft_adds_our_adapters_to_the_checkpoint_as_we_do(tmp_path):
    keys = SimpleNamespace(rank=2, alpha=6.0, dropout=0.1, target="query/kernel|ffn_out|word")
    config, params = encoders.load_pretrained(GOLDENS / "bert")
    adapters = disturbed(lora.init(keys, params, 0), 2)
    peft.save(tmp_path, config, adapters, keys, str(GOLDENS / "bert"))
    ids_BxT = np.random.default_rng(0).integers(5, 200, (3, 9)).astype(np.int32)
    np.save(tmp_path / "ids.npy", ids_BxT)
    run_with_torch("adapt_with_torch.py", tmp_path, tmp_path / "ids.npy", tmp_path / "out.npy")
    tokens = Tokens(ids_BxT, np.ones_like(ids_BxT))
    before, after = (
        np.asarray(encoders.build(config).apply(tree, tokens, "tokens"))
        for tree in (params, lora.merge(params, adapters, keys))
    )
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), after, atol=1e-5)
    assert np.abs(after - before).max() > 0.1


def test_transformers_longformer_computes_what_a_lengthened_encoder_does(tmp_path):
    for family in ("bert", "xlm-roberta"):
        config, params = encoders.load_pretrained(GOLDENS / family)
        config, params = lengthen(config, params, 90, 8)
        params = disturbed(params, 3)  # the projections of global tokens are others than those of the rest
        segments_used = config.type_vocab > 1
        mask = (np.arange(64) < np.array([[64], [41]])).astype(np.int32)
        ids = np.random.default_rng(0).integers(5, 190, mask.shape).astype(np.int32)
        ids = np.where(mask > 0, ids, config.pad_token_id)
        prefix = np.array([[7], [5]], np.int32)
        segments = ((np.arange(64) >= prefix) & (mask > 0) & segments_used).astype(np.int32)
        home = tmp_path / family
        home.mkdir()
        huggingface.write_checkpoint(config, params, home)
        np.savez(home / "tokens.npz", ids=ids, mask=mask, segments=segments, prefix=prefix)
        run_with_torch("long_with_torch.py", home, home / "tokens.npz", home / "out.npz")
        found = np.load(home / "out.npz")
        encoder = TransformerEncoder(config)
        ours = encoder.apply(params, Tokens(ids, mask, segments if segments_used else None, prefix), "tokens")
        np.testing.assert_allclose(np.asarray(ours) * mask[..., None], found["hidden"] * mask[..., None], atol=2e-4)
        assert found["again"] == 0
        back, back_params = encoders.load_pretrained(home / "out.npz.saved")  # as transformers wrote it
        assert dataclasses.replace(back, original=None) == dataclasses.replace(config, original=None)
        jax.tree.map(np.testing.assert_array_equal, back_params, params)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_gives_the_logits_of_pretrained_heads(tied, tmp_path):
    mask = (np.arange(24) < np.array([[24], [15]])).astype(np.int32)
    ids = np.random.default_rng(0).integers(5, 190, mask.shape).astype(np.int32)
    prefix = np.full((2, 1), 6, np.int32)
    segments = ((np.arange(24) >= prefix) & (mask > 0)).astype(np.int32)
    np.savez(tmp_path / "tokens.npz", ids=ids, mask=mask, segments=segments, prefix=prefix)
    expected = {}
    for family in ("bert", "xlm-roberta", "longformer"):
        config, params = encoders.load_pretrained(
            GOLDENS / ("bert" if family == "longformer" else family), pooling="cls"
        )
        if family == "longformer":
            config, params = lengthen(config, params, 48, 8)
        heads = disturbed(qlm_rr.init_heads(jax.random.key(1), config, tied), 2)
        tokens = Tokens(
            np.where(mask > 0, ids, config.pad_token_id), mask, segments if config.type_vocab > 1 else None, prefix
        )
        hidden = TransformerEncoder(config).apply(params, tokens, "tokens")
        word = params["embeddings"]["word"]
        logits = qlm_rr.lm_logits(heads["lm_head"], word, hidden, config)
        expected[f"masked_lm-{family}"] = np.asarray(logits) * mask[..., None]
        expected[f"classifier-{family}"] = np.asarray(classify(heads["rank_head"], hidden[:, 0]))
        for kind in ("masked_lm", "classifier"):
            (tmp_path / f"{kind}-{family}").mkdir()
        huggingface.write_masked_lm(config, params, heads["lm_head"], tmp_path / f"masked_lm-{family}")
        huggingface.write_classifier(config, {**params, "head": heads["rank_head"]}, tmp_path / f"classifier-{family}")
    run_with_torch(
        "heads_with_torch.py", tmp_path / "tokens.npz", tmp_path / "out.npz", *(tmp_path / name for name in expected)
    )
    found = np.load(tmp_path / "out.npz")
    for name, logits in expected.items():
        theirs = found[name] * mask[..., None] if name.startswith("masked_lm") else found[name]
        np.testing.assert_allclose(theirs, logits, atol=2e-4, err_msg=name)
