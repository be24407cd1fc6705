"""Builds random dual encoders in the layouts that ANCE, STAR and ADORE publish, and saves what they give; runs where torch is
installed.

python rdot_with_torch.py SHAPE.json TOKENS.npz OUT
"""

import json
import pathlib
import sys

import numpy as np
import torch
from torch import nn
from transformers import RobertaConfig, RobertaModel

shape, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[3])
tokens = {name: torch.from_numpy(array).long() for name, array in np.load(sys.argv[2]).items()}


class RDot(nn.Module):
    """RoBERTa's first token through a linear layer and LayerNorm; ANCE's keeps a pooler and a classifier without a use."""

    def __init__(self, config, width, ance):
        super().__init__()
        self.roberta = RobertaModel(config, add_pooling_layer=ance)
        if ance:
            self.classifier = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.embeddingHead = nn.Linear(config.hidden_size, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids, mask):
        hidden = self.roberta(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.norm(self.embeddingHead(hidden[:, 0]))


for seed, (name, width, ance, keys) in enumerate([
    ("star", shape["hidden_size"], False, {"model_type": "roberta"}),
    ("narrow", 12, False, {"model_type": "roberta", "output_embedding_size": 12}),
    ("ance", shape["hidden_size"], True, {"pad_token_id": 0, "eos_token_ids": 0, "finetuning_task": "MSMarco"}),
]):  # fmt: skip
    torch.manual_seed(seed)
    model = RDot(RobertaConfig(**shape), width, ance).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        vectors = model(tokens["ids"], tokens["mask"])
    (out / name).mkdir()
    torch.save(model.state_dict(), out / name / "pytorch_model.bin", _use_new_zipfile_serialization=not ance)
    (out / name / "config.json").write_text(json.dumps({**shape, **keys}))
    np.save(out / f"{name}.npy", vectors.numpy())
