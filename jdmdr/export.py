"""Exports an encoder as a directory that sentence-transformers loads, and checks what was written.

    python -m jdmdr.export --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

A transformer is a Hugging Face checkpoint with Pooling and Normalize modules; a static encoder is a StaticEmbedding
with its token weights folded into the rows. A linear head is a Dense module, with LayerNorm behind it where it has one;
untied towers are the routes of a Router.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from jdmdr import encoders
from jdmdr.encoders import huggingface, pretrained
from jdmdr.types import Tokens, UserError

PACKAGE = "sentence_transformers.models"
WEIGHTS = "model.safetensors"
SIMILARITIES = ("cosine", "dot")
POOLING_FLAGS = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens", "last": "pooling_mode_lasttoken"}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.txt", "vocab.json", "merges.txt", "sentencepiece.bpe.model",
)  # fmt: skip
TOLERANCE = 1e-4
BATCH = 16  # texts encoded at a time by the parity check


def export(
    config: encoders.EncoderConfig,
    params: encoders.Params,
    tokenizer_dir: pathlib.Path,
    out_dir: pathlib.Path,
    *,
    prompts: Mapping[str, str],
    max_length: int,
    similarity: str,
    card: str,
) -> None:
    """Writes the encoder to `out_dir`; nothing is there until all of it is, and an earlier export is replaced.

    Args:
      tokenizer_dir: holds tokenizer.json; its files are copied.
      prompts: text before every `query` and every `passage`.
      max_length: tokens of a text, special tokens included. A static embedding reads texts whole.
      similarity: cosine | dot.
      card: the model card, for README.md.

    Raises:
      UserError: what this format cannot say, or a directory that is no earlier export.
    """
    if similarity not in SIMILARITIES:
        raise UserError(f"similarity is {similarity!r}; an export can have {' or '.join(SIMILARITIES)}")
    if prompts.keys() != {"query", "passage"}:
        raise UserError(f"prompts has the keys {', '.join(sorted(prompts))}; give query and passage")
    if not (tokenizer_dir / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer_dir / 'tokenizer.json'} is missing; an export needs the encoder's tokenizer")
    if out_dir.exists() and not (out_dir / "modules.json").is_file() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} holds other files and no earlier export; choose an empty directory")
    partial = out_dir.with_name(f".{out_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _copy_tokenizer(tokenizer_dir, partial)
        _check_tokenizer(config, partial / "tokenizer.json")
        if config.untied:
            modules = ["Router"]
            _write_routes(config, params, max_length, partial)
        else:
            modules = _write_tower(config, params, max_length, lambda i, name: partial / (f"{i}_{name}" if i else ""))
        _write_modules(modules + ["Normalize"] * config.normalize, partial)
        _write_json(
            partial / "config_sentence_transformers.json",
            {
                "model_type": "SentenceTransformer",
                "prompts": {"query": prompts["query"], "document": prompts["passage"]},
                "default_prompt_name": None,
                "similarity_fn_name": similarity,
            },
        )
        (partial / "README.md").write_text(card, encoding="utf-8")
        if out_dir.exists():
            shutil.rmtree(out_dir)
        os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _copy_tokenizer(source: pathlib.Path, target: pathlib.Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _check_tokenizer(config: encoders.EncoderConfig, path: pathlib.Path) -> None:
    """Refuses a tokenizer that the encoder has no vectors for; a static one's neither pads nor cuts."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, but the encoder has vectors for {config.vocab_size}; use its own"
        )
    if config.kind == "static":
        special = tokenizer.num_special_tokens_to_add(is_pair=False)
        if special:
            raise UserError(
                f"this tokenizer adds {special} special tokens to a text, and a static embedding adds none; train the "
                "static encoder with a tokenizer that adds none"
            )
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.save(str(path))


Place = Callable[[int, str], pathlib.Path]  # (place in the order, class name) -> directory of a module


def _write_tower(config: encoders.EncoderConfig, params: Any, max_length: int, place: Place) -> list[str]:
    """Writes all modules of a tower but Normalize, whose class names it returns in order."""
    names = WRITERS[config.kind](config, params, max_length, place)
    if config.projection:
        _write_head(config, params["projection"], _new(place(len(names), "Dense")))
        names = [*names, "Dense"]
    if config.projection_norm:
        _write_norm(config, params["projection"]["norm"], _new(place(len(names), "LayerNorm")))
        names = [*names, "LayerNorm"]
    return names


def _write_routes(config: encoders.EncoderConfig, params: Any, max_length: int, directory: pathlib.Path) -> None:
    """A tower for each side, with a tokenizer of its own, as sentence-transformers' Router lays them out."""
    types, structure = {}, {}
    for side, route in pretrained.ROUTES.items():
        names = _write_tower(config, params[side], max_length, lambda i, name, r=route: directory / f"{r}_{i}_{name}")
        structure[route] = [f"{route}_{i}_{name}" for i, name in enumerate(names)]
        types |= {path: f"{PACKAGE}.{name}" for path, name in zip(structure[route], names, strict=True)}
        _copy_tokenizer(directory, directory / structure[route][0])
    parameters = {"default_route": "document", "allow_empty_key": True}
    _write_json(directory / "router_config.json", {"types": types, "structure": structure, "parameters": parameters})


def _write_transformer(config: encoders.EncoderConfig, params: Any, max_length: int, place: Place) -> list[str]:
    if max_length > config.usable_positions:
        raise UserError(
            f"max_length is {max_length}, but the encoder has positions for {config.usable_positions}; lower it"
        )
    directory, pooling = _new(place(0, "Transformer")), _new(place(1, "Pooling"))
    huggingface.write_checkpoint(config, params, directory)
    # The encoder has no pooler; without this, transformers would make a random one and warn about it.
    model_args = {"add_pooling_layer": False}
    _write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": max_length, "do_lower_case": False, "model_args": model_args},
    )
    flags = {flag: mode == config.pooling for mode, flag in POOLING_FLAGS.items()}
    _write_json(pooling / "config.json", {"word_embedding_dimension": config.width, **flags, "include_prompt": True})
    return ["Transformer", "Pooling"]


