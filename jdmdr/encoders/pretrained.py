"""Encoders from a Hugging Face or sentence-transformers checkpoint: a hub name or a local directory."""

from __future__ import annotations

import dataclasses
import pathlib

import huggingface_hub
import jax.numpy as jnp
import numpy as np

from jdmdr.encoders import huggingface
from jdmdr.encoders.bi_encoder import HEAD
from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.encoders.static import inverse_softplus
from jdmdr.presets import PRESETS
from jdmdr.types import UserError

# Pooling of a sentence-transformers Pooling module: the older releases write one flag a mode, the newer one name.
POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
POOLING_NAMES = {"lasttoken": "last"}
MODULES = ("Transformer", "StaticEmbedding", "Pooling", "Dense", "LayerNorm", "Normalize")  # in this order, each once
ROUTES = {"query": "query", "passage": "document"}  # the name of a side's route in a Router module
HEAD_ACTIVATIONS = {"Identity": "identity", "Tanh": "tanh"}  # of a Dense module, by torch's class name

Modules = dict[str, pathlib.Path]  # class name -> directory


def load_pretrained(
    name_or_dir: str | pathlib.Path, *, pooling: str | None = None, normalize: bool | None = None
) -> tuple[EncoderConfig, Params]:
    """Loads a BERT, RoBERTa or XLM-R checkpoint, or a sentence-transformers static embedding; with its linear head and the
    LayerNorm behind it, and untied where a Router module gives each side a route of its own, or a file holds DPR's two encoders.

    Args:
      name_or_dir: a local directory, or a name on the Hugging Face hub.
      pooling, normalize: None takes what the directory's sentence-transformers modules say; else no normalisation, and
        the mean, or cls for DPR's encoders and with the head of ANCE, STAR and ADORE (`huggingface.DUAL_HEAD`).

    Returns:
      The configuration and the parameters, float32.

    Raises:
      UserError: the name cannot be fetched; a file is missing, corrupt or of an architecture that jdmdr does not have.
    """
    directory = find_checkpoint(name_or_dir)
    modules = read_modules(directory)
    config, params = _load_tower(directory, modules["query"], pooling, normalize)
    if modules["passage"] == modules["query"]:
        return config, params
    other, passage_params = _load_tower(directory, modules["passage"], pooling, normalize)
    if other != config:
        raise UserError(f"{directory}: its two routes are different encoders; jdmdr has two towers of one shape")
    return dataclasses.replace(config, towers="untied"), {"query": params, "passage": passage_params}


def _load_tower(
    directory: pathlib.Path, modules: Modules, pooling: str | None, normalize: bool | None
) -> tuple[EncoderConfig, Params]:
    if pooling is None and "Pooling" in modules:
        pooling = read_pooling(modules["Pooling"] / "config.json")
    if normalize is None:
        normalize = "Normalize" in modules
    if "StaticEmbedding" in modules:
        config, params = _load_static(modules["StaticEmbedding"], pooling or "mean", normalize)
    else:
        weights = modules.get("Transformer", directory)
        config = huggingface.read_config(weights / "config.json", pooling or "mean", normalize)
        params, head = huggingface.read_params(weights, config)
        two_towers = params.keys() == huggingface.TOWERS.keys()
        if two_towers or (config.original or {}).get("model_type") == huggingface.DPR:
            config = dataclasses.replace(config, pooling=pooling or "cls", towers="untied" if two_towers else "tied")
        if head and modules:
            raise UserError(
                f"{directory} has modules and {huggingface.DUAL_HEAD['kernel']} too; fetch the checkpoint again"
            )
        if head:
            config, params = _with_head(dataclasses.replace(config, pooling=pooling or "cls"), params, head)
    if "LayerNorm" in modules and "Dense" not in modules:
        raise UserError(f"{directory} has the module LayerNorm without Dense; such a head cannot be loaded")
    if "Dense" in modules:
        head, activation = read_head(modules["Dense"], config.width)
        config = dataclasses.replace(
            config, projection=head["kernel"].shape[1], projection_bias="bias" in head, projection_activation=activation
        )
        params = {**params, HEAD: {name: jnp.asarray(array) for name, array in head.items()}}
    if "LayerNorm" in modules:
        config = dataclasses.replace(config, projection_norm=True)
        params[HEAD]["norm"] = read_norm(modules["LayerNorm"], config.projection)
    return config, params


