"""A tuned model as a Hugging Face directory: the checkpoint it came from, its adapters added to the weights.

Tensors are read, added to and written one file at a time, so that a model larger than the memory passes through.
"""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import ml_dtypes  # noqa: F401 - bfloat16 for NumPy
import numpy as np
import safetensors.numpy

from jdmdr import progress, workdir
from jdmdr.encoders import huggingface
from jdmdr.llm import decoders
from jdmdr.llm.decoders import Decoder

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json")


def write(
    base: pathlib.Path, decoder: Decoder, adapter: pathlib.Path, alpha: float, out_dir: pathlib.Path, shard_bytes: int
) -> dict[str, Any]:  # fmt: skip
    """Writes the checkpoint in `base` with the adapters of the file `adapter`; what is there of an earlier run stays.

    Each tensor keeps its type; the sum is made in float32. A file holds `shard_bytes` at most, or one larger tensor.
    Configuration and tokenizer are copied.
    """
    halves = safetensors.numpy.load_file(adapter)
    deltas = {}
    for name in halves:
        if name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            a, b = halves[name], halves[f"{stem}.lora_B.weight"]
            deltas[f"{stem.removeprefix('base_model.model.')}.weight"] = (alpha / len(a) * b, a)
    sizes = _bytes(decoder)
    plan = shard(sizes, shard_bytes)
    for name, names in progress.bar(plan.items(), "  merging", "files", total=len(plan)):
        if not (out_dir / name).exists():
            with workdir.atomic(out_dir / name) as path:
                huggingface.save_tensors(
                    {tensor: _merged(decoder, tensor, deltas.get(tensor)) for tensor in names}, path
                )
    if len(plan) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())},
                 "weight_map": {tensor: name for name, names in plan.items() for tensor in names}}  # fmt: skip
        workdir.write_json(out_dir / decoders.INDEX, index)
    for path in sorted(base.iterdir()):
        if (
            path.is_file()
            and not path.name.endswith(WEIGHT_SUFFIXES)
            and path.name not in (workdir.MANIFEST, workdir.PLAN)
        ):
            shutil.copyfile(path, out_dir / path.name)
    return {"adapted": len(deltas), "tensors": len(sizes), "files": len(plan), "bytes": sum(sizes.values())}


def shard(sizes: Mapping[str, int], limit: int) -> dict[str, list[str]]:
    """File name -> tensors, in their order, at most `limit` bytes a file where a tensor is not larger."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    if len(groups) == 1:
        return {decoders.WEIGHTS: groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _bytes(decoder: Decoder) -> dict[str, int]:
    """Bytes of every tensor, file by file in the order of their names."""
    sizes = {}
    for path in sorted({*decoder.tensors.values()}):
        with decoders.opened(path) as file:
            for name in sorted(name for name, own in decoder.tensors.items() if own == path):
                view = file.get_slice(name)
                sizes[name] = int(np.prod(view.get_shape())) * decoders.ITEM_BYTES[view.get_dtype()]
    return sizes


def _merged(decoder: Decoder, name: str, delta: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    with decoders.opened(decoder.tensors[name]) as file:
        tensor = file.get_tensor(name)
    if delta is None:
        return tensor
    b, a = delta
    return (tensor.astype(np.float32) + b @ a).astype(tensor.dtype)
