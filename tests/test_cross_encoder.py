"""Cross-encoders read the checkpoints that they should, and give the log-odds of their relevant label."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import processors

from jdmdr import encoders
from jdmdr.encoders import load_cross_encoder
from jdmdr.types import Tokens, UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
HEADS = {"bert": ("pooler.dense", "classifier"), "roberta": ("classifier.dense", "classifier.out_proj")}
TEMPLATES = {"bert": "<s> $A </s> $B:1 </s>:1", "roberta": "<s> $A </s> </s> $B </s>"}


def make_classifier(family, labels, directory, **config):
    """A golden checkpoint as a sequence classifier: with a random head, a pair template, and its tensors prefixed."""
    shutil.copytree(GOLDENS / family, directory)
    random = np.random.default_rng(labels)
    path = directory / "model.safetensors"
    tensors = {
        name if name.startswith(("roberta.", "lm_head.")) else f"{family}.{name}": tensor
        for name, tensor in safetensors.numpy.load_file(path).items()
    }
    for name, width in zip(HEADS[family], (32, labels), strict=True):
        name = f"bert.{name}" if name.startswith("pooler") else name
        tensors[f"{name}.weight"] = random.normal(size=(width, 32)).astype(np.float32) * 0.3
        tensors[f"{name}.bias"] = random.normal(size=width).astype(np.float32)
    safetensors.numpy.save_file(tensors, path)
    edit_json(directory / "config.json", id2label={str(i): f"label-{i}" for i in range(labels)}, **config)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=TEMPLATES[family], special_tokens=special
    )
    backend.save(str(directory / "tokenizer.json"))
    names = ["input_ids", *(["token_type_ids"] if family == "bert" else []), "attention_mask"]
    edit_json(directory / "tokenizer_config.json", model_input_names=names)
    return directory


def edit_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewrite(directory, change):
    path = directory / "model.safetensors"
    safetensors.numpy.save_file(change(safetensors.numpy.load_file(path)), path)


def oracle(directory, tokens, family):
    """Logits in NumPy from the encoder's token vectors."""
    config, params = encoders.load_pretrained(directory)
    hidden_BxTxD = np.asarray(encoders.build(config).apply(params, tokens, "tokens"))
    tensors = {
        n.removeprefix("bert."): t for n, t in safetensors.numpy.load_file(directory / "model.safetensors").items()
    }
    dense, out = HEADS[family]
    x_BxD = np.tanh(hidden_BxTxD[:, 0] @ tensors[f"{dense}.weight"].T + tensors[f"{dense}.bias"])
    return x_BxD @ tensors[f"{out}.weight"].T + tensors[f"{out}.bias"]


def some_tokens(segments):
    golden = np.load(GOLDENS / "bert.npz")
    half = np.cumsum(golden["mask"], axis=1) > golden["mask"].sum(axis=1, keepdims=True) // 2
    return Tokens(golden["ids"], golden["mask"], half.astype(np.int32) * golden["mask"] if segments else None)


@pytest.mark.parametrize("family, labels", [("bert", 1), ("bert", 3), ("roberta", 1), ("roberta", 2)])
def test_the_score_is_the_log_odds_of_the_relevant_label(family, labels, tmp_path):
    directory = make_classifier(family, labels, tmp_path / family)
    tokens = some_tokens(segments=family == "bert")
    logits_BxL = oracle(directory, tokens, family)
    for relevant in range(labels):
        encoder, params = load_cross_encoder(directory, f"label-{relevant}", "float32")
        expected = logits_BxL[:, 0]
        if labels > 1:
            p_BxL = np.exp(logits_BxL) / np.exp(logits_BxL).sum(axis=1, keepdims=True)
            expected = np.log(p_BxL[:, relevant] / (1 - p_BxL[:, relevant]))
        np.testing.assert_allclose(jax.jit(encoder.apply)(params, tokens), expected, atol=1e-5)


def test_segments_choose_the_type_vectors(tmp_path):
    encoder, params = load_cross_encoder(make_classifier("bert", 1, tmp_path / "bert"), "", "float32")
    tokens = some_tokens(segments=True)
    both = [encoder.apply(params, block) for block in (tokens, tokens._replace(segments_BxT=None))]
    assert np.abs(both[0] - both[1]).max() > 1e-3
    params["embeddings"]["type"] = np.tile(params["embeddings"]["type"][:1], (2, 1))
    np.testing.assert_array_equal(encoder.apply(params, tokens), both[1])


def test_random_parameters_have_the_tree_of_a_checkpoint(tmp_path):
    encoder, params = load_cross_encoder(make_classifier("roberta", 2, tmp_path / "r"), "label-1", "float32")
    made = encoder.init(jax.random.key(0))
    assert jax.tree.structure(made) == jax.tree.structure(params)
    assert jax.tree.map(np.shape, made) == jax.tree.map(np.shape, params)


def test_an_encoder_without_a_head_is_told_so():
    for family in ("bert", "roberta"):
        with pytest.raises(UserError, match=r"has no head for sequence classification \(it lacks classifier"):
            load_cross_encoder(GOLDENS / family, "", "float32")


@pytest.mark.parametrize("labels, label, sentence", [
    (2, "", r"has 2 labels \(label-0, label-1\); name the one that means relevant by --label"),
    (2, "yes", "has no label 'yes'; its labels are label-0, label-1"),
    (1, "yes", "has no label 'yes'; its labels are label-0"),
])  # fmt: skip
def test_several_labels_need_a_choice_by_name(labels, label, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        load_cross_encoder(make_classifier("bert", labels, tmp_path / "bert"), label, "float32")


def test_another_family_and_a_head_of_another_width_are_refused(tmp_path):
    directory = make_classifier("bert", 1, tmp_path / "bert", model_type="deberta-v2")
    with pytest.raises(UserError, match="model_type is 'deberta-v2'; only bert, roberta, xlm-roberta"):
        load_cross_encoder(directory, "", "float32")
    edit_json(directory / "config.json", model_type="bert")
    rewrite(directory, lambda tensors: tensors | {"classifier.weight": np.zeros((1, 31), np.float32)})
    with pytest.raises(UserError, match=r"classifier.weight in .* has shape \(1, 31\), .* asks for \(1, 32\)"):
        load_cross_encoder(directory, "", "float32")
