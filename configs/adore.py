"""ADORE: the queries' encoder alone goes on training, on what it retrieves from the whole collection in every step.

    python -m jdmdr.pipeline --config configs/adore.py --workdir runs/adore --config.data.root=DIR

trains the quickstart's encoder from scratch first. After any other recipe (`star`, `dmdr`, a checkpoint), from its export:
    --config configs/adore.py:after --config.encoder.name=runs/star/export
and from a transformer's with :transformer instead, and with --config.encode.passages=runs/star, which takes that run's vectors
instead of encoding the collection again. Behind the colon further: msmarco (the published settings, on STAR's export), or smoke.

The passages' vectors lie on the devices, N x D x 2 bytes in bfloat16 over all of them (int8 halves that and keeps a float32
copy for rescoring); docs/performance.md has the table for 8.8 M passages. The default needs 2 CPU cores, 4 GB of memory and a
few minutes on tinypedia; docs/results.md has what to expect of it on mini-miracl.

Expected of msmarco, passages, dev MRR@10 / R@100, DL 2019 nDCG@10 (the table of the authors' repository, jingtaozhan/DRhard):
    on Inbatch-Neg .316 / .860, .658     on Rand-Neg .326 / .865, .661     on STAR .347 / .876, .683
Documents, dev MRR@100 / R@100, DL 2019 nDCG@10: .362 / .884, .580; .361 / .885, .585; .405 / .919, .628. The authors' time:
about an hour an epoch with search on a GPU, and most of the gain after one.
"""

from configs import default, quickstart, star

VARIANTS = ("after", "transformer", "msmarco")


def get_config(arg=""):
    variant, rest = (arg, "") if arg in VARIANTS else ("", arg)
    c = quickstart.get_config()
    with c.unlocked():
        c.name = "adore"
        c.encoder.towers = "untied"
        adore(c.train)
        if variant == "after":
            c.warmup.epochs = 0.0
        if variant == "transformer":
            star.from_checkpoint(c, 5e-6)
        if variant == "msmarco":
            msmarco(c)
    return default.smoke(c, rest, VARIANTS)


def adore(t):
    """ADORE in a training section of the from-scratch encoder."""
    t.objective.name, t.objective.top_k, t.objective.metric_cut, t.objective.temperature = "adore", 200, 200, 0.1
    t.trainable, t.passages_per_query, t.cloze_share = "^query/", 0, 0.0
    t.policy, t.batch_size, t.epochs = "random", 32, 2.0
    t.learning_rates = (("/weight$", 2e-2),)


def msmarco(c):
    """The settings of the authors' code for MS MARCO passages; one epoch, which brings most of the gain, instead of six."""
    c.encoder.name, c.encoder.pooling, c.encoder.normalize = "runs/star/export", "cls", False
    c.encoder.query_length, c.encoder.passage_length = 64, 256
    star.from_checkpoint(c, 5e-6)
    t = c.train
    t.objective.temperature, t.epochs, t.batch_size = 1.0, 1.0, 32
    star.optimise_and_evaluate(c)
