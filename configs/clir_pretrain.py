"""Cross-lingual pretraining for retrieval: query language modelling and relevance ranking on weak pairs.

    python -m jdmdr.pretrain --config configs/clir_pretrain.py --workdir runs/clir --config.encoder.name=NAME \\
        --config.pretrain.sources=articles:DIR
"""

from configs import default


def get_config(arg=""):
    c = default.get_config()
    with c.unlocked():
        c.name = "clir"
        c.pretrain.sources = f"parallel:{default.TINYPEDIA}"
        c.pretrain.min_words = 20
        c.pretrain.epochs = 10.0
    return default.smoke_pretraining(c, arg)
