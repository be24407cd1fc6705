"""Cross-lingual pretraining for retrieval: query language modelling (QLM) and relevance ranking (RR) on weak pairs.

    python -m jdmdr.pretrain --config configs/clir_pretrain.py --workdir runs/clir --config.encoder.name=bert-base-multilingual-uncased \\
        --config.pretrain.sources=articles:DIR

    ... --config.encoder.window=64 --config.pretrain.length=1024          the long model
    ... --config.pretrain.objective.schedule=alternate                    an update for each objective by turns, as the released
                                                                          PyTorch code; joint, the default, as its Paddle one

Without a checkpoint a transformer is trained from scratch (`pretrain.scratch`), and without sources on tinypedia.

Hardware and time: an accelerator for mBERT (not measured here); the authors took 16 GPUs. `:smoke` takes a minute on 2 CPU cores.

Expected of mBERT: MAP of re-ranking CLEF .454 untouched, .516 after QLM + RR for 10 epochs, .530 for 20 (configs/clir_rerank.py has
the table). P@1 in % of finding a translation, untouched / QLM / RR / both, from the paper's figures, as read off them:

    sentences (XNLI-15way)   de-en  1.9/27.4/16.6/22.7   de-es  4.3/51.9/25.8/36.4   de-fr  6.3/52.3/28.4/45.4
                             en-es  1.6/53.2/33.8/45.4   en-fr  2.2/50.9/22.5/43.1   es-fr  7.4/63.5/46.0/57.9
    documents (MultiUN)      en-es  2.6/24.9/19.1/40.3   en-fr  5.2/23.3/22.5/43.1   es-fr 30.3/61.0/65.1/81.5

Masking by rate and side, QLM alone, CLEF MAP: .15 .470, .30 .496, .45 .498; query .496, mixed .479, document .409.
Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval" (WWW 2021); CLEF figures from the logs in the history of its
released code. What a small encoder gets from it on mini-miracl: docs/results.md.
"""

from configs import default


def get_config(arg=""):
    c = default.get_config()
    with c.unlocked():
        c.name = "clir"
        p = c.pretrain
        p.sources, p.min_words = f"parallel:{default.TINYPEDIA}", 20
        p.epochs, p.learning_rate, p.warmup_share = 10.0, 2e-5, 0.05
    return default.smoke_pretraining(c, arg)
