"""Turns questions with answer strings into queries of a data root, and keeps their answers for `jdmdr.answers`.

    python -m jdmdr.questions KorQuAD_v1.0_dev.json --lang=ko --out=DIR
    python -m jdmdr.questions biencoder-nq-train.json --split=train --out=NQ
    python -m jdmdr.questions nq-test.qa.csv --split=test --out=NQ
    python -m jdmdr.questions xor_dev_retrieve_eng_span_v1_1.jsonl --corpus=en --gold=GOLD.json --out=DIR

    FILE            SQuAD's form (KorQuAD 1.0); XOR-TyDi's: an object {"id", "question", "lang", "answers"} a line, .jsonl; or DPR's:
                    training samples, a JSON list, or questions, .csv (jdmdr/dpr.py). Several files make one split
    --lang CODE     of the questions; SQuAD's form does not tell it, of XOR-TyDi's it keeps this one; empty: all; DPR's are English
    --corpus CODE   of the passages that are searched; empty: that of the questions
    --split NAME    "dev" by default
    --gold FILE     in SQuAD's form: the paragraphs of these questions, by their ids

Writes topics/LANG.SPLIT.tsv and answers/LANG.SPLIT.jsonl, {"qid", "answers", "title", "window"}; the last two are of the gold
paragraph: its article, and the answer there with 5 characters on either side. Questions that are asked in another language's
corpus are the split QUESTION-SPLIT of that language, such as en.ko-dev: --config.data.splits=ko-dev=ko-dev:none:own.
Every question is kept, and all its answers.

DPR's questions have no ids: they are SPLIT-1, SPLIT-2 ... by their place in the files. Its samples give qrels/LANG.SPLIT.tsv too,
with all positives of a sample, not the first alone; samples without a positive or without a hard negative are left out, and their
negatives are not read. The passages need no conversion: psgs_w100.tsv lies in the data root as it is.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from absl import flags

from jdmdr import cli, dpr, reading, workdir
from jdmdr.corpus import write_jsonl
from jdmdr.types import UserError

DPR_LANG = "en"
AROUND = 5  # characters on either side of the answer


class Question(NamedTuple):
    qid: str
    text: str
    lang: str
    answers: list[str]
    title: str = ""  # of the gold paragraph's article
    window: str = ""  # the first answer there, and what stands around it
    positives: Sequence[str] = ()  # docids


def read(paths: Sequence[pathlib.Path], lang: str, split: str) -> Iterator[Question]:
    """The questions of files in any form. Raises UserError for what is in none."""
    numbers = itertools.count(1)
    for path in paths:
        asked = _of_dpr(path)
        if asked is None:
            yield from _named(path, lang)
            continue
        for of, number in zip(asked, numbers, strict=False):
            if of:
                yield Question(f"{split}-{number}", of.text, lang or DPR_LANG, of.answers, positives=of.positives)


def _of_dpr(path: pathlib.Path) -> Iterator[dpr.Asked | None] | None:
    """The questions of a file in one of DPR's forms; None for another file."""
    if path.name.removesuffix(".gz").endswith(".csv"):
        return dpr.questions(path)
    return dpr.samples(path) if reading.is_json_list(path) else None


def _named(path: pathlib.Path, lang: str) -> Iterator[Question]:
    """The questions of a file whose form has ids."""
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        for number, line in reading.lines(path):
            row = reading.json_object(line, path, number)
            answers = row.get("answers", [])
            if not all(isinstance(row.get(key), (str, int)) for key in ("id", "question", "lang")) or not isinstance(
                answers, list
            ):
                raise reading.bad_line(path, number, "no id, question, lang and list of answers, as XOR-TyDi has them")
            if not lang or row["lang"] == lang:
                yield Question(
                    str(row["id"]), _line(row["question"]), row["lang"], [str(a) for a in answers if str(a).strip()]
                )
        return
    if not lang:
        raise UserError(f"--lang is missing: {path} does not tell the language of its questions")
    yield from squad(path, lang)


def squad(path: pathlib.Path, lang: str) -> Iterator[Question]:
    """The questions of a file in SQuAD's form, with their paragraphs."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        articles = json.loads(text)["data"]
        for article in articles:
            title = article.get("title", "").replace("_", " ")
            for paragraph in article["paragraphs"]:
                for found in paragraph["qas"]:
                    answers = list(
                        dict.fromkeys(answer["text"] for answer in found["answers"] if answer["text"].strip())
                    )
                    window = _window(paragraph["context"], found["answers"][0]) if answers else ""
                    yield Question(str(found["id"]), _line(found["question"]), lang, answers, title, window)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file of questions") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path} is not in SQuAD's form ({type(error).__name__}: {str(error)[:80]}); it is an object with data, "
            "paragraphs, qas, and answers with text and answer_start; XOR-TyDi's files end in .jsonl"
        ) from error


def _window(context: str, answer: dict[str, Any]) -> str:
    start = int(answer["answer_start"])
    return context[max(0, start - AROUND) : start + len(answer["text"]) + AROUND]


def _line(text: str) -> str:
    return " ".join(str(text).split())


def write(
    paths: Sequence[pathlib.Path], lang: str, corpus: str, split: str, gold: pathlib.Path | None, out: pathlib.Path
) -> dict[str, int]:  # fmt: skip
    """Writes topics, answers and, of questions with positives, qrels; returns how many questions each topics file has."""
    paragraphs = {question.qid: question for question in squad(gold, "")} if gold else {}
    files: dict[str, list[Question]] = {}
    for question in read(paths, lang, split):
        searched = corpus or question.lang
        if found := paragraphs.get(question.qid):
            question = question._replace(title=found.title, window=found.window)
        name = f"{searched}.{split}" if searched == question.lang else f"{searched}.{question.lang}-{split}"
        files.setdefault(name, []).append(question)
    if not files:
        raise UserError(f"{paths[0]} holds no question{f' in {lang!r}' if lang else ''}")
    for name, questions in files.items():
        qids = [question.qid for question in questions]
        if double := next((qid for qid in qids if qids.count(qid) > 1), None) if len({*qids}) < len(qids) else None:
            raise UserError(f"{paths[0]}: the question {double!r} is there twice; keep one of them")
        workdir.write_text(out / "topics" / f"{name}.tsv", "".join(f"{q.qid}\t{q.text}\n" for q in questions))
        if judged := [f"{q.qid}\tQ0\t{docid}\t1\n" for q in questions for docid in dict.fromkeys(q.positives)]:
            workdir.write_text(out / "qrels" / f"{name}.tsv", "".join(judged))
        kept = ({key: getattr(q, key) for key in ("qid", "answers", "title", "window")} for q in questions)
        write_jsonl(out / "answers" / f"{name}.jsonl", kept)
    return {name: len(questions) for name, questions in files.items()}


def main() -> None:
    flags.DEFINE_string("lang", "", "Code of the questions' language.")
    flags.DEFINE_string("corpus", "", "Code of the passages' language.")
    flags.DEFINE_string("split", "dev", "Name of the split.")
    flags.DEFINE_string("gold", "", "File of gold paragraphs.")
    flags.DEFINE_string("out", "", "Data root to write to.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if not words or not values.out:
        raise UserError("name a file of questions, and the data root with --out")
    gold = pathlib.Path(values.gold) if values.gold else None
    paths = [pathlib.Path(word) for word in words]
    counts = write(paths, values.lang, values.corpus, values.split, gold, pathlib.Path(values.out))
    for name, count in counts.items():
        print(f"{count} questions: {pathlib.Path(values.out) / 'topics' / name}.tsv")
    return 0


if __name__ == "__main__":
    main()