def _with_head(config: EncoderConfig, params: Params, head: Params) -> tuple[EncoderConfig, Params]:
    """The encoder with the head that `huggingface.read_params` found."""
    config = dataclasses.replace(config, projection=len(head["bias"]), projection_bias=True, projection_norm=True)
    return config, {**params, HEAD: head}


def find_checkpoint(name_or_dir: str | pathlib.Path) -> pathlib.Path:
    """The local directory of a checkpoint, fetched from the hub (config, tokenizer, weights) if need be.

    Of the weights, torch's *.bin are fetched only if there are no safetensors.

    Raises:
      UserError: neither a directory nor a name that the hub gives.
    """
    directory = pathlib.Path(name_or_dir).expanduser()
    if directory.is_dir():
        return directory
    huggingface_hub.logging.set_verbosity_error()  # what it warns of is told below
    try:
        # Fetch, then look, instead of asking the hub for its list: so it works offline from the cache too.
        directory = _fetch(str(name_or_dir), "*.safetensors")
        if not any(directory.rglob("*.safetensors")):
            directory = _fetch(str(name_or_dir), "*pytorch_model*.bin")
        return directory
    except (OSError, ValueError) as error:  # all that huggingface_hub raises is one of the two
        reason = str(error).strip().splitlines()[0].rstrip(". ")
        if home := next((p.published for p in PRESETS.values() if p.published and p.name == str(name_or_dir)), ""):
            raise UserError(
                f"the checkpoint {str(name_or_dir)!r} is published at {home} and not on the Hugging Face hub; fetch it from "
                "there into a directory of that name, or name its directory with encoder.name (PRESET=DIR in an ensemble)"
            ) from error
        raise UserError(
            f"{str(name_or_dir)!r} is no directory here and cannot be fetched from the Hugging Face hub ({reason}); "
            "give a local directory that holds config.json, tokenizer.json and model.safetensors or pytorch_model.bin"
        ) from error


def _fetch(name: str, weights: str) -> pathlib.Path:
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.model", "*.txt", "*_Dense/pytorch_model.bin", weights],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    )


def read_modules(directory: pathlib.Path) -> dict[str, Modules]:
    """The sentence-transformers modules that embed a query and those that embed a passage; none for a bare checkpoint.

    Raises:
      UserError: a module that jdmdr does not have, or modules in another order than its encoders compute in.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return {side: {} for side in ROUTES}
    found = [(m["type"].rsplit(".", 1)[-1], directory / m["path"]) for m in huggingface.read_json_file(path)]
    if not found or found[0][0] != "Router":
        return dict.fromkeys(ROUTES, _in_order(path, found))
    config = found[0][1] / "router_config.json"
    router = huggingface.read_json_file(config)
    out = {}
    for side, route in ROUTES.items():
        if route not in router["structure"]:
            raise UserError(f"{config} has no route {route}; routes for query and document can be loaded")
        own = [(router["types"][name].rsplit(".", 1)[-1], found[0][1] / name) for name in router["structure"][route]]
        out[side] = _in_order(config, own + found[1:])
    return out


def tokenizer_place(name_or_dir: str) -> str:
    """Where the tokenizer of a checkpoint lies: a Router's towers, equal to each other, each have it in their directory."""
    directory = pathlib.Path(name_or_dir).expanduser()
    if (directory / "tokenizer.json").is_file() or not (directory / "modules.json").is_file():
        return name_or_dir
    return str(next(iter(read_modules(directory)["query"].values())))


