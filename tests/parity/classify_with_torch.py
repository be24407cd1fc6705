"""Makes random sequence classifiers, and what transformers and sentence-transformers score with them; needs torch.

python classify_with_torch.py PAIRS.json LENGTH OUT

OUT/FAMILY-LABELS are checkpoints of every family, OUT/cross-encoder what sentence-transformers' CrossEncoder saved;
OUT/scores.npz holds their logits for the pairs.
"""

import json
import pathlib
import sys

import numpy as np
import tokenizers
import torch
import transformers
from sentence_transformers import CrossEncoder
from tokenizers import models, pre_tokenizers, processors

pairs, length, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), int(sys.argv[2]), pathlib.Path(sys.argv[3])
SHAPE = dict(
    vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=48,
)  # fmt: skip
# model type: its own tokenizer's template, its segments, and what of its shape differs
FAMILIES = {
    "bert": ("<s> $A </s> $B:1 </s>:1", True, dict(type_vocab_size=2, pad_token_id=0)),
    "roberta": ("<s> $A </s> </s> $B </s>", False, dict(type_vocab_size=1, pad_token_id=1)),
    "xlm-roberta": ("<s> $A </s> </s> $B </s>", False, dict(type_vocab_size=1, pad_token_id=1)),
}


def make_tokenizer(template, segments, pad_id):
    words = [f"w{i}" for i in range(195)]
    words[pad_id:pad_id] = ["<pad>"]
    vocabulary = {word: i for i, word in enumerate(words + ["<s>", "</s>", "<unk>", "<mask>"])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=template, special_tokens=[(t, vocabulary[t]) for t in ("<s>", "</s>")]
    )
    names = ["input_ids", *(["token_type_ids"] if segments else []), "attention_mask"]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_input_names=names, model_max_length=length,
    )  # fmt: skip


scores = {}
for family, (template, segments, keys) in FAMILIES.items():
    for labels in (1, 2, 3):
        torch.manual_seed(labels)
        config = transformers.AutoConfig.for_model(
            family, **SHAPE, **keys, num_labels=labels, id2label={i: f"label-{i}" for i in range(labels)}
        )
        model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.15)
        tokenizer = make_tokenizer(template, segments, keys["pad_token_id"])
        name = f"{family}-{labels}"
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
        inputs = tokenizer(
            *zip(*pairs, strict=True), padding=True, truncation="only_second", max_length=length, return_tensors="pt"
        )
        assert ("token_type_ids" in inputs) == segments
        with torch.no_grad():
            scores[name] = model(**inputs).logits.numpy()

cross = CrossEncoder(str(out / "bert-1"), max_length=length, device="cpu")
cross.save_pretrained(str(out / "cross-encoder"))
scores["cross-encoder"] = cross.predict(pairs, activation_fn=torch.nn.Identity())[:, None]
np.savez(out / "scores.npz", **scores)
