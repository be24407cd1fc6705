"""Saves tiny random language models with transformers; runs where torch is installed.

python save_llm_with_torch.py OUT
"""

import pathlib
import sys

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<|user|>", "<|assistant|>", "<|end|>"]
# Llama 3.1's rotary frequencies, their bend inside a text of the test's length.
BENT = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
SHAPE = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "eos_token_id": 3, "pad_token_id": 0,
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


def tokenizer():
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.train_from_iterator(
        ["Summarise this text."],
        trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"], special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|end|>", pad_token="<pad>", chat_template=TEMPLATE
    )


for seed, (name, build) in enumerate(MODELS.items()):
    torch.manual_seed(seed)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    out = pathlib.Path(sys.argv[1]) / name
    model.save_pretrained(out, max_shard_size="60KB" if name == "llama" else "1GB")
    tokenizer().save_pretrained(out)
