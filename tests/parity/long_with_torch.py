"""What transformers' Longformer makes of a lengthened checkpoint; needs torch.

python long_with_torch.py DIR TOKENS.npz OUT.npz

TOKENS.npz holds ids, mask, segments and prefix (how many leading tokens of each row are global); OUT.npz gets the token
vectors, and the largest difference after transformers has saved and loaded the model again.
"""

import sys
import tempfile

import numpy as np
import torch
import transformers

directory, tokens, out = sys.argv[1:]
found = {name: torch.tensor(array).long() for name, array in np.load(tokens).items()}
everywhere = (torch.arange(found["ids"].shape[1]) < found["prefix"]).long()


def hidden(model):
    with torch.no_grad():
        return model.eval()(
            found["ids"], attention_mask=found["mask"], token_type_ids=found["segments"],
            global_attention_mask=everywhere,
        ).last_hidden_state.numpy()  # fmt: skip


model, report = transformers.AutoModel.from_pretrained(directory, add_pooling_layer=False, output_loading_info=True)
assert type(model).__name__ == "LongformerModel", type(model)
assert not report["missing_keys"] and not report["unexpected_keys"], report
once = hidden(model)
with tempfile.TemporaryDirectory() as again:
    model.save_pretrained(again)
    twice = hidden(transformers.AutoModel.from_pretrained(again, add_pooling_layer=False))
    model.save_pretrained(out + ".saved")
np.savez(out, hidden=once, again=np.abs(once - twice).max())
