"""Exports an encoder as a directory that sentence-transformers loads, and checks what was written.

    python -m jdmdr.export --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

A transformer is a Hugging Face checkpoint with Pooling and Normalize modules; a static encoder is a StaticEmbedding
with its token weights folded into the rows.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
import tokenizers

from jdmdr import encoders
from jdmdr.encoders import huggingface, pretrained
from jdmdr.types import Tokens, UserError

Modules = list[str]  # class names, in order

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
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).is_file():
                shutil.copyfile(tokenizer_dir / name, partial / name)
        modules = WRITERS[config.kind](config, params, max_length, partial)
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


def _write_transformer(
    config: encoders.EncoderConfig, params: Any, max_length: int, directory: pathlib.Path
) -> Modules:
    if max_length > config.usable_positions:
        raise UserError(
            f"max_length is {max_length}, but the encoder has positions for {config.usable_positions}; lower it"
        )
    _check_vocabulary(config, tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")))
    huggingface.write_checkpoint(config, params, directory)
    # The encoder has no pooler; without this, transformers would make a random one and warn about it.
    model_args = {"add_pooling_layer": False}
    _write_json(
        directory / "sentence_bert_config.json",
        {"max_seq_length": max_length, "do_lower_case": False, "model_args": model_args},
    )
    (directory / "1_Pooling").mkdir()
    flags = {flag: mode == config.pooling for mode, flag in POOLING_FLAGS.items()}
    _write_json(
        directory / "1_Pooling" / "config.json",
        {"word_embedding_dimension": config.width, **flags, "include_prompt": True},
    )
    return ["Transformer", "Pooling"]


def _write_static(config: encoders.EncoderConfig, params: Any, max_length: int, directory: pathlib.Path) -> Modules:
    path = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    _check_vocabulary(config, tokenizer)
    special = tokenizer.num_special_tokens_to_add(is_pair=False)
    if special:
        raise UserError(
            f"this tokenizer adds {special} special tokens to a text, and a static embedding adds none; train the "
            "static encoder with a tokenizer that adds none"
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(path))
    weight_V = np.asarray(jax.nn.softplus(params["weight"]))
    rows_VxD = np.asarray(params["embedding"], np.float32) * weight_V[:, None]
    safetensors.numpy.save_file(
        {"embedding.weight": rows_VxD}, directory / "model.safetensors", metadata={"format": "pt"}
    )
    return ["StaticEmbedding"]


WRITERS = {"static": _write_static, "transformer": _write_transformer}


def _check_vocabulary(config: encoders.EncoderConfig, tokenizer: tokenizers.Tokenizer) -> None:
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise UserError(
            f"the tokenizer has {size} tokens, but the encoder has vectors for {config.vocab_size}; use its own"
        )


def _write_modules(names: Sequence[str], directory: pathlib.Path) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{name}" if i else "", "type": f"sentence_transformers.models.{name}"}
        for i, name in enumerate(names)
    ]
    _write_json(directory / "modules.json", modules)


def _write_json(path: pathlib.Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_parity(
    out_dir: pathlib.Path,
    texts: Sequence[str],
    embeddings_QxD: np.ndarray,
    *,
    max_length: int,
    tolerance: float = TOLERANCE,
) -> float:
    """Encodes `texts`, prompts included, with what stands in `out_dir` and compares; returns the largest difference.

    Args:
      embeddings_QxD: the embeddings of the same texts by the encoder that was exported, computed in float32.
      max_length: tokens at which the embedded texts were cut.

    Raises:
      UserError: the largest absolute difference is above `tolerance`.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(out_dir / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    static = "StaticEmbedding" in pretrained.read_modules(out_dir)
    written_QxD = (_encode_static if static else _encode_transformer)(out_dir, ids)
    difference = float(np.max(np.abs(written_QxD - embeddings_QxD), initial=0))
    if not difference <= tolerance:
        raise UserError(
            f"{out_dir} embeds with a difference of {difference:.2g} to the encoder (allowed: {tolerance:g}); "
            "do not use it"
        )
    return difference


def _encode_static(directory: pathlib.Path, ids: Sequence[Sequence[int]]) -> np.ndarray:
    # On its own in NumPy, as a reader of the format would do it: the mean of the rows, then unit length.
    rows_VxD = safetensors.numpy.load_file(directory / "model.safetensors")["embedding.weight"]
    mean_QxD = np.stack([rows_VxD[text].mean(axis=0) if text else np.zeros_like(rows_VxD[0]) for text in ids])
    if "Normalize" not in pretrained.read_modules(directory):
        return mean_QxD
    return mean_QxD / np.maximum(np.linalg.norm(mean_QxD, axis=1, keepdims=True), 1e-12)


def _encode_transformer(directory: pathlib.Path, ids: Sequence[Sequence[int]]) -> np.ndarray:
    config, params = encoders.load_pretrained(directory)
    apply = jax.jit(encoders.build(config).apply)
    length = max(map(len, ids))
    block = Tokens(*(np.zeros((len(ids), length), np.int32) for _ in range(2)))
    for row, text in enumerate(ids):
        block.ids_BxT[row, : len(text)] = text
        block.mask_BxT[row, : len(text)] = 1
    with jax.default_matmul_precision("highest"):
        parts = [apply(params, Tokens(*(x[i : i + BATCH] for x in block))) for i in range(0, len(ids), BATCH)]
    return np.concatenate(parts)


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("export", __doc__)
