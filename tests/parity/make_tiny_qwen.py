"""python make_tiny_qwen.py DIR: a random Qwen3 of two layers, its tokenizer (bytes) and a chat template, as Hugging Face files."""

import sys

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_tokenizer(directory: str) -> dict[str, int]:
    """One token a byte and the template's three; returns the vocabulary."""
    vocab = {piece: i for i, piece in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[2], pad_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)
    return vocab


def main(directory: str) -> None:
    torch.manual_seed(0)
    vocab = save_tokenizer(directory)
    config = Qwen3Config(
        vocab_size=len(vocab), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=8192, tie_word_embeddings=False,
        eos_token_id=vocab[SPECIAL[2]], pad_token_id=vocab[SPECIAL[0]], bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # one constant dimension, by which the end comes after some twenty tokens, and not after 512
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()[:, 0] = 3.0
        head.normal_(std=0.2)
        head[config.eos_token_id] = torch.eye(config.hidden_size)[0] * 0.85
    model.generation_config.do_sample = True
    model.save_pretrained(directory)


if __name__ == "__main__":
    main(sys.argv[1])
