"""The whole of DMDR on the encyclopaedia that ships with the project, from scratch, on a laptop.

    python -m jdmdr.pipeline --config configs/quickstart.py --workdir runs/quickstart

Hardware: 2 CPU cores, 4 GB of memory, 1 GB of disk. Time: 2 to 5 minutes.
Expected nDCG@10, mean of ten languages: dev 0.70, hybrid 0.72; test 0.68, hybrid 0.71 (docs/results.md).

The same recipe on other data: --config.data.root=DIR, and --config.tokenizer.vocab_size=32000 for some 30,000 passages.
"""

from configs import default


def get_config(arg=""):
    c = default.get_config()
    with c.unlocked():
        c.encoder.width = 1024
        for section in (c.warmup, c.train):
            section.batch_size, section.cloze_share = 64, 0.5
            section.objective.temperature = 0.1
            section.learning_rate, section.learning_rates = 5e-4, (("(^|/)weight$", 2e-2),)
            section.warmup_share, section.clip = 0.0, 0.0
            section.checkpoint_every = 200
        c.warmup.epochs, c.train.epochs = 2.0, 4.0
        c.mine.pool, c.mine.depth = "positives", 100
        c.filters.percent_of_positive = 0.95
        c.topics.scope = "language"
    return default.smoke(c, arg)
