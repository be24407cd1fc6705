"""ANCE: pairs of a positive and a negative that the model itself has just ranked high, mined again while it trains.

    python -m jdmdr.pipeline --config configs/ance.py --workdir runs/ance --config.data.root=DIR

trains, and starts beside itself the process that encodes, searches and mines with every new checkpoint (docs/ance.md). With one
set of devices let the trainer mine itself: --config.refresh.mode=inline. Watch both: python -m jdmdr.status runs/ance.

Behind the colon: ance (default), transformer (from a checkpoint: --config.encoder.name=NAME), msmarco (the published settings of
FirstP on passages), maxp (those of documents in four chunks), warmup (the BM25 warm-up before them), dpr (those of Natural
Questions and TriviaQA), or smoke.

The default trains the quickstart's encoder from scratch, warm-up included: 2 CPU cores, 4 GB of memory, a few minutes on
tinypedia. What refreshes bring at small size: configs/ance_study.py, docs/results.md.

msmarco is RoBERTa-base from the published BM25 warm-up on MS MARCO passages (docs/data.md tells the files it reads):
    --config configs/ance.py:msmarco --config.data.root=MSMARCO --config.encoder.name=DIR --config.refresh.devices=4,5,6,7
Hardware: not measured here; the original trained on 4 GPUs and mined on 4 others, 600k steps.
Expected, passages, dev MRR@10 / R@1k .330 / .959, DL 2019 nDCG@10 .648; the warm-up has .311 (Xiong et al., ICLR 2021, and the
authors' repository, microsoft/ANCE).

maxp is the same on MS MARCO's documents, four chunks of 512 tokens, of which the best one counts:
    --config configs/ance.py:maxp --config.data.root=MSMARCO-DOCS --config.encoder.name=DIR --config.refresh.devices=8,9,10,11
Chunks have special tokens of their own; --config.encoder.chunk_specials=False cuts them out of one long sequence, as the published
checkpoint was trained. Hardware: not measured here; the original trained on 8 GPUs and mined on 4 others, 139k steps.
Expected, documents, DL 2019 nDCG@10 .628 (FirstP .615), re-ranking .671; dev MRR@100 .380 (Pyserini's run of the checkpoint).

warmup is what msmarco starts from: RoBERTa-base with a new head on MS MARCO's triples, whose negatives are BM25's, 128 tokens a
text. They are qidpidtriples.train.small.tsv in data.root, or the texts with
--config.mine.retrievers=triples:MSMARCO/triples.train.small.tsv:
    --config configs/ance.py:warmup --config.data.root=MSMARCO
Its steps end where the published checkpoint was taken, far before the end of its schedule (2,187,500). Hardware: not measured here;
the original ran on one GPU. Expected, dev MRR@10: .311 after 60k steps by the authors; who ran their script reported .298, even
after 300k (issue 22 of microsoft/ANCE), so .295 to .315 is no sign of a mistake. Then --config.encoder.name=WORKDIR/export.

dpr is two BERT towers from DPR's checkpoint, on Wikipedia's passages and questions with answer strings (docs/data.md tells how
DPR's files become a data root with answers/en.train.jsonl). The checkpoint is the hub's, trained on several data sets; of the authors'
own file, as docs/models.md has it: --config.encoder.name=DIR --config.encoder.passage_name=
    --config configs/ance.py:dpr --config.data.root=NQ --config.refresh.devices=8,9,10,11,12,13,14,15
    python -m jdmdr.answers WORKDIR/evaluate/test.ance.en.trec --match=tokens --corpus=WORKDIR/corpus/en --answers=NQ/answers/en.test.jsonl
Hardware: not measured here; the original trained on 8 GPUs and mined on 8 others. Expected, top-20 / top-100 on the test
questions: .819 / .875 (Natural Questions) and .803 / .853 (TriviaQA), DPR itself .784 / .854 and .794 / .850 (the paper).
"""

from configs import default, quickstart, star

VARIANTS = ("ance", "transformer", "msmarco", "maxp", "warmup", "dpr")


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
        if variant == "maxp":
            maxp(c)
        if variant == "warmup":
            warmup(c)
        if variant == "dpr":
            dpr(c)
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
    t.weight_decay, t.batch_size = 0.0, 64
    t.steps, t.horizon, t.warmup_share = 600_000, 1_000_000, 0.005
    t.objective.temperature, t.checkpoint_every = 1.0, 10_000
    c.refresh.poll, c.refresh.chunks = 100, 5


def maxp(c):
    """The settings of the authors' code for MS MARCO documents in chunks."""
    msmarco(c)
    c.data.separator, c.encoder.chunks = "</s>", 4
    t = c.train
    t.learning_rate, t.batch_size, t.steps, t.warmup_share = 1e-5, 128, 139_000, 0.0005


def warmup(c):
    """The settings of the authors' code for the warm-up: one given negative a visit, and nothing mined."""
    msmarco(c)
    c.name, c.refresh.mode = "ance_warmup", "off"
    c.encoder.query_length, c.encoder.passage_length = 128, 128
    c.encoder.projection, c.encoder.projection_bias, c.encoder.projection_norm = 768, True, True
    c.mine.retrievers = "triples:" + c.data.get_ref("root") + "/qidpidtriples.train.small.tsv"
    c.mine.sample, c.mine.depth, c.mine.negatives, c.mine.least = "best", 200, 200, 1
    t = c.train
    t.learning_rate, t.batch_size, t.checkpoint_every = 2e-4, 32, 30_000
    t.steps, t.horizon, t.warmup_share = 60_000, 2_187_500, 1000 / 2_187_500


def dpr(c):
    """The settings of the authors' code for DPR's questions: in the batch every question sees all positives and negatives."""
    c.data.separator, c.data.splits, c.data.valid_share = "[SEP]", "dev,test=test:none:own", 0.02
    c.encoder.name = "facebook/dpr-question_encoder-multiset-base"
    c.encoder.passage_name = "facebook/dpr-ctx_encoder-multiset-base"
    c.encoder.pooling, c.encoder.normalize = "cls", False
    c.encoder.towers, c.encoder.query_length, c.encoder.passage_length = "untied", 256, 256
    c.mine.depth, c.mine.negatives, c.mine.sample, c.mine.least = 100, 100, "best", 2
    c.filters.answers = c.data.get_ref("root") + "/answers/{lang}.train.jsonl"
    star.from_checkpoint(c, 1e-5)
    t = c.train
    t.objective.name, t.objective.mode, t.objective.temperature = "contrastive", "none", 1.0
    t.weight_decay, t.clip, t.batch_size, t.checkpoint_every = 0.0, 2.0, 128, 1000
    t.steps, t.warmup_share = 300_000, 1000 / 300_000
    c.refresh.poll = 100
