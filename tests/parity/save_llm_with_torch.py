"""Saves tiny random language models, one of each family that can be tuned; runs where torch is installed.

python save_llm_with_torch.py OUT
"""

import pathlib
import sys

import torch
from make_tiny_qwen import save_tokenizer
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 259, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None,
}  # fmt: skip
# Llama 3.1's rotary frequencies, bent within the length of the test's texts.
BENT = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_hidden_layers=2, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**SHAPE, num_hidden_layers=2, tie_word_embeddings=False, rope_parameters=BENT)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SHAPE, num_hidden_layers=7, query_pre_attn_scalar=16, sliding_window=8)
    ),
}

for seed, (name, build) in enumerate(MODELS.items()):
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = pathlib.Path(sys.argv[1]) / name
    model.save_pretrained(out, max_shard_size="60KB" if name == "llama" else "1GB")
    save_tokenizer(str(out))
