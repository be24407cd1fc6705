"""What transformers makes of exported masked language models and sequence classifiers; needs torch.

python heads_with_torch.py TOKENS.npz OUT.npz DIR ...

TOKENS.npz holds ids, mask, segments and prefix (how many leading tokens of each row a Longformer sees from everywhere). A directory
called masked_lm-... or classifier-... is loaded as that; OUT.npz gets the logits of each by its name.
"""

import pathlib
import sys

import numpy as np
import torch
import transformers

KINDS = {
    "masked_lm": transformers.AutoModelForMaskedLM,
    "classifier": transformers.AutoModelForSequenceClassification,
}
tokens, out, *directories = sys.argv[1:]
found = {name: torch.tensor(array).long() for name, array in np.load(tokens).items()}
logits = {}
for directory in map(pathlib.Path, directories):
    model, report = KINDS[directory.name.partition("-")[0]].from_pretrained(directory, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    inputs = {"attention_mask": found["mask"]}
    if model.config.type_vocab_size > 1:
        inputs["token_type_ids"] = found["segments"]
    if model.config.model_type == "longformer":
        inputs["global_attention_mask"] = (torch.arange(found["ids"].shape[1]) < found["prefix"]).long()
    ids = torch.where(found["mask"] > 0, found["ids"], model.config.pad_token_id)
    with torch.no_grad():
        logits[directory.name] = model.eval()(ids, **inputs).logits.numpy()
np.savez(out, **logits)
