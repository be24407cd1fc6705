"""DMDR whose negatives are mined again while it trains: the whole ensemble, filters and judge with the model of a checkpoint.

    python -m jdmdr.pipeline --config configs/dmdr_refresh.py:mdpr --workdir runs/refresh --config.data.root=MIRACL

Behind the colon a backbone as in configs/dmdr.py, or smoke; everything of that recipe holds. A refresh searches afresh with the
model of a checkpoint in the place of `warmup`, and filters and judges what it finds; other retrievers of mine.retrievers are
searched with the vectors that they have. Where `llm.base_url` is given, pairs that were judged before are not asked again
(docs/ance.md), so that a refresh costs the calls of its new candidates alone.

Hardware, time and what it brings: not measured yet. With one set of devices: --config.refresh.mode=inline.
"""

from configs import dmdr


def get_config(arg="bge-m3"):
    c = dmdr.get_config(arg)
    with c.unlocked():
        c.name = "dmdr-refresh"
        c.refresh.mode = "async"
        if arg != "smoke":
            c.train.checkpoint_every, c.refresh.poll = 1000, 100
            # the vectors of the encoder that trains; mine.retrievers of its own checkpoint would stay as they are
            c.mine.retrievers = "warmup,bm25"
    return c
