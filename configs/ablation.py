"""What each part of DMDR brings: the paper's table of negative strategies and its ablation table, on data of your own.

    python -m jdmdr.ablate --config configs/ablation.py --workdir runs/ablation --config.data.root=DIR --config.data.langs=te,sw

Hardware and time: 2 CPU cores, 10 GB of disk, 35 minutes for four languages of mini-miracl, 14 rows and 3 seeds (docs/results.md).
Expected of the paper's models on MIRACL (Huang et al., EMNLP 2025, tables 2 and 3): docs/ablation.md.

The recipe is the quickstart's encoder, trained from scratch on the spot. `train.keep=last` reports what training ends with:
by default a run keeps its start where no checkpoint does better on the held-out queries, and then all rows would be one.
With --config.llm.base_url and --config.llm.model the rows that a language model judges and tops up run too; without, their lines
say that they need a server. Rows of your own: (table, name, {key: value}) in `ablation.rows`, and LLM behind it for a model.
"""

from configs import quickstart

STRATEGIES, PARTS = "Negative strategies", "Ablations"
NO_FILTER = {"filters.percent_of_positive": None}
LLM = True  # the row has a language model

ROWS = (
    (STRATEGIES, "naive top-k", NO_FILTER),
    (STRATEGIES, "top-k shifted by 10", {**NO_FILTER, "filters.skip": 10}),
    (STRATEGIES, "TopK-Abs 0.6", {**NO_FILTER, "filters.max_score": 0.6}),
    (STRATEGIES, "TopK-MarginPos 0.15", {**NO_FILTER, "filters.absolute_margin": 0.15}),
    (STRATEGIES, "TopK-PercPos 90 %", {"filters.percent_of_positive": 0.9}),
    (STRATEGIES, "full recipe (PercPos 95 %)", {}),
    (STRATEGIES, "DMDR: judged by an LLM, topped up", {}, LLM),
    (PARTS, "no hard negatives (no Stage I)", {"train.passages_per_query": 1}),
    (PARTS, "ensemble without BM25", {"mine.retrievers": "warmup"}),
    (PARTS, "ensemble without the encoder", {"mine.retrievers": "bm25", **NO_FILTER}),
    (PARTS, "judged and topped up", {}, LLM),
    (PARTS, "no LLM judging", NO_FILTER),
    (PARTS, "no reference answer for the judge", {"judge.reference": False}, LLM),
    (PARTS, "no top-up (no Stage II)", {"expand.rounds": 0, "expand.depths": (40,)}, LLM),
    (PARTS, "no generated queries, deeper in the old lists", {"expand.rounds": 0}, LLM),
    (PARTS, "no instruction tuning of the generator", {"expand.model": ""}, LLM),
    (PARTS, "no topic balance", {"train.policy": "language_only"}),
    (PARTS, "no same language", {"train.policy": "topic_only"}),
    (PARTS, "neither (random batches)", {"train.policy": "random"}),
    (PARTS, "no weights in the loss", {"train.objective.mode": "none"}),
    (PARTS, "weights on the negatives", {"train.objective.mode": "negative"}),
)


def get_config(arg=""):
    c = quickstart.get_config(arg)
    with c.unlocked():
        c.encoder.width = 64 if arg else 512
        c.mine.pool, c.mine.depth = "corpus", 40 if arg else 60
        c.train.keep = "last"
        c.train.cloze_share = 0.0
        c.train.epochs = 1.0
        c.train.learning_rate, c.train.learning_rates = 2e-4, (("^weight$", 5e-3),)
        c.ablation = {"rows": ROWS, "seeds": (0, 1, 2), "reference": "full recipe (PercPos 95 %)"}
        if arg:
            c.ablation.seeds = (0, 1)
            c.ablation.rows = tuple(row for row in ROWS if row[1] in SMOKE)
    return c


SMOKE = (
    "naive top-k",
    "full recipe (PercPos 95 %)",
    "DMDR: judged by an LLM, topped up",
    "no hard negatives (no Stage I)",
)
