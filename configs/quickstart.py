"""The whole of DMDR on the encyclopaedia that ships with the project, from scratch, on a laptop.

python -m jdmdr.pipeline --config configs/quickstart.py --workdir runs/quickstart
"""

from configs import default


def get_config(arg=""):
    c = default.get_config()
    with c.unlocked():
        c.warmup.steps, c.warmup.batch_size = 600, 64
        c.warmup.learning_rate = 5e-4
        c.train.steps, c.train.batch_size = 300, 32
        c.train.learning_rate = 5e-4
        c.train.checkpoint_every = c.warmup.checkpoint_every = 100
        c.topics.scope = "language"
    return default.smoke(c, arg)
