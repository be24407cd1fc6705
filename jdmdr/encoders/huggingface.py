"""Transformer checkpoints in the Hugging Face layout, read and written without torch."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from jdmdr.encoders import torch_file
from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.types import UserError

ARCHITECTURES = {
    "bert": "BertModel",
    "roberta": "RobertaModel",
    "xlm-roberta": "XLMRobertaModel",
    "longformer": "LongformerModel",
}
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
# Our field for each key of config.json that is a plain number.
CONFIG_KEYS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "intermediate_size": "ffn",
    "max_position_embeddings": "max_positions",
    "type_vocab_size": "type_vocab",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_token_id",
    "hidden_dropout_prob": "hidden_dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}
# What transformers leaves out of config.json because it is the default of all three families.
CONFIG_DEFAULTS = {
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
}
ONLY = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False, "projection_dim": 0}
PAD_DEFAULTS = {"bert": 0, "roberta": 1, "xlm-roberta": 1, "longformer": 1}

# Our module name on the left, the checkpoint's on the right.
TABLES = {"word": "word_embeddings", "position": "position_embeddings", "type": "token_type_embeddings"}
LAYER_DENSE = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
}
# What a sliding window has beside them, for the tokens that see everything.
LAYER_GLOBAL = {
    f"attention/{name}": f"attention.self.{name}" for name in ("query_global", "key_global", "value_global")
}
LAYER_NORM = {"attention_norm": "attention.output.LayerNorm", "ffn_norm": "output.LayerNorm"}
# The head of a sequence classifier: a dense layer over the first token, tanh, and a score a label.
ROBERTA_HEAD = {"head/dense": "classifier.dense", "head/out": "classifier.out_proj"}
HEADS = {
    "bert": {"head/dense": "pooler.dense", "head/out": "classifier"},
    "roberta": ROBERTA_HEAD,
    "xlm-roberta": ROBERTA_HEAD,
    "longformer": ROBERTA_HEAD,
}

# The head of a masked language model: a dense layer, LayerNorm, the word vectors (or a matrix of its own) and a bias.
ROBERTA_LM = {
    "dense": "lm_head.dense",
    "norm": "lm_head.layer_norm",
    "bias": "lm_head.bias",
    "decoder": "lm_head.decoder.weight",
}
BERT_LM = {
    "dense": "cls.predictions.transform.dense",
    "norm": "cls.predictions.transform.LayerNorm",
    "bias": "cls.predictions.bias",
    "decoder": "cls.predictions.decoder.weight",
}

DPR = "dpr"  # model_type of one of DPR's two BERT encoders, whose vector is the first token's
PREFIX = re.compile(r"^(?:(?:question_encoder|ctx_encoder)\.bert_model|(bert|roberta|longformer))\.")
# Parts of a checkpoint that an encoder does not have: poolers, heads of pretraining and classification, stored ids.
NOT_OURS = re.compile(r"^(pooler\.|cls\.|lm_head\.|classifier\.|embeddings\.(position_ids|token_type_ids)$)")
# The head of RoBERTa dual encoders as ANCE, STAR and ADORE publish them (`rdot_nll`): linear layer, then LayerNorm.
DUAL_HEAD = {
    "kernel": "embeddingHead.weight",
    "bias": "embeddingHead.bias",
    "norm/scale": "norm.weight",
    "norm/bias": "norm.bias",
}
# The prefixes of DPR's two encoders in the one file that its own code writes.
TOWERS = {"query": "question_model.", "passage": "ctx_model."}
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


Names = Iterator[tuple[str, str, bool]]  # our slash-joined path, the checkpoint's tensor name, whether it is transposed


def tensor_names(config: EncoderConfig) -> Names:
    """The names of every parameter of an encoder."""
    dense = LAYER_DENSE | (LAYER_GLOBAL if config.window else {})
    for ours, theirs in TABLES.items():
        yield f"embeddings/{ours}", f"embeddings.{theirs}.weight", False
    norms = {"embeddings/norm": "embeddings.LayerNorm"}
    for i in range(config.layers):
        for ours, theirs in dense.items():
            yield f"layer_{i}/{ours}/kernel", f"encoder.layer.{i}.{theirs}.weight", True
            yield f"layer_{i}/{ours}/bias", f"encoder.layer.{i}.{theirs}.bias", False
        norms |= {f"layer_{i}/{ours}": f"encoder.layer.{i}.{theirs}" for ours, theirs in LAYER_NORM.items()}
    for ours, theirs in norms.items():
        yield f"{ours}/scale", f"{theirs}.weight", False
        yield f"{ours}/bias", f"{theirs}.bias", False


def head_names(family: str) -> Names:
    """The names of every parameter of a sequence classifier's head."""
    for ours, theirs in HEADS[family].items():
        yield f"{ours}/kernel", f"{theirs}.weight", True
        yield f"{ours}/bias", f"{theirs}.bias", False


