"""Re-ranking by a cross-encoder over five folds of a collection's own queries, as CLEF is used for cross-lingual retrieval.

    python -m jdmdr.rerank_folds --config configs/clir_rerank.py --workdir runs/rerank \\
        --config.encoder.name=runs/clir/export/reranker --config.rerank.query_langs=de,en --config.rerank.document_langs=en,fr \\
        --config.rerank.topics='DIR/topics/{query}.tsv' --config.rerank.qrels='DIR/qrels/{document}.txt' \\
        --config.rerank.corpus='DIR/corpus/{document}.jsonl'

Hardware and time: an accelerator for mBERT on CLEF (not measured here). `:smoke` takes a minute on 2 CPU cores.

Expected: MAP over the judged pool of CLEF, mean of the five test folds, xy = queries of x, documents of y. Read from the fine-tuning
logs in the history of the released code of Yu, Fei and Li, "Cross-lingual Language Model Pretraining for Retrieval" (WWW
2021); one seed. CLEF is licensed, so it was not run here.

                       deen dees defr ende enes enfr esde esen esfr frde fren fres  mean
    mBERT              .400 .507 .395 .465 .545 .437 .463 .438 .412 .442 .419 .519  .454
    + QLM              .452 .536 .450 .497 .565 .494 .483 .458 .469 .498 .479 .567  .496
    + RR               .472 .557 .470 .516 .584 .502 .512 .483 .496 .511 .495 .582  .515
    + QLM + RR           -  .573 .476 .534 .590 .516 .526 .491 .504 .524 .497 .594  .530 (of 11)
    mBERT, long        .388 .487 .387 .478 .541 .438 .441 .427 .406 .448 .406 .518  .447
    long + QLM + RR    .519 .601 .506 .545 .621 .524 .554 .545 .534 .550 .532 .616  .554

Candidates there are all judged documents of a query, so these are not comparable with MAP over the whole collection. What a small
encoder reaches on XQuAD-R: docs/results.md.
"""

from configs import default
from jdmdr.types import UserError


def get_config(arg=""):
    if arg not in ("", "smoke"):
        raise UserError(f"{arg!r} behind the colon is not known; there is: smoke")
    c = default.get_config()
    if arg:
        with c.unlocked():
            r, home = c.rerank, default.TINYPEDIA
            r.topics, r.qrels = f"{home}/topics/{{query}}.test.tsv", f"{home}/qrels/{{document}}.test.tsv"
            r.corpus, r.run = f"{home}/corpus/{{document}}.jsonl", "bm25"
            r.query_langs, r.document_langs, r.monolingual = "en", "en", True
            r.length, r.depth, r.tune_top = 96, 8, 1
            r.steps, r.batch_size, r.checkpoint_every, r.log_every = 4, 8, 2, 1
    return c
