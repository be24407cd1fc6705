"""Cross-lingual extractive question answering: trained on SQuAD in English, measured on MLQA in every pair of languages.

    python -m jdmdr.spans --config configs/mlqa.py --workdir runs/mlqa --config.encoder.name=runs/clir/export/encoder \\
        --config.spans.train=train-v2.0.json --config.spans.test='MLQA/test-context-{context}-question-{question}.json'

Hardware and time: an accelerator for mBERT on SQuAD (not measured here). `:smoke` takes a minute on 2 CPU cores.

Expected F1 (EM) on MLQA test. Columns are context and question: `en es` reads an English context and a Spanish question. Read from
the fine-tuning logs in the history of the released code of Yu, Fei and Li, "Cross-lingual Language Model Pretraining for
Retrieval" (WWW 2021), whose keys name the context first; one seed. Those runs froze the word vectors, read windows that do not
overlap, lower-cased, and normalised every language's answers as English, so expect other figures here.

                    en de        en es        de en        de de        de es        es en        es de        es es       mean
    mBERT        63.7 (50.3)  64.1 (49.8)  60.1 (44.6)  60.7 (44.5)  53.7 (40.0)  64.4 (43.3)  57.5 (38.7)  63.7 (42.2)  61.0
    + QLM        70.1         69.0         62.3         58.7         58.4         67.7         63.5         64.0         64.2
    + RR         68.3         67.7         61.9         58.1         56.8         65.2         60.7         63.1         62.7
    + QLM + RR   73.2 (58.9)  71.6 (57.1)  62.3 (45.6)  61.3 (45.4)  61.4 (44.6)  68.3 (46.7)  65.9 (43.5)  65.5 (43.1)  66.2

XQuAD-R serves as a stand-in (the answer is a sentence in its paragraph): --config.spans.data=DIR
--config.spans.train_split=test-clean --config.spans.test_split=clean --config.spans.max_answer=96 (docs/results.md).
"""

from configs import default
from jdmdr.types import UserError


def get_config(arg=""):
    if arg not in ("", "smoke"):
        raise UserError(f"{arg!r} behind the colon is not known; there is: smoke")
    c = default.get_config()
    with c.unlocked():
        s = c.spans
        s.langs, s.epochs = "en,de,es", 3.0
        if arg:
            s.data, s.langs, s.train_langs = default.TINYPEDIA, "en,es", "en"
            s.length, s.query_length, s.overlap = 96, 32, 32
            s.steps, s.batch_size, s.checkpoint_every, s.log_every = 4, 8, 2, 1
    return c