def lm_names(family: str, tied: bool) -> Names:
    """The names of every parameter of a masked language model's head."""
    of = BERT_LM if family == "bert" else ROBERTA_LM
    yield "dense/kernel", f"{of['dense']}.weight", True
    yield "dense/bias", f"{of['dense']}.bias", False
    yield "norm/scale", f"{of['norm']}.weight", False
    yield "norm/bias", f"{of['norm']}.bias", False
    yield "bias", of["bias"], False
    if not tied:
        yield "decoder", of["decoder"], False


def _decoder_bias(family: str) -> str:
    """The bias once more, which transformers reads where the decoder is not tied."""
    return (BERT_LM if family == "bert" else ROBERTA_LM)["decoder"].replace("weight", "bias")


def read_json_file(path: pathlib.Path) -> Any:
    """The JSON value of a file that a checkpoint must have.

    Raises:
      UserError: it is missing or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing; name a directory that holds a complete checkpoint") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); fetch the checkpoint again") from error


def read_config(path: pathlib.Path, pooling: str, normalize: bool) -> EncoderConfig:
    """The encoder that a checkpoint's config.json describes.

    Raises:
      UserError: an architecture that jdmdr does not have, or a missing key.
    """
    found = read_json_file(path)
    family = found.get("model_type") or _family(path.parent)
    family = "bert" if family == DPR else family
    if family not in ARCHITECTURES:
        raise UserError(f"{path}: model_type is {family!r}; only {', '.join(ARCHITECTURES)} can be loaded")
    values = {**CONFIG_DEFAULTS, "pad_token_id": PAD_DEFAULTS[family], **found}
    if "model_type" not in found or values["pad_token_id"] is None:
        # transformers before 2.4 wrote 0 for every model, and counted RoBERTa's positions from 1 whatever it wrote
        values["pad_token_id"] = PAD_DEFAULTS[family]
    for key, wanted in ONLY.items():
        if values.get(key, wanted) != wanted:
            raise UserError(f"{path}: {key} is {values[key]!r}; only {wanted!r} can be loaded")
    if values["hidden_act"] not in ACTIVATIONS:
        raise UserError(f"{path}: hidden_act is {values['hidden_act']!r}; only {', '.join(ACTIVATIONS)} can be loaded")
    missing = [key for key in CONFIG_KEYS if values.get(key) is None]
    if missing:
        raise UserError(f"{path}: no {', '.join(missing)}; add what the checkpoint was trained with")
    original = {key: value for key, value in found.items() if key != "_name_or_path"}  # a path of somebody's machine
    window = _window(path, found) if family == "longformer" else 0
    return EncoderConfig(
        kind="transformer", family=family, window=window, activation=ACTIVATIONS[values["hidden_act"]], pooling=pooling,
        normalize=normalize, original=original, **{ours: values[key] for key, ours in CONFIG_KEYS.items()},
    )  # fmt: skip


def _window(path: pathlib.Path, found: Mapping[str, Any]) -> int:
    """The window that all layers of a Longformer have."""
    windows = found.get("attention_window", 512)
    windows = {windows} if isinstance(windows, int) else set(windows)
    if len(windows) != 1:
        raise UserError(f"{path}: attention_window is {sorted(windows)}; only one window for all layers can be loaded")
    return windows.pop()


def _family(directory: pathlib.Path) -> str | None:
    """The family that the tensors' prefix tells, for a config.json of before transformers 2.4, which has no model_type."""
    return next((match[1] for name in read_tensors(directory) if (match := PREFIX.match(name))), None)


