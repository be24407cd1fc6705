"""Adapters of a transformer in the format of Hugging Face's peft, to be loaded onto the checkpoint that they were trained on."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jdmdr import encoders
from jdmdr.encoders import huggingface
from jdmdr.optim import named_leaves
from jdmdr.workdir import write_json

WEIGHTS = "adapter_model.safetensors"


def save(
    directory: pathlib.Path, config: encoders.EncoderConfig, adapters: Any, section: Any, base: str | None
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`; untied, one such directory a side.

    Args:
      adapters: what `lora.init` made, trained; one of the projection head has no place here.
      section: the recipe's `lora` keys.
      base: the checkpoint that the adapters belong to, as the user named it; None where it has no name.
    """
    if config.untied:
        for side, own in adapters.items():
            _save_tower(directory / side, config, own, section, base)
    else:
        _save_tower(directory, config, adapters, section, base)


def _save_tower(
    directory: pathlib.Path, config: encoders.EncoderConfig, adapters: Any, section: Any, base: str | None
) -> None:
    leaves = dict(named_leaves(adapters))
    tensors, modules = {}, []
    for ours, theirs, transposed in huggingface.tensor_names(config):
        if f"{ours}/a" in leaves:
            module = theirs.removesuffix(".weight")
            modules.append(module)
            # A dense layer's adapters are layers without bias, those of a table bare matrices.
            stem, end = (".lora_", ".weight") if transposed else (".lora_embedding_", "")
            for name in ("a", "b"):
                tensors[f"base_model.model.{module}{stem}{name.upper()}{end}"] = leaves[f"{ours}/{name}"]
    directory.mkdir(parents=True, exist_ok=True)
    huggingface.save_tensors({key: np.asarray(x).T for key, x in tensors.items()}, directory / WEIGHTS)
    write_config(directory, modules, base, section.rank, section.alpha, section.dropout, "FEATURE_EXTRACTION")


def write_config(
    directory: pathlib.Path, modules: list[str], base: str | None, rank: int, alpha: float, dropout: float, task: str
) -> None:
    """Writes `adapter_config.json`: what the adapters of these modules, in the base's words, are to peft."""
    write_json(
        directory / "adapter_config.json",
        {
            "base_model_name_or_path": base,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "lora_alpha": alpha,
            "lora_dropout": dropout,
            "peft_type": "LORA",
            "r": rank,
            "target_modules": modules,
            "task_type": task,
        },
    )
