"""STAR: static hard negatives of the warm-up model, with in-batch ones that keep training stable; and its two baselines.

    python -m jdmdr.pipeline --config configs/star.py --workdir runs/star --config.data.root=DIR

Behind the colon: star (default), inbatch (Inbatch-Neg: the other queries' positives alone), random (Rand-Neg: passages drawn
from the whole corpus alone), transformer (STAR from a checkpoint: --config.encoder.name=NAME), msmarco (the published settings,
below), or smoke. ADORE goes on from a finished run:
configs/adore.py. All of the chain at small size, over three seeds: configs/star_study.py.

The default trains the quickstart's encoder from scratch, warm-up included: 2 CPU cores, 4 GB of memory, a few minutes on
tinypedia; docs/results.md has what to expect of it on mini-miracl.

msmarco is RoBERTa-base from the published BM25 warm-up on MS MARCO passages (docs/data.md tells the files it reads):
    --config configs/star.py:msmarco --config.data.root=MSMARCO --config.encoder.name=DIR
From bare RoBERTa-base add its head: --config.encoder.projection=768 --config.encoder.projection_bias=True
--config.encoder.projection_norm=True.
Hardware: not measured here; the original took about 36 hours on one GPU of 32 GB for 50k steps (Zhan et al., SIGIR 2021).
Expected, passages, dev MRR@10 / R@100, DL 2019 nDCG@10 (the table of the authors' repository, jingtaozhan/DRhard):
    Inbatch-Neg .264 / .837, .583     Rand-Neg .301 / .853, .612     STAR .340 / .867, .642
Documents, dev MRR@100 / R@100, DL 2019 nDCG@10: Inbatch-Neg .320 / .864, .544; Rand-Neg .330 / .859, .572; STAR .390 /
.867, .605 (that recall repeats the passages' and is probably a slip; the paper has .913).
"""

from configs import default, quickstart

VARIANTS = ("star", "inbatch", "random", "transformer", "msmarco")


def get_config(arg="star"):
    variant, rest = (arg, "") if arg in VARIANTS else ("star", arg)
    c = quickstart.get_config()
    with c.unlocked():
        c.name = "star"
        c.mine.retrievers, c.mine.pool, c.mine.depth, c.mine.negatives = "warmup", "corpus", 210, 200
        c.mine.texts = False
        c.filters.percent_of_positive, c.filters.near_duplicate = None, None
        pairwise(c.train)
        if variant == "inbatch":
            c.name, c.train.passages_per_query = "inbatch", 1
        if variant == "random":
            c.name, c.mine.retrievers, c.train.objective.negatives = "random", "random", "own"
        if variant == "transformer":
            from_checkpoint(c, 1e-4)
        if variant == "msmarco":
            msmarco(c)
    return default.smoke(c, rest, VARIANTS)


def pairwise(t):
    """STAR's loss in a training section of the from-scratch encoder."""
    t.objective.name, t.objective.temperature = "pairwise", 0.1
    t.passages_per_query, t.cloze_share, t.policy = 2, 0.0, "language_only"
    t.optimiser, t.learning_rate, t.learning_rates, t.epochs = "lamb", 3e-3, (), 2.0


def from_checkpoint(c, learning_rate):
    """A transformer's rates; no warm-up."""
    c.warmup.epochs, c.warmup.learning_rates = 0.0, ()
    c.train.learning_rate, c.train.learning_rates = learning_rate, ()
    c.train.warmup_share, c.train.clip, c.train.weight_decay = 0.1, 1.0, 0.01
    c.train.objective.temperature = 0.05


def msmarco(c):
    """The settings of the authors' code for MS MARCO passages."""
    c.encoder.name, c.encoder.pooling, c.encoder.normalize = "roberta-base", "cls", False
    c.encoder.query_length, c.encoder.passage_length = 32, 256
    c.tokenizer.name, c.tokenizer.as_in = "roberta-base", "2.8.0"
    from_checkpoint(c, 1e-4)
    t = c.train
    t.epochs = 25.0
    t.query_length, t.passage_length = 24, 120
    t.objective.temperature, t.batch_size, t.policy = 1.0, 256, "random"
    optimise_and_evaluate(c)


def optimise_and_evaluate(c):
    """What STAR and ADORE on MS MARCO share."""
    t = c.train
    t.weight_decay, t.no_decay, t.clip = (
        0.01,
        "bias$|(embeddings/|_)norm/scale$",
        1.0,
    )  # the head's LayerNorm decays, as theirs
    t.warmup_share, t.checkpoint_every = 0.02, 2000
    c.data.splits, c.data.valid_share = "dev,test,lead=lead:none:own", 0.005
    c.evaluate.depth, c.evaluate.measures = 1000, "msmarco_mrr@10,recall@100,recall@1000,recall(rel=2)@1000"
