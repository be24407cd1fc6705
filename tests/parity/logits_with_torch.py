"""Loads language models with transformers, adapters with peft, and saves their logits; runs where torch is installed.

python logits_with_torch.py IDS.npy OUT.npz NAME=DIRECTORY...
"""

import pathlib
import sys

import numpy as np
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

path, out, *directories = sys.argv[1:]
ids_BxT = torch.from_numpy(np.load(path)).long()
found = {}
for name, directory in (argument.split("=", 1) for argument in directories):
    if (pathlib.Path(directory) / "adapter_config.json").exists():
        model = AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    else:
        model, problems = AutoModelForCausalLM.from_pretrained(directory, dtype="float32", output_loading_info=True)
        assert not any(problems.values()), problems
    with torch.no_grad():
        found[name] = model.eval()(input_ids=ids_BxT).logits.numpy()
np.savez(out, **found)
