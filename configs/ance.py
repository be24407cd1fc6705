"""ANCE: pairs of a positive and a negative that the model itself has just ranked high, mined again while it trains.

    python -m jdmdr.pipeline --config configs/ance.py --workdir runs/ance --config.data.root=DIR

trains, and starts beside itself the process that encodes, searches and mines with every new checkpoint (docs/ance.md). With one
set of devices let the trainer mine itself: --config.refresh.mode=inline. Watch both: python -m jdmdr.status runs/ance.

Behind the colon: ance (default), transformer (from a checkpoint: --config.encoder.name=NAME), msmarco (the published settings of
FirstP on passages, below), or smoke.

The default trains the quickstart's encoder from scratch, warm-up included: 2 CPU cores, 4 GB of memory, a few minutes on
tinypedia. What it brings over static negatives at that size is not measured yet.

msmarco is RoBERTa-base from the published BM25 warm-up on MS MARCO passages (docs/data.md tells the files it reads):
    --config configs/ance.py:msmarco --config.data.root=MSMARCO --config.encoder.name=DIR --config.refresh.devices=4,5,6,7
Hardware: not measured here; the original trained on 4 GPUs and mined on 4 others, 600k steps.
Expected, passages, dev MRR@10 / R@1k .330 / .959, DL 2019 nDCG@10 .648; the warm-up has .311 (Xiong et al., ICLR 2021, and the
authors' repository, microsoft/ANCE).
"""

from configs import default, quickstart, star

VARIANTS = ("ance", "transformer", "msmarco")


def get_config(arg="ance"):
    variant, rest = (arg, "") if arg in VARIANTS else ("ance", arg)
    c = quickstart.get_config()
    with c.unlocked():
        c.name = "ance"
        ance(c)
        if variant == "transformer":
            star.from_checkpoint(c, 1e-5)
        if variant == "msmarco":
            msmarco(c)
    return default.smoke(c, rest, VARIANTS)


def ance(c):
    """ANCE's mining, loss and refreshes, of the from-scratch encoder."""
    c.mine.retrievers, c.mine.pool = "warmup", "corpus"
    c.mine.depth, c.mine.negatives, c.mine.sample = 200, 20, "uniform"
    c.mine.texts = False
    c.filters.percent_of_positive, c.filters.near_duplicate = None, None
    star.pairwise(c.train)
    c.train.objective.negatives, c.train.policy, c.train.epochs = "query", "random", 8.0
    c.train.checkpoint_every, c.refresh.poll = 50, 10
    c.refresh.mode, c.refresh.chunks = "async", 1


def msmarco(c):
    """The settings of the authors' code for MS MARCO passages."""
    c.encoder.name, c.encoder.pooling, c.encoder.normalize = "roberta-base", "cls", False
    c.encoder.query_length, c.encoder.passage_length = 64, 512
    c.tokenizer.name, c.tokenizer.as_in = "roberta-base", "2.3.0"
    star.from_checkpoint(c, 1e-6)
    star.optimise_and_evaluate(c)
    t = c.train
    t.weight_decay, t.batch_size, t.steps, t.warmup_share = 0.0, 64, 600_000, 0.005
    t.objective.temperature, t.checkpoint_every = 1.0, 10_000
    c.refresh.poll, c.refresh.chunks = 100, 5
