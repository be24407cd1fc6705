"""Retrieval for open question answering: an encoder as it is, scored by the strings that answer (KorQuAD, XOR-TyDi).

    wikiextractor kowiki-20190201-pages-articles-multistream.xml.bz2 --no-templates -o ko-articles      (not part of jdmdr)
    python -m jdmdr.cut_passages ko-articles --lang=ko --out=korquad --tokenizer=intfloat/multilingual-e5-small
    python -m jdmdr.questions KorQuAD_v1.0_dev.json --lang=ko --out=korquad
    python -m jdmdr.evaluate --config configs/kdr_answers.py:me5-small --workdir runs/korquad --config.data.root=korquad
    python -m jdmdr.answers runs/korquad/evaluate/dev.*.ko.trec --corpus=runs/korquad/corpus/ko \
        --answers=korquad/answers/ko.dev.jsonl

and from Korean to English, with English articles in DIR/corpus/en.jsonl:
    python -m jdmdr.questions xor_dev_retrieve_eng_span_v1_1.jsonl --lang=ko --corpus=en --gold=GOLD.json --out=xor
    python -m jdmdr.evaluate --config configs/kdr_answers.py:me5-small --workdir runs/xor --config.data.root=xor \
        --config.data.splits=ko-dev=ko-dev:none:own
    python -m jdmdr.answers runs/xor/evaluate/ko-dev.*.en.trec --corpus=runs/xor/corpus/en --answers=xor/answers/en.ko-dev.jsonl

Behind the colon stands a preset (jdmdr/presets.py), or nothing with --config.encoder.name=runs/kdr-stage2/export. Hardware and
time: not measured on a Wikipedia. Expected: the authors' figures are pictures that are not public.
"""

from configs import default
from jdmdr.presets import PRESETS


def get_config(arg=""):
    c = default.get_config()
    with c.unlocked():
        if arg in PRESETS:
            c.encoder.update(PRESETS[arg].encoder())
            c.tokenizer.update(PRESETS[arg].words())
            arg = ""
        c.name = "encoder"
        c.data.splits, c.data.fields = "dev=dev:none:own", "text"
        c.encoder.passage_length = 128
        c.train.epochs = 0.0
        c.evaluate.depth = 100
    c = default.smoke(c, arg, PRESETS)
    if arg:
        c.warmup.steps = c.train.steps = 0
    return c
