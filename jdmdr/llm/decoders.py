"""Checkpoints of language models that can be tuned, in the Hugging Face layout: Qwen3, Llama 3 and Gemma 3.

They are read and checked here, without a look at the weights' values; `tunix_models.py` has the models.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import safetensors

from jdmdr.encoders.huggingface import read_json_file, shards
from jdmdr.types import UserError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2}  # of the types that weights may have

# What config.json must hold (None) or, where it holds nothing, what transformers takes.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "llama": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "gemma3_text": {
        "head_dim": 256, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
    },
}  # fmt: skip
# What tunix's models have no other value for.
ONLY: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "gemma3_text": {
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "use_bidirectional_attention": False, "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
ROPES = {"qwen3": ("default",), "llama": ("default", "llama3"), "gemma3_text": ("default", "linear")}
GEMMA_PATTERN = 6  # every sixth layer looks at everything

NORMS = {
    "qwen3": ("input_layernorm", "post_attention_layernorm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
    "gemma3_text": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
}  # fmt: skip
HEAD_NORMS = ("qwen3", "gemma3_text")  # those that normalise queries and keys


class Decoder(NamedTuple):
    """What config.json says of a model, checked."""

    family: str
    config: Mapping[str, Any]
    rope: Mapping[str, Any]  # of the layers that look at everything
    tensors: Mapping[str, pathlib.Path]  # name -> file
    dtypes: frozenset[str]  # of the files, as safetensors names them

    def __getattr__(self, name: str) -> Any:
        return self.config[name]


def read(directory: pathlib.Path) -> Decoder:
    """The model in `directory`; its weights are looked at, not read.

    Raises:
      UserError: no directory, a model that tunix does not have, or weights that are missing, cut off or of other shapes.
    """
    if not directory.is_dir():
        raise UserError(f"tune.model: there is no directory {directory}; name one that holds a Hugging Face checkpoint")
    path = directory / "config.json"
    found = read_json_file(path)
    family = found.get("model_type")
    if family not in DEFAULTS:
        raise UserError(f"{path}: model_type is {family!r}; only {', '.join(DEFAULTS)} can be tuned")
    if found.get("quantization_config"):
        raise UserError(f"{path}: the weights are quantised, which cannot be tuned; take the model in bfloat16")
    config = {**DEFAULTS[family], **{key: value for key, value in found.items() if value is not None}}
    if missing := [key for key in SIZES if key not in config]:
        raise UserError(f"{path}: no {', '.join(missing)}; add what the model was trained with")
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    for key, wanted in ONLY[family].items():
        if config.get(key, wanted) != wanted:
            raise UserError(f"{path}: {key} is {config[key]!r}; only {wanted!r} can be tuned")
    rope = _rope(found, config, "full_attention" if family == "gemma3_text" else None)
    if rope["rope_type"] not in ROPES[family]:
        raise UserError(f"{path}: rotary positions of type {rope['rope_type']!r}; only {', '.join(ROPES[family])} "
                        f"can be tuned of {family}")  # fmt: skip
    if family == "gemma3_text":
        _check_gemma(path, config)
    tensors = _tensors(directory)
    decoder = Decoder(family, config, rope, tensors, frozenset())
    return decoder._replace(dtypes=_check_tensors(directory, decoder))


def _rope(found: Mapping[str, Any], config: Mapping[str, Any], layers: str | None) -> dict[str, Any]:
    """Theta, type and what belongs to it; transformers 5 keeps them in one place, 4 in two."""
    given = found.get("rope_parameters") or found.get("rope_scaling") or {}
    given = given.get(layers, given) if layers else given
    kind = given.get("rope_type") or given.get("type") or "default"
    return {"rope_theta": config["rope_theta"], **given, "rope_type": kind}


def _check_gemma(path: pathlib.Path, config: Mapping[str, Any]) -> None:
    wanted = [
        "full_attention" if (i + 1) % GEMMA_PATTERN == 0 else "sliding_attention"
        for i in range(config["num_hidden_layers"])
    ]
    if config.get("layer_types", wanted) != wanted:
        raise UserError(
            f"{path}: layer_types is not five sliding_attention and one full_attention in turn; no other can be tuned"
        )
    scalars = (config["head_dim"], config["hidden_size"] // config["num_attention_heads"])
    if config["query_pre_attn_scalar"] not in scalars:
        raise UserError(
            f"{path}: query_pre_attn_scalar is {config['query_pre_attn_scalar']!r}; only {scalars[0]} or {scalars[1]} can be tuned"
        )


def _tensors(directory: pathlib.Path) -> dict[str, pathlib.Path]:
    """The file of every tensor, by the headers of the files."""
    if (directory / WEIGHTS).is_file():
        files = [directory / WEIGHTS]
    elif (directory / INDEX).is_file():
        files = shards(directory / INDEX)
    else:
        raise UserError(
            f"{directory} holds neither {WEIGHTS} nor {INDEX}; name a directory that holds a complete checkpoint"
        )
    if others := sorted({*directory.glob("*.safetensors")} - {*files}):
        raise UserError(f"{others[0]} does not belong to the weights beside it; move it away")
    tensors: dict[str, pathlib.Path] = {}
    for path in files:
        with opened(path) as file:
            tensors.update(dict.fromkeys(file.keys(), path))
    return tensors


def opened(path: pathlib.Path) -> Any:
    """A safetensors file, its header read."""
    try:
        return safetensors.safe_open(path, "numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is no readable safetensors file ({error}); fetch it again") from error


def _check_tensors(directory: pathlib.Path, decoder: Decoder) -> frozenset[str]:
    expected = dict(_shapes(decoder))
    if lacking := sorted(expected.keys() - decoder.tensors.keys()):
        rest = f" and {len(lacking) - 1} other tensors" if len(lacking) > 1 else ""
        raise UserError(f"the checkpoint in {directory} lacks {lacking[0]}{rest}; fetch it again")
    extra = {
        name
        for name in decoder.tensors.keys() - expected.keys()
        if "rotary_emb" not in name and name != "lm_head.weight"
    }
    if extra:
        raise UserError(
            f"the checkpoint in {directory} has unexpected {sorted(extra)[0]}; it is not the {decoder.family} model of its config.json"
        )
    dtypes = set()
    for path in {*decoder.tensors.values()}:
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                view = file.get_slice(name)
                if view.get_dtype() not in ITEM_BYTES:
                    raise UserError(
                        f"{name} in {path} is of type {view.get_dtype()}; only {', '.join(ITEM_BYTES)} can be tuned"
                    )
                dtypes.add(view.get_dtype())
                if name in expected and tuple(view.get_shape()) != expected[name]:
                    raise UserError(
                        f"{name} in {path} has shape {tuple(view.get_shape())}, but config.json asks for {expected[name]}; "
                        "the two files do not belong together"
                    )
    return frozenset(dtypes)


def _shapes(d: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, ffn = d.hidden_size, d.intermediate_size
    queries, keys = d.num_attention_heads * d.head_dim, d.num_key_value_heads * d.head_dim
    yield "model.embed_tokens.weight", (d.vocab_size, width)
    yield "model.norm.weight", (width,)
    if not d.tie_word_embeddings:
        yield "lm_head.weight", (d.vocab_size, width)
    matrices = {
        "self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries), "mlp.gate_proj": (ffn, width), "mlp.up_proj": (ffn, width),
        "mlp.down_proj": (width, ffn), **dict.fromkeys(NORMS[d.family], (width,)),
    }  # fmt: skip
    if d.family in HEAD_NORMS:
        matrices |= dict.fromkeys(("self_attn.q_norm", "self_attn.k_norm"), (d.head_dim,))
    for i in range(d.num_hidden_layers):
        yield from ((f"model.layers.{i}.{name}.weight", shape) for name, shape in matrices.items())


def weight_sizes(d: Decoder) -> dict[str, int]:
    """Bytes of each weights file: a model is known by its config and these, for its weights may be 100 GB to read."""
    return {path.name: path.stat().st_size for path in sorted({*d.tensors.values()})}