def read_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of `model.safetensors`, else of `pytorch_model.bin`; or of the shards that NAME.index.json names.

    Raises:
      UserError: no such file, a missing shard, or a file that its reader refuses.
    """
    for whole, read in WEIGHT_FILES.items():
        index = directory / f"{whole}.index.json"
        if (directory / whole).is_file():
            return read(directory / whole)
        if index.is_file():
            tensors: dict[str, np.ndarray] = {}
            for shard in shards(index):
                tensors.update(read(shard))
            return tensors
    raise UserError(
        f"{directory} holds neither {' nor '.join(WEIGHT_FILES)}; name a directory that holds a complete checkpoint"
    )


def shards(index: pathlib.Path) -> list[pathlib.Path]:
    """The files that an index names, beside it.

    Raises:
      UserError: one of them is missing, or the index names none.
    """
    paths = [index.with_name(name) for name in sorted(set(read_json_file(index).get("weight_map", {}).values()))]
    for path in paths:
        if not path.is_file():
            raise UserError(f"{path} is missing, but {index.name} names it; fetch it again")
    if not paths:
        raise UserError(f"{index} names no weights; fetch it again")
    return paths


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); fetch it again") from error


# By preference: the first that a directory has is read.
WEIGHT_FILES = {"model.safetensors": _read_safetensors, "pytorch_model.bin": torch_file.read_state_dict}


def read_params(directory: pathlib.Path, config: EncoderConfig) -> tuple[Params, Params]:
    """The encoder's parameters, float32, from a checkpoint directory, strictly one tensor for every parameter; and those of
    its `DUAL_HEAD`, none where it has no head. Of a file of `TOWERS` the parameters of each side.

    Raises:
      UserError: missing or unexpected tensors, or a wrong shape, by name.
    """
    tensors = _own_tensors(directory)
    if any(name.startswith(TOWERS["query"]) for name in tensors):
        leaves = {side: _encoder_leaves(directory, config, _below(tensors, prefix)) for side, prefix in TOWERS.items()}
        return {side: nest(of) for side, of in leaves.items()}, {}
    wanted = set(DUAL_HEAD.values())
    found = wanted & tensors.keys()
    if found and (missing := wanted - found):
        raise UserError(f"the checkpoint in {directory} lacks {_some(missing)} of its head")
    head: dict[str, jax.Array] = {}
    if found:
        wide = len(tensors[DUAL_HEAD["bias"]])
        shapes = {ours: (config.width, wide) if ours == "kernel" else (wide,) for ours in DUAL_HEAD}
        names = [(ours, theirs, ours == "kernel") for ours, theirs in DUAL_HEAD.items()]
        head = _leaves(directory, tensors, names, shapes)
    return nest(_encoder_leaves(directory, config, tensors)), nest(head)


def read_classifier(directory: pathlib.Path, config: EncoderConfig) -> Params:
    """As `read_params`, of a sequence classifier: with `head` beside the encoder's own, for as many labels as it has.

    Raises:
      UserError: a checkpoint without such a head; and as `read_params`.
    """
    names = list(head_names(config.family))
    tensors = _own_tensors(directory, keep=[theirs for _, theirs, _ in names])
    if missing := {theirs for _, theirs, _ in names} - tensors.keys():
        raise UserError(
            f"the checkpoint in {directory} has no head for sequence classification (it lacks {_some(missing)}); name "
            "that of a cross-encoder"
        )
    head = {theirs: tensors.pop(theirs) for _, theirs, _ in names}
    labels = len(head[f"{HEADS[config.family]['head/out']}.bias"])
    shapes: dict[str, tuple[int, ...]] = {}
    for part, width in (("head/dense", config.width), ("head/out", labels)):
        shapes |= {f"{part}/kernel": (config.width, width), f"{part}/bias": (width,)}
    return nest(_encoder_leaves(directory, config, tensors) | _leaves(directory, head, names, shapes))


def read_lm_head(directory: pathlib.Path, config: EncoderConfig, tied: bool) -> Params | None:
    """The head of a masked language model (dense, norm, bias; unless `tied` a decoder, a copy of the word vectors where the
    checkpoint ties them); None where the checkpoint has no such head."""
    names, bias = list(lm_names(config.family, tied=False)), _decoder_bias(config.family)
    tensors = _own_tensors(directory, keep=[bias, *(theirs for _, theirs, _ in names)])
    if bias in tensors:
        tensors[names[-2][1]] = tensors[bias]
    tensors.setdefault(names[-1][1], tensors["embeddings.word_embeddings.weight"])
    if any(theirs not in tensors for _, theirs, _ in names):
        return None
    D, V = config.width, config.vocab_size
    shapes = {"dense/kernel": (D, D), "bias": (V,), "decoder": (V, D)}
    shapes |= dict.fromkeys(("dense/bias", "norm/scale", "norm/bias"), (D,))
    return nest(_leaves(directory, tensors, names[:-1] if tied else names, shapes))


def _own_tensors(directory: pathlib.Path, keep: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by their present names without prefix; of its heads those in `keep` alone."""
    tensors = {}
    for name, tensor in read_tensors(directory).items():
        name = PREFIX.sub("", name)
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        if name in keep or not NOT_OURS.match(name):
            tensors[name] = tensor
    return tensors


