"""What each step from in-batch negatives to ADORE brings, at small size: the published chain, over three seeds.

    python -m jdmdr.ablate --config configs/star_study.py --workdir runs/star-study --config.data.root=DIR

Hardware and time: 2 CPU cores; docs/results.md has the table for four languages of mini-miracl, with its time.
Expected of RoBERTa-base on MS MARCO: configs/star.py and configs/adore.py.

Every row starts from one warm-up, each ADORE row from the encoder that its base row ended with (`row:NAME`), and is compared
with that; the others are compared with the warm-up. `train.keep=last`: a row reports what its training ends with.
"""

from configs import adore, star

TABLE = "From in-batch negatives to ADORE"


def get_config(arg=""):
    c = star.get_config(arg or "star")
    if not arg:
        with c.unlocked():
            c.encoder.width, c.warmup.epochs = 512, 1.0
    changes = _changes(c.train, adore.get_config(arg).train, "train.")
    after = {"encoder.towers": "untied", "warmup.epochs": 0.0, "warmup.steps": None, **changes}
    with c.unlocked():
        c.train.keep = "last"
        rows = [
            ("warm-up", {"train.steps": 0}),
            ("Inbatch-Neg", {"train.passages_per_query": 1}),
            ("Rand-Neg", {"mine.retrievers": "random", "train.objective.negatives": "own"}),
            ("STAR", {}),
            *(
                (f"ADORE on {base}", {**after, "encoder.name": f"row:{base}"})
                for base in ("Inbatch-Neg", "Rand-Neg", "STAR")
            ),
        ]
        c.ablation = {"rows": tuple((TABLE, *row) for row in rows), "seeds": (0, 1, 2), "reference": "warm-up"}
        if arg:
            c.ablation.seeds = (0,)
    return c


def _changes(before, after, prefix):
    """{dotted key: value} of what differs between two sections."""
    found = {}
    for key in before:
        if hasattr(before[key], "items"):
            found |= _changes(before[key], after[key], f"{prefix}{key}.")
        elif before[key] != after[key]:
            found[prefix + key] = after[key]
    return found