def _in_order(path: pathlib.Path, found: list[tuple[str, pathlib.Path]]) -> Modules:
    names = [name for name, _ in found]
    for name in names:
        if name not in MODULES:
            raise UserError(f"{path} has the module {name}; only {', '.join(MODULES)} can be loaded")
    if names != sorted(set(names), key=MODULES.index):
        raise UserError(
            f"{path} has the modules {', '.join(names)}; each can be there once, in the order {', '.join(MODULES)}"
        )
    return dict(found)


def read_head(directory: pathlib.Path, width: int) -> tuple[dict[str, np.ndarray], str]:
    """The parameters (`kernel` in x out, perhaps `bias`) and the activation of a Dense module.

    Raises:
      UserError: a residual connection, an activation that jdmdr does not have, or weights of another shape.
    """
    path = directory / "config.json"
    config = huggingface.read_json_file(path)
    activation = str(config.get("activation_function", "Tanh")).rsplit(".", 1)[-1]
    if activation not in HEAD_ACTIVATIONS:
        raise UserError(
            f"{path}: activation_function is {activation}; only {', '.join(HEAD_ACTIVATIONS)} can be loaded"
        )
    if config.get("use_residual") or config.get("module_input_name", "sentence_embedding") != "sentence_embedding":
        raise UserError(f"{path} asks for more than a linear layer over the embedding; such a head cannot be loaded")
    tensors = huggingface.read_tensors(directory)
    weight = tensors.pop("linear.weight", np.zeros(0))
    expected = (config.get("out_features"), width)
    bias = {"bias": tensors.pop("linear.bias")} if "linear.bias" in tensors else {}
    if weight.shape != expected or tensors or any(b.shape != expected[:1] for b in bias.values()):
        raise UserError(
            f"{directory}: linear.weight has shape {weight.shape}, but its config.json and the encoder ask for {expected}; "
            "fetch the checkpoint again"
        )
    head = {"kernel": weight.T, **bias}
    return {name: np.array(array, np.float32) for name, array in head.items()}, HEAD_ACTIVATIONS[activation]


def read_norm(directory: pathlib.Path, width: int) -> Params:
    """The parameters `scale` and `bias` of a LayerNorm module behind a head of this width.

    Raises:
      UserError: weights of another name or shape.
    """
    tensors = huggingface.read_tensors(directory)
    names = {"scale": "norm.weight", "bias": "norm.bias"}
    if {name: tensor.shape for name, tensor in tensors.items()} != dict.fromkeys(names.values(), (width,)):
        raise UserError(
            f"{directory} does not hold norm.weight and norm.bias of width {width}; fetch the checkpoint again"
        )
    return {ours: jnp.array(tensors[theirs], jnp.float32) for ours, theirs in names.items()}


def read_pooling(path: pathlib.Path) -> str:
    """The pooling that the configuration of a Pooling module names.

    Raises:
      UserError: it names none or several.
    """
    values = huggingface.read_json_file(path)
    modes = values.get("pooling_mode") or [mode for flag, mode in POOLING_FLAGS.items() if values.get(flag)]
    modes = [modes] if isinstance(modes, str) else modes
    if len(modes) != 1:
        raise UserError(f"{path} names {len(modes)} poolings ({', '.join(modes)}); choose one with encoder.pooling")
    return POOLING_NAMES.get(modes[0], modes[0])


def _load_static(directory: pathlib.Path, pooling: str, normalize: bool) -> tuple[EncoderConfig, Params]:
    tensors = huggingface.read_tensors(directory)
    table = tensors.get("embedding.weight")
    if table is None or table.ndim != 2:
        raise UserError(f"{directory} has no matrix embedding.weight, but {', '.join(tensors)}; fetch it again")
    config = EncoderConfig("static", vocab_size=len(table), width=table.shape[1], pooling=pooling, normalize=normalize)
    weight_V = np.full(len(table), inverse_softplus(1.0), np.float32)  # the rows hold their weights already
    # A copy, because on CPU jnp.asarray may share the memory of a mapped file.
    return config, {"embedding": jnp.array(table, jnp.float32), "weight": jnp.asarray(weight_V)}
