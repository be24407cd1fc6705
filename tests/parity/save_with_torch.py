"""Saves models with sentence-transformers, and what they give; runs where torch is installed.

python save_with_torch.py CHECKPOINT TEXTS.json OUT
"""

import json
import pathlib
import sys

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

checkpoint, texts, out = sys.argv[1], json.loads(pathlib.Path(sys.argv[2]).read_text()), pathlib.Path(sys.argv[3])


def tower(seed, activation):
    """A transformer with random parameters, its pooling and a linear head."""
    torch.manual_seed(seed)
    transformer = Transformer(checkpoint, max_seq_length=20)
    width = transformer.get_embedding_dimension()
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return [transformer, Pooling(width, "mean"), Dense(width, 6, activation_function=activation)]


router = Router.for_query_document(tower(1, torch.nn.Identity()), tower(2, torch.nn.Identity()))
models = {"router": [router, Normalize()], "dense": tower(3, torch.nn.Tanh())}
vectors = {}
for name, modules in models.items():
    model = SentenceTransformer(modules=modules, device="cpu")
    model.save(str(out / name))
    vectors |= {f"{name}/query": model.encode_query(texts), f"{name}/passage": model.encode_document(texts)}
np.savez(out / "vectors.npz", **vectors)
