"""google-tunix's models of the checkpoints that `decoders.py` reads, and qwix's adapters on them.

Tunix keeps a projection's heads as an axis of its own, and Gemma's keys and values in one array.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.llm.decoders import Decoder

# tunix's modules of a layer -> the checkpoint's; several where tunix keeps them as one, stacked.
ATTENTION = {
    "q_proj": ("q_proj",), "k_proj": ("k_proj",), "v_proj": ("v_proj",), "o_proj": ("o_proj",),
    "q_einsum": ("q_proj",), "kv_einsum": ("k_proj", "v_proj"), "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}  # fmt: skip
LINEAR = r"layers/\d+/(attn|mlp)/.+"  # tunix's path of every linear layer but the head


def load(directory: pathlib.Path, d: Decoder, mesh: jax.sharding.Mesh, dtype: str, remat: bool) -> Any:
    """The model of `directory` as tunix's, its weights in `dtype`, on the mesh (axes `fsdp`, `tp`)."""
    create = {"qwen3": _qwen3, "llama": _llama, "gemma3_text": _gemma3}[d.family]
    params, model_config = create(d, jnp.dtype(dtype), remat)
    # tunix's faster reader takes the first tensor's type for that of all.
    mode = "optimized" if len(d.dtypes) == 1 else "original"
    return params.create_model_from_safe_tensors(str(directory), model_config, mesh, jnp.dtype(dtype), mode)


def _sizes(d: Decoder) -> dict[str, int]:
    return {
        "num_layers": d.num_hidden_layers, "embed_dim": d.hidden_size, "hidden_dim": d.intermediate_size,
        "num_heads": d.num_attention_heads, "num_kv_heads": d.num_key_value_heads, "head_dim": d.head_dim,
    }  # fmt: skip


def _remat(model: Any, remat: bool) -> Any:
    return model.RematConfig.DECODER if remat else model.RematConfig.NONE


def _qwen3(d: Decoder, dtype: Any, remat: bool) -> tuple[Any, Any]:
    from tunix.models.qwen3 import model, params

    model.apply_rope = rotation(frequencies(d.rope, d.head_dim))
    return params, model.ModelConfig(
        **_sizes(d), vocab_size=d.vocab_size, norm_eps=d.rms_norm_eps, rope_theta=d.rope["rope_theta"],
        use_tied_embedding=d.tie_word_embeddings, remat_config=_remat(model, remat), dtype=dtype, param_dtype=dtype,
    )  # fmt: skip


def _llama(d: Decoder, dtype: Any, remat: bool) -> tuple[Any, Any]:
    from tunix.models.llama3 import model, params

    model.apply_rope = rotation(frequencies(d.rope, d.head_dim))
    return params, model.ModelConfig(
        **_sizes(d), vocab_size=d.vocab_size, norm_eps=d.rms_norm_eps, rope_theta=d.rope["rope_theta"],
        weight_tying=d.tie_word_embeddings, remat_config=_remat(model, remat),
    )  # fmt: skip


def _gemma3(d: Decoder, dtype: Any, remat: bool) -> tuple[Any, Any]:
    from tunix.models.gemma3 import model, params_safetensors

    local = (d.config.get("rope_parameters") or {}).get("sliding_attention", {})
    norms = model.QueryPreAttentionNormalisation
    by_head = d.query_pre_attn_scalar == d.head_dim
    return params_safetensors, model.ModelConfig(
        **_sizes(d), num_embed=d.vocab_size, sliding_window_size=d.sliding_window,
        local_base_frequency=local.get("rope_theta", d.rope_local_base_freq), global_base_frequency=d.rope["rope_theta"],
        global_scale_factor=d.rope.get("factor", 1.0),
        query_pre_attn_norm=norms.BY_ONE_OVER_SQRT_HEAD_DIM if by_head else norms.BY_ONE_OVER_SQRT_EMBED_DIM_DIV_NUM_HEADS,
        remat_config=_remat(model, remat), param_dtype=dtype,
    )  # fmt: skip


def frequencies(rope: Mapping[str, Any], head_dim: int) -> np.ndarray:
    """Radians a position, of each pair of a head's dimensions (float64, head_dim / 2).

    Llama 3.1 divides those of waves longer than its first context by `factor`, leaves the short ones, and blends between.
    """
    plain_H = rope["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    if rope["rope_type"] != "llama3":
        return plain_H
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns_H = rope["original_max_position_embeddings"] * plain_H / (2 * np.pi)  # in the first context
    kept_H = np.clip((turns_H - low) / (high - low), 0, 1)
    return kept_H * plain_H + (1 - kept_H) * plain_H / rope["factor"]


def rotation(radians_H: np.ndarray) -> Callable[..., jax.Array]:
    """Rotary positions by these frequencies, in place of tunix's `apply_rope` of Qwen3 and Llama.

    That one turns by theta 1,000,000 whatever the model's config says, and knows nothing of Llama 3.1's.
    """

    def apply_rope(
        inputs_BxTxNxH: jax.Array, positions_BxT: jax.Array, head_dim: int, rope_theta: Any = None
    ) -> jax.Array:
        del head_dim, rope_theta  # the frequencies know both
        angles = positions_BxT[..., None, None] * jnp.asarray(radians_H, jnp.float32)
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        first, second = jnp.split(inputs_BxTxNxH, 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(inputs_BxTxNxH.dtype)

    return apply_rope


def adapters(model: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The checkpoint's module -> (A: rank x in, B: out x rank), float32, of every adapter that qwix put on the model."""
    from flax import nnx

    halves: dict[tuple, dict[str, np.ndarray]] = {}
    for path, value in nnx.iter_graph(model):
        if isinstance(value, nnx.LoRAParam):
            half = path[-1].rsplit("_", 1)[-1]  # w_lora_a, kernel_lora_b, ...
            halves.setdefault(path[:-1], {})[half] = np.asarray(value[...], np.float32)
    found = {}
    for (_, layer, part, module), half in halves.items():
        a = half["a"].reshape(-1, half["a"].shape[-1]).T
        rank = len(a)
        names = [f"self_attn.{name}" for name in ATTENTION[module]] if part == "attn" else [f"mlp.{module}"]
        for name, b in zip(names, np.split(half["b"].reshape(rank, -1), len(names), axis=1), strict=True):
            found[f"model.layers.{layer}.{name}"] = (a, b.T)
    return found
