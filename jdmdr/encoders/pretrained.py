"""Encoders from a Hugging Face or sentence-transformers checkpoint: a hub name or a local directory."""

from __future__ import annotations

import pathlib

import huggingface_hub
import jax.numpy as jnp
import numpy as np

from jdmdr.encoders import huggingface
from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.encoders.static import inverse_softplus
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
MODULES = ("Transformer", "StaticEmbedding", "Pooling", "Normalize")


def load_pretrained(
    name_or_dir: str | pathlib.Path, *, pooling: str | None = None, normalize: bool | None = None
) -> tuple[EncoderConfig, Params]:
    """Loads a BERT, RoBERTa or XLM-R checkpoint, or a sentence-transformers static embedding.

    Args:
      name_or_dir: a local directory, or a name on the Hugging Face hub.
      pooling, normalize: None takes what the directory's sentence-transformers modules say, else mean and no.

    Returns:
      The configuration and the parameters, float32.

    Raises:
      UserError: the name cannot be fetched; a file is missing, corrupt or of an architecture that jdmdr does not have.
    """
    directory = find_checkpoint(name_or_dir)
    modules = read_modules(directory)
    if pooling is None:
        pooling = read_pooling(modules["Pooling"] / "config.json") if "Pooling" in modules else "mean"
    if normalize is None:
        normalize = "Normalize" in modules
    if "StaticEmbedding" in modules:
        return _load_static(modules["StaticEmbedding"], pooling, normalize)
    weights = modules.get("Transformer", directory)
    config = huggingface.read_config(weights / "config.json", pooling, normalize)
    return config, huggingface.read_params(weights, config)


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
        raise UserError(
            f"{str(name_or_dir)!r} is no directory here and cannot be fetched from the Hugging Face hub ({reason}); "
            "give a local directory that holds config.json, tokenizer.json and model.safetensors or pytorch_model.bin"
        ) from error


def _fetch(name: str, weights: str) -> pathlib.Path:
    return pathlib.Path(
        huggingface_hub.snapshot_download(
            name,
            allow_patterns=["*.json", "*.model", "*.txt", weights],
            ignore_patterns=["onnx/*", "openvino/*"],
        )
    )


def read_modules(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The directory of each sentence-transformers module by its class name; none for a bare checkpoint.

    Raises:
      UserError: a module that jdmdr does not have.
    """
    path = directory / "modules.json"
    if not path.is_file():
        return {}
    modules = {m["type"].rsplit(".", 1)[-1]: directory / m["path"] for m in huggingface.read_json_file(path)}
    for name in modules:
        if name not in MODULES:
            raise UserError(f"{path} has the module {name}; only {', '.join(MODULES)} can be loaded")
    return modules


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
