"""DMDR on MIRACL: an ensemble's hard negatives, rule filters, monolingual topic-balanced batches, weighted loss.

    python -m jdmdr.train --config configs/dmdr.py:mdpr --workdir runs/dmdr-mdpr --config.data.root=MIRACL
    python -m jdmdr.pipeline --config configs/dmdr.py:mdpr ...      also searches dev, evaluates and exports

Behind the colon stands the backbone: mbert, mdpr, me5-small, me5-base, me5-large, bge-m3 (default), labse, mcontriever,
minilm, multilingual-minilm, ance-firstp, star or adore (jdmdr/presets.py), or smoke. Its weights from a directory:
--config.encoder.name=DIR. Any other checkpoint: the same, with its pooling, prompts and temperature. An ensemble as in the
paper: --config.mine.retrievers=bge-m3,me5-large --config.mine.fusion=concat. MIRACL is a directory in the layout of
docs/data.md, its published file names included; --config.data.langs=sw,bn,te takes some languages only.

Hardware and time: not measured yet; the original used 2 H100 or A100 (80 GB) for 24k to 30k steps of 24 queries.
Expected, MIRACL dev, mean of 16 languages, nDCG@10 / Recall@100 (Huang et al., EMNLP 2025, tables 1 and 14, which
include the LLM stages): mbert 57.9 / 87.8, mdpr 66.8 / 94.4, me5-large 67.4 / 94.8, bge-m3 70.6 / 95.9. With naive top-k
negatives instead (tables 15 and 16): 53.6 / 83.6, 61.0 / 89.0, 63.5 / 91.9, 67.6 / 92.9.
"""

from configs import default
from jdmdr.presets import PRESETS


def get_config(arg="bge-m3"):
    c = default.get_config()
    backbone, arg = (arg, "") if arg in PRESETS else ("bge-m3", arg)
    chosen = PRESETS[backbone]
    with c.unlocked():
        c.encoder.update(chosen.encoder())
        c.tokenizer.update(chosen.words())
        c.train.objective.temperature = chosen.temperature
        c.train.learning_rate = chosen.learning_rate
        c.train.epochs = float(chosen.epochs)
        c.filters.percent_of_positive = 0.95
        if arg == "smoke":
            c.mine.negatives = c.train.passages_per_query - 1
    return default.smoke(c, arg, PRESETS)
