"""Loads exported directories with sentence-transformers and saves what they give; runs where torch is installed.

python embed_with_torch.py TEXTS.json OUT.npz DIRECTORY...
"""

import json
import pathlib
import sys

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

texts = json.loads(pathlib.Path(sys.argv[1]).read_text())
out = {}
for directory in map(pathlib.Path, sys.argv[3:]):
    model = SentenceTransformer(str(directory), device="cpu")
    out[f"{directory.name}/query"] = model.encode_query(texts)
    out[f"{directory.name}/passage"] = model.encode_document(texts)
    out[f"{directory.name}/similarity"] = np.array(model.similarity_fn_name)
    if (directory / "config.json").exists():
        _, report = AutoModel.from_pretrained(directory, output_loading_info=True)
        problems = {k: sorted(v) for k, v in report.items() if v and k != "error_msgs"}
        out[f"{directory.name}/problems"] = np.array(json.dumps(problems))
np.savez(sys.argv[2], **out)