def _below(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The tensors of one tower, by their names in it."""
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in found.items() if not NOT_OURS.match(name)}


def _encoder_leaves(
    directory: pathlib.Path, config: EncoderConfig, tensors: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    names = list(tensor_names(config))
    expected = {theirs for _, theirs, _ in names}
    for problem, found in (("lacks", expected - tensors.keys()), ("has unexpected", tensors.keys() - expected)):
        if found:
            raise UserError(
                f"the checkpoint in {directory} {problem} {_some(found)}; it is not the "
                f"{config.family} encoder of its config.json"
            )
    return _leaves(directory, tensors, names, _shapes(config))


def _leaves(
    directory: pathlib.Path, tensors: dict[str, np.ndarray], names: Iterable[tuple[str, str, bool]],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, jax.Array]:  # fmt: skip
    """Our parameters by path, float32; raises UserError on a wrong shape."""
    leaves = {}
    for ours, theirs, transposed in names:
        tensor = tensors.pop(theirs)  # freed once copied
        tensor = tensor.T if transposed else tensor
        if tensor.shape != shapes[ours]:
            raise UserError(
                f"{theirs} in {directory} has shape {_as_stored(tensor.shape, transposed)}, but its config.json "
                f"asks for {_as_stored(shapes[ours], transposed)}; the two files do not belong together"
            )
        # A copy, because on CPU jnp.asarray may share the memory of a mapped file.
        leaves[ours] = jnp.array(tensor, jnp.float32)
    return leaves


def nest(leaves: Mapping[str, jax.Array]) -> Params:
    """Arrays by slash-joined path as nested dicts."""
    params: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return params


def _as_stored(shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    return shape[::-1] if transposed else shape


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} more"


def _shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    from jdmdr.encoders.transformer import TransformerEncoder

    tree = jax.eval_shape(TransformerEncoder(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): leaf.shape for path, leaf in leaves}


def write_checkpoint(config: EncoderConfig, params: Params, directory: pathlib.Path) -> None:
    """Writes `config.json` and `model.safetensors` (float32) so that transformers' AutoModel loads them.

    Keys of the config.json that the encoder came from are kept where they still hold.
    """
    _write(config, _as_tensors(params, tensor_names(config)), directory, "Model", {})


def write_classifier(config: EncoderConfig, params: Params, directory: pathlib.Path) -> None:
    """As `write_checkpoint`, of a sequence classifier: `params` have a `head` (dense, out) beside the encoder's own."""
    head = _as_tensors(params, head_names(config.family))
    tensors = {f"bert.{name}" if name.startswith("pooler.") else name: tensor for name, tensor in head.items()}
    labels = [f"LABEL_{i}" for i in range(len(params["head"]["out"]["bias"]))]
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    _write(config, tensors | _inside(config, params), directory, "ForSequenceClassification", names)


def write_masked_lm(config: EncoderConfig, params: Params, head: Params, directory: pathlib.Path) -> None:
    """As `write_checkpoint`, of a masked language model; its head is tied to the word vectors unless it has a `decoder`."""
    tied = "decoder" not in head
    tensors = _inside(config, params) | _as_tensors(head, lm_names(config.family, tied))
    if not tied:
        tensors[_decoder_bias(config.family)] = np.asarray(head["bias"], np.float32)
    _write(config, tensors, directory, "ForMaskedLM", {"tie_word_embeddings": tied})


def _inside(config: EncoderConfig, params: Params) -> dict[str, np.ndarray]:
    """The encoder's tensors by their names in a model with a head."""
    prefix = "roberta" if config.family == "xlm-roberta" else config.family
    return {f"{prefix}.{name}": tensor for name, tensor in _as_tensors(params, tensor_names(config)).items()}


def _as_tensors(params: Params, names: Names) -> dict[str, np.ndarray]:
    leaves = {
        "/".join(entry.key for entry in path): np.asarray(leaf, np.float32)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    return {theirs: leaves[ours].T if transposed else leaves[ours] for ours, theirs, transposed in names}


def _write(
    config: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    directory: pathlib.Path,
    kind: str,
    more: Mapping[str, Any],
) -> None:
    save_tensors(tensors, directory / "model.safetensors")
    original = {k: v for k, v in (config.original or {}).items() if k != "torch_dtype"}
    activation = original.get("hidden_act")
    if ACTIVATIONS.get(activation) != config.activation:
        activation = next(theirs for theirs, ours in ACTIVATIONS.items() if ours == config.activation)
    values = {
        **original,
        "architectures": [ARCHITECTURES[config.family].replace("Model", kind)],
        "model_type": config.family,
        **({"attention_window": [config.window] * config.layers} if config.window else {}),
        "hidden_act": activation,
        "dtype": "float32",
        **{key: getattr(config, ours) for key, ours in CONFIG_KEYS.items()},
        **more,
    }
    (directory / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_tensors(tensors: Mapping[str, np.ndarray], path: pathlib.Path) -> None:
    """Writes a safetensors file that torch's readers take."""
    # safetensors writes the memory of an array that is not contiguous in the wrong order, without an error.
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    safetensors.numpy.save_file(contiguous, path, metadata={"format": "pt"})
