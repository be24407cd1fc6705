"""Distillation, stage 2: a student learns an English teacher's geometry from translations.

    python -m jdmdr.pipeline --config configs/kdr_stage2.py --workdir runs/kdr-stage2 \
        --config.encoder.name=runs/kdr-stage1/export --config.distill.bitext=DIR

DIR holds pairs LANG-en.train.tsv (docs/kdr.md), which are added to tinypedia's own; without it those alone. Behind the colon: alone
(no stage 1: leave encoder.name out), joint (half of the steps on stage 1's batches), checkpoint (a transformer's rates), repro
(the loss and the rates of the method's released script), or smoke.

Hardware: 2 CPU cores, 4 GB of memory. Time: 3 minutes on tinypedia, most of it the teacher's and the evaluation's.
Expected nDCG@10 with Tatoeba's and XQuAD-R's pairs, L-En, tinypedia test, three seeds: 0.19 behind stage 1, 0.21 alone, 0.06 untrained
(docs/results.md); the authors' own figures are pictures that are not public. `:checkpoint` and `:repro` have not been run.
"""

from configs import default, kdr_stage1

VARIANTS = ("alone", "joint", "checkpoint", "repro")


def get_config(arg=""):
    variant, rest = (arg, "") if arg in VARIANTS else ("", arg)
    c = default.get_config()
    with c.unlocked():
        c.name = "kdr"
        kdr_stage1.student(c)
        t = c.train
        t.objective.name = "distill_bitext"
        t.passages_per_query, t.epochs, t.replay_share = 1, 6.0, 0.1
        t.objective.anchor_weight = 1.0
        c.distill.langs = "en"
        if variant == "joint":
            t.replay_share, c.distill.langs = 0.5, ""
        if variant == "alone":
            t.replay_share = 0.0
        if variant == "checkpoint":
            kdr_stage1.checkpoint(c)
            t.passages_per_query, t.epochs = 1, 2.0
        if variant == "repro":
            repro(c)
    c = kdr_stage1.shrink(default.smoke(c, rest, VARIANTS), rest)
    return c


def repro(c):
    """The loss and the rates of the released script: anchor alone, no temperature, 6 pairs a batch, no replay."""
    t = c.train
    kdr_stage1.checkpoint(c)
    t.objective.temperature = t.objective.teacher_temperature = 1.0
    t.objective.anchor_weight, t.objective.cross_weight, t.objective.self_weight = 1.0, 0.0, 0.0
    t.batch_size, t.epochs, t.learning_rate, t.weight_decay, t.clip, t.replay_share = 6, 2.0, 5e-5, 0.0, 0.0, 0.0
