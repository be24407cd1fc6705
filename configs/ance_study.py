"""What refreshing the negatives brings: ANCE against negatives that stay, from one warm-up, over three seeds.

python -m jdmdr.ablate --config configs/ance_study.py --workdir runs/ance-study --config.data.root=DIR
"""

from configs import ance

TABLE = "Negatives that stay, and that are mined again"


def get_config(arg=""):
    c = ance.get_config(arg or "ance")
    with c.unlocked():
        c.refresh.mode, c.train.keep = "inline", "last"
        if not arg:
            c.encoder.width, c.warmup.epochs = 512, 1.0
        stays = {"refresh.mode": "off"}
        rows = [
            ("warm-up", {"train.steps": 0, **stays}),
            ("static, BM25", {"mine.retrievers": "bm25", **stays}),
            ("static, by the warm-up", stays),
            ("ANCE", {}),
        ]
        c.ablation = {
            "rows": tuple((TABLE, *row) for row in rows),
            "seeds": (0, 1, 2),
            "reference": "static, by the warm-up",
        }
        if arg:
            c.ablation.seeds = (0,)
    return c
