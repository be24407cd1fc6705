"""Loads an adapter with peft onto its checkpoint and saves the token vectors; runs where torch is installed.

python adapt_with_torch.py ADAPTER IDS.npy OUT.npy
"""

import json
import pathlib
import sys

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModel

adapter, ids_BxT = pathlib.Path(sys.argv[1]), np.load(sys.argv[2])
base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
with torch.no_grad():
    ids = torch.from_numpy(ids_BxT).long()
    np.save(sys.argv[3], model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.numpy())
