"""Loads language models with transformers and saves their logits; runs where torch is installed.

python logits_with_torch.py IDS.npy OUT.npz DIRECTORY...
"""

import pathlib
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

ids_BxT, out, *directories = sys.argv[1:]
found = {}
for directory in directories:
    model, problems = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", output_loading_info=True)
    assert not any(problems.values()), problems
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.from_numpy(np.load(ids_BxT)).long()).logits
    found[pathlib.Path(directory).name] = logits.numpy()
np.savez(out, **found)
