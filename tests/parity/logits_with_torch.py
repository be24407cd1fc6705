"""Loads language models with transformers and saves their logits; runs where torch is installed.

python logits_with_torch.py IDS.npy OUT.npz NAME=DIRECTORY...
"""

import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

path, out, *directories = sys.argv[1:]
ids_BxT = torch.from_numpy(np.load(path)).long()
found = {}
for name, directory in (argument.split("=", 1) for argument in directories):
    model, problems = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", output_loading_info=True)
    assert not any(problems.values()), problems
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids_BxT).logits.numpy()
np.savez(out, **found)