def _write_static(config: encoders.EncoderConfig, params: Any, max_length: int, place: Place) -> list[str]:
    weight_V = np.asarray(jax.nn.softplus(params["weight"]))
    rows_VxD = np.asarray(params["embedding"], np.float32) * weight_V[:, None]
    huggingface.save_tensors({"embedding.weight": rows_VxD}, _new(place(0, "StaticEmbedding")) / WEIGHTS)
    return ["StaticEmbedding"]


WRITERS = {"static": _write_static, "transformer": _write_transformer}


def _write_head(config: encoders.EncoderConfig, head: Any, directory: pathlib.Path) -> None:
    tensors = {"linear.weight": np.asarray(head["kernel"]).T}
    if config.projection_bias:
        tensors["linear.bias"] = np.asarray(head["bias"])
    huggingface.save_tensors(tensors, directory / WEIGHTS)
    activation = next(a for a, ours in pretrained.HEAD_ACTIVATIONS.items() if ours == config.projection_activation)
    module = {"Identity": "linear", "Tanh": "activation"}[activation]
    _write_json(
        directory / "config.json",
        {
            "in_features": config.width,
            "out_features": config.projection,
            "bias": config.projection_bias,
            "activation_function": f"torch.nn.modules.{module}.{activation}",
        },
    )


def _write_norm(config: encoders.EncoderConfig, norm: Any, directory: pathlib.Path) -> None:
    tensors = {"norm.weight": np.asarray(norm["scale"]), "norm.bias": np.asarray(norm["bias"])}
    huggingface.save_tensors(tensors, directory / WEIGHTS)
    _write_json(directory / "config.json", {"dimension": config.projection})


def _new(directory: pathlib.Path) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    return directory


def _write_modules(names: Sequence[str], directory: pathlib.Path) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"{PACKAGE}.{name}"}
        for i, name in enumerate(names)
    ]
    _write_json(directory / "modules.json", modules)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_parity(
    out_dir: pathlib.Path,
    texts: Sequence[str],
    embeddings_QxE: np.ndarray,
    *,
    max_length: int,
    side: str = "passage",
    tolerance: float = TOLERANCE,
) -> float:
    """Encodes `texts`, prompts included, with what stands in `out_dir` and compares; returns the largest difference.

    Args:
      embeddings_QxE: the embeddings of the same texts by the encoder that was exported, computed in float32.
      max_length: tokens at which the embedded texts were cut.
      side: query or passage, the tower that embedded them.

    Raises:
      UserError: the largest absolute difference is above `tolerance`.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(out_dir / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    static = "StaticEmbedding" in pretrained.read_modules(out_dir)[side]
    written_QxE = (_encode_static if static else _encode_transformer)(out_dir, ids, side)
    difference = float(np.max(np.abs(written_QxE - embeddings_QxE), initial=0))
    if not difference <= tolerance:
        raise UserError(
            f"{out_dir} embeds with a difference of {difference:.2g} to the encoder (allowed: {tolerance:g}); "
            "do not use it"
        )
    return difference


def _encode_static(directory: pathlib.Path, ids: Sequence[Sequence[int]], side: str) -> np.ndarray:
    # On its own in NumPy, as a reader of the format would do it: the mean of the rows, the head, unit length.
    modules = pretrained.read_modules(directory)[side]
    rows_VxD = safetensors.numpy.load_file(modules["StaticEmbedding"] / WEIGHTS)["embedding.weight"]
    out_QxE = np.stack([rows_VxD[text].mean(axis=0) if text else np.zeros_like(rows_VxD[0]) for text in ids])
    if "Dense" in modules:
        head = safetensors.numpy.load_file(modules["Dense"] / WEIGHTS)
        out_QxE = out_QxE @ head["linear.weight"].T + head.get("linear.bias", 0.0)
        _, activation = pretrained.read_head(modules["Dense"], rows_VxD.shape[1])
        out_QxE = np.tanh(out_QxE) if activation == "tanh" else out_QxE
    if "LayerNorm" in modules:
        norm = safetensors.numpy.load_file(modules["LayerNorm"] / WEIGHTS)
        centred_QxE = out_QxE - out_QxE.mean(axis=1, keepdims=True)
        out_QxE = (
            centred_QxE / np.sqrt(out_QxE.var(axis=1, keepdims=True) + 1e-5) * norm["norm.weight"] + norm["norm.bias"]
        )
    if "Normalize" not in modules:
        return out_QxE
    return out_QxE / np.maximum(np.linalg.norm(out_QxE, axis=1, keepdims=True), 1e-12)


def _encode_transformer(directory: pathlib.Path, ids: Sequence[Sequence[int]], side: str) -> np.ndarray:
    config, params = encoders.load_pretrained(directory)
    encoder = encoders.build(config)
    apply, params = jax.jit(encoder.apply), encoder.tower(params, side)
    length = max(map(len, ids))
    block = Tokens(*(np.zeros((len(ids), length), np.int32) for _ in range(2)))
    for row, text in enumerate(ids):
        block.ids_BxT[row, : len(text)] = text
        block.mask_BxT[row, : len(text)] = 1
    with jax.default_matmul_precision("highest"):
        parts = [apply(params, jax.tree.map(lambda x, i=i: x[i : i + BATCH], block)) for i in range(0, len(ids), BATCH)]
    return np.concatenate(parts)


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("export", __doc__)
