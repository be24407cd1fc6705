import json

import numpy as np
import pytest
import safetensors.numpy

from jdmdr.llm import decoders
from jdmdr.types import UserError

CONFIG = {
    "model_type": "llama", "vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
}  # fmt: skip
SHAPES = {
    "model.embed_tokens": (11, 8), "model.norm": (8,), "model.layers.0.input_layernorm": (8,),
    "model.layers.0.post_attention_layernorm": (8,), "model.layers.0.self_attn.q_proj": (8, 8),
    "model.layers.0.self_attn.k_proj": (4, 8), "model.layers.0.self_attn.v_proj": (4, 8),
    "model.layers.0.self_attn.o_proj": (8, 8), "model.layers.0.mlp.gate_proj": (12, 8),
    "model.layers.0.mlp.up_proj": (12, 8), "model.layers.0.mlp.down_proj": (8, 12),
}  # fmt: skip


def save(directory, changes=None, files=1, drop=(), shapes=None):
    """A Llama of one layer, in so many files."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **(changes or {})}))
    rng = np.random.default_rng(0)
    tensors = {f"{name}.weight": rng.normal(size=shape).astype(np.float32)
               for name, shape in {**SHAPES, **(shapes or {})}.items() if name not in drop}  # fmt: skip
    if files == 1:
        safetensors.numpy.save_file(tensors, directory / "model.safetensors")
        return tensors
    index = {name: f"part-{i % files}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in {*index.values()}:
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if index[name] == file}, directory / file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return tensors


def test_a_directory_is_read_without_its_weights(tmp_path):
    tensors = save(tmp_path, files=3)
    found = decoders.read(tmp_path)
    assert found.family == "llama" and found.tensors.keys() == tensors.keys() and found.dtypes == {"F32"}
    assert (found.head_dim, found.rope["rope_theta"], found.rope["rope_type"]) == (4, 10_000.0, "default")
    assert len(decoders.weight_sizes(found)) == 3


@pytest.mark.parametrize("form", [
    {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0}},
    {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "factor": 8.0}},
])  # fmt: skip
def test_rotary_positions_are_read_as_either_transformers_writes_them(tmp_path, form):
    save(tmp_path, form)
    rope = decoders.read(tmp_path).rope
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "llama3", 8.0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "mistral"}, "model_type is 'mistral'; only qwen3, llama, gemma3_text can be tuned"),
        ({"model_type": None}, "model_type is None"),
        ({"quantization_config": {"bits": 4}}, "the weights are quantised"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"attention_bias": True}, "attention_bias is True; only False"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rotary positions of type 'yarn'"),
        ({"intermediate_size": 13}, r"has shape \(8, 12\), but config.json asks for \(8, 13\)"),
        ({"num_hidden_layers": 2}, "lacks model.layers.1.input_layernorm.weight and 8 other tensors"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight; fetch it again"),
    ],
)
def test_a_model_that_cannot_be_tuned_is_refused_by_what_is_wrong(tmp_path, changes, told):
    save(tmp_path, changes)
    with pytest.raises(UserError, match=told):
        decoders.read(tmp_path)


def test_incomplete_weights_are_refused_by_file(tmp_path):
    with pytest.raises(UserError, match="there is no directory"):
        decoders.read(tmp_path / "none")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        decoders.read(tmp_path)
    save(tmp_path, files=2)
    (tmp_path / "part-1.safetensors").rename(tmp_path / "hidden")
    with pytest.raises(
        UserError, match=r"part-1\.safetensors is missing, but model\.safetensors\.index\.json names it"
    ):
        decoders.read(tmp_path)
    (tmp_path / "hidden").rename(tmp_path / "part-1.safetensors")
    whole = (tmp_path / "part-0.safetensors").read_bytes()
    (tmp_path / "part-0.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"part-0\.safetensors is no readable safetensors file"):
        decoders.read(tmp_path)
    (tmp_path / "part-0.safetensors").write_bytes(whole)
    (tmp_path / "old.safetensors").write_bytes(whole)
    with pytest.raises(UserError, match=r"old\.safetensors does not belong to the weights"):
        decoders.read(tmp_path)
