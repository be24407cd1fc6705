"""Reads the files that DPR publishes: training samples, questions with their answers, and results of retrieval.

    biencoder-nq-train.json    [{"question", "answers", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}, ...]
    nq-test.qa.csv             question TAB list of answers, written as Python or JSON writes it
    results of DPR's retriever [{"question", "answers", "ctxs": [{"id", "title", "text", "score", "has_answer"}]}, ...]

JSON is streamed, an object at a time, and answers are parsed as what they are, a list of strings. No value is run as code. The
passages, psgs_w100.tsv, are a corpus that `jdmdr.reading` knows. Of a question one "?" at its end is dropped, as ANCE does.

Source: Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering" (EMNLP 2020), and its code's data.
"""

from __future__ import annotations

import ast
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jdmdr import progress, reading
from jdmdr.metrics import Run
from jdmdr.types import UserError

PASSAGE_IDS = ("passage_id", "psg_id")  # of Natural Questions' samples, and of TriviaQA's
PREFIX = "wiki:"  # that later versions of DPR put before a passage's id


class Asked(NamedTuple):
    """A question with its answers, and the ids of its positives where there are any."""

    text: str
    answers: list[str]
    positives: list[str]


def plain(question: str) -> str:
    """The question on one line, without one "?" at its end."""
    return " ".join(question.split()).removesuffix("?")


def samples(path: pathlib.Path) -> Iterator[Asked | None]:
    """Streams training samples with all their positives; None for one without a positive or without a hard negative."""
    left_out = number = 0
    for number, row in reading.json_list(path):
        lists = [row.get(key) for key in ("answers", "positive_ctxs", "hard_negative_ctxs")]
        if not isinstance(row.get("question"), str) or not all(isinstance(of, list) for of in lists):
            raise _bad(
                path, number, "no question, answers, positive_ctxs and hard_negative_ctxs, as DPR's training files have"
            )
        answers, positives, negatives = lists
        if not positives or not negatives:
            left_out += 1
            yield None
            continue
        yield Asked(
            plain(row["question"]), _strings(answers, path, number), [_passage_id(p, path, number) for p in positives]
        )
    if left_out:
        progress.say(f"{path}: {left_out} of {number} samples have no positive or no hard negative and are left out")


def questions(path: pathlib.Path) -> Iterator[Asked]:
    """Streams the questions of a .qa.csv."""
    for number, line in reading.lines(path):
        fields = reading.csv_fields(line, 2)
        if len(fields) != 2:
            raise reading.bad_line(
                path, number, f"{len(fields)} TAB-separated fields where 2 are expected: question, list of answers"
            )
        yield Asked(plain(fields[0]), _literal(fields[1], path, number), [])


def results(path: pathlib.Path, topics: Sequence[tuple[str, str]]) -> Run:
    """The run in a file of results, whose questions are found among `topics`, (qid, text), by their text.

    Raises UserError where none is found; how many are not is told.
    """
    qids: dict[str, list[str]] = {}
    for qid, text in topics:
        qids.setdefault(plain(text), []).append(qid)
    run: Run = {}
    unknown = number = 0
    for number, row in reading.json_list(path):
        hits = row.get("ctxs")
        if not isinstance(row.get("question"), str) or not isinstance(hits, list):
            raise _bad(path, number, "no question and ctxs, as the results of DPR's retriever have")
        found = qids.get(plain(row["question"]), [])
        unknown += not found
        run |= dict.fromkeys(found, dict(_hit(hit, path, number) for hit in hits))
    if not run:
        raise UserError(f"{path}: none of its {number} questions is among the topics; give the topics that it answers")
    if unknown:
        progress.say(f"{path}: {unknown} of {number} questions are not among the topics and are left out")
    return run


def _hit(hit: Any, path: pathlib.Path, number: int) -> tuple[str, float]:
    try:
        return str(hit["id"]).removeprefix(PREFIX), float(hit["score"])
    except (TypeError, KeyError, ValueError):
        raise _bad(path, number, "a passage without an id and a score that is a number") from None


def _passage_id(passage: Any, path: pathlib.Path, number: int) -> str:
    found = (
        next((passage[key] for key in PASSAGE_IDS if key in passage), None) if isinstance(passage, Mapping) else None
    )
    if not isinstance(found, str | int) or isinstance(found, bool):
        raise _bad(path, number, f"a positive without {' or '.join(PASSAGE_IDS)}")
    return str(found).removeprefix(PREFIX)


def _literal(text: str, path: pathlib.Path, number: int) -> list[str]:
    """A list of strings as Python writes one, or JSON; no name, call or operator is evaluated."""
    for parse in (ast.literal_eval, json.loads):
        try:
            return _strings(parse(text.strip()), path, number)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise reading.bad_line(path, number, f"{text[:60]!r} is no list of answers, such as ['one', 'two']")


def _strings(values: Any, path: pathlib.Path, number: int) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise _bad(path, number, f"{str(values)[:60]!r} where a list of answers is expected, each a string")
    return [value for value in values if value.strip()]


def _bad(path: pathlib.Path, number: int, what: str) -> UserError:
    return UserError(f"{path}, entry {number}: {what}")
