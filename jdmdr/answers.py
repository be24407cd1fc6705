"""Scores runs by the strings that answer a question: Acc@k, MRR@k, and how much text must be read.

    python -m jdmdr.answers runs/ko/evaluate/dev.*.ko.trec --corpus=runs/ko/corpus/ko --answers=DIR/answers/ko.dev.jsonl

    --corpus DIR     the passages: WORKDIR/corpus/LANG of a working directory
    --answers FILE   what jdmdr.questions wrote
    --match NAME     when a text holds an answer. text (the default): as a string, NFC, case and blanks aside. tokens: DPR's way,
                     the answer's tokens one after another among the text's, NFD and lower-case; a token is a run of letters,
                     digits and marks, or one other character that is no blank
    --out FILE       JSON of all figures

    Acc@k     share of questions that one of the first k passages answers: it holds one of the answers; passages are looked at one
              by one, without their titles, so that an answer across two of them does not count. DPR's top-20 and top-100 retrieval
              accuracy are Acc@20 and Acc@100 with --match=tokens
    MRR@k     mean reciprocal rank of the first such passage among k
    R@2kt     share that is answered within the first 2,000 words of the passages in their order; R@5kt: 5,000 (XOR-TyDi's
              measures; its own script counts words as NLTK does, this one by letters and digits)
    gold@k    share for which one of them holds the gold paragraph's answer with what stands around it

Every question of FILE with an answer counts; one that the run lacks is not answered. `reachable` says for how many a passage of
the corpus holds the gold paragraph's answer with what stands around it at all.

Sources: the measures of KoreaDenseRetriever's evaluation, which kept only questions of the last kind and joined passages; the
tokens of Karpukhin et al., "Dense Passage Retrieval for Open-Domain Question Answering" (EMNLP 2020), as their code has them.
"""

from __future__ import annotations

import pathlib
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import regex
from absl import flags
from tabulate import tabulate

from jdmdr import cli, metrics, progress, reading, workdir
from jdmdr.corpus import Collection
from jdmdr.scores import rounded
from jdmdr.types import UserError

CUTS = (1, 5, 10, 20, 50, 100)
MRR_CUTS = (10, 100)
WORDS = {"R@2kt": 2000, "R@5kt": 5000}
DEPTH = max(CUTS)
_WORD = re.compile(r"\w+")
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]")

Match = Callable[[str], str]  # a text holds an answer where what this makes of the one holds what it makes of the other


class Answers(NamedTuple):
    answers: list[str]
    window: str  # normalised, of the gold paragraph; "" where there is none


def normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def tokens(text: str) -> str:
    """DPR's tokens of a text, each between line ends; "" for a text without any."""
    found = _TOKEN.findall(unicodedata.normalize("NFD", text))
    return "\n".join(["", *found, ""]).lower() if found else ""


MATCHES = {"text": normalised, "tokens": tokens}


def prepared(question: Answers, match: Match) -> list[str]:
    """The answers as `match` makes them, without empty ones, which every text would hold."""
    return [made for made in map(match, question.answers) if made]


def read(path: pathlib.Path) -> tuple[dict[str, Answers], int]:
    """The questions with an answer by qid, and how many have none."""
    found, without = {}, 0
    for number, line in reading.lines(path):
        row = reading.json_object(line, path, number)
        if not isinstance(row.get("qid"), str) or not isinstance(row.get("answers"), list):
            raise reading.bad_line(path, number, "no qid and list of answers; give what jdmdr.questions wrote")
        if row["answers"]:
            found[row["qid"]] = Answers([str(answer) for answer in row["answers"]], normalised(row.get("window", "")))
        else:
            without += 1
    if not found:
        raise UserError(f"{path} holds no question with an answer; give what jdmdr.questions wrote")
    return found, without


def score(
    questions: Mapping[str, Answers], ranked: Mapping[str, Sequence[str]], match: Match = normalised
) -> dict[str, float]:  # fmt: skip
    """The measures, means over `questions`.

    Args:
      ranked: the texts of each question's passages, best first.
    """
    totals = dict.fromkeys((*(f"Acc@{k}" for k in CUTS), *(f"MRR@{k}" for k in MRR_CUTS), *WORDS), 0.0)
    gold = {f"gold@{k}": 0.0 for k in CUTS}
    judged = sum(bool(of.window) for of in questions.values())
    for qid, of in questions.items():
        found, answers = ranked.get(qid, ())[:DEPTH], prepared(of, match)
        texts = [match(text) for text in found]
        rank = next((rank for rank, text in enumerate(texts, 1) if any(a in text for a in answers)), None)
        if rank:
            for k in CUTS:
                totals[f"Acc@{k}"] += rank <= k
            for k in MRR_CUTS:
                totals[f"MRR@{k}"] += 1 / rank if rank <= k else 0
        for name, words in WORDS.items():
            totals[name] += _within(texts, answers, words, match)
        if of.window:
            place = next((rank for rank, text in enumerate(found, 1) if of.window in normalised(text)), None)
            for k in CUTS:
                gold[f"gold@{k}"] += bool(place) and place <= k
    means = {name: total / len(questions) for name, total in totals.items()}
    return {**means, **({name: total / judged for name, total in gold.items()} if judged else {})}


def _within(texts: Sequence[str], answers: Sequence[str], words: int, match: Match) -> bool:
    """Whether a passage, the last one cut where the words end, holds an answer."""
    left = words
    for text in texts:
        found = list(_WORD.finditer(text))
        if len(found) > left:
            text = match(text[: found[left - 1].end()]) if left else ""
        if any(answer in text for answer in answers):
            return True
        left -= len(found)
        if left <= 0:
            return False
    return False


def reachable(questions: Mapping[str, Answers], collection: Collection) -> int:
    """How many questions have their gold paragraph's answer, with what stands around it, in a passage; reads the collection
    once."""
    windows = {of.window for of in questions.values() if of.window}
    width = min(map(len, windows), default=0)
    by_beginning: dict[str, list[str]] = {}
    for window in windows:
        by_beginning.setdefault(window[:width], []).append(window)
    found: set[str] = set()
    for row in progress.bar(range(len(collection)), "  looking", "passages"):
        text = normalised(collection.passage(row).text)
        beginnings = {text[i : i + width] for i in range(len(text) - width + 1)} & by_beginning.keys()
        found |= {window for beginning in beginnings for window in by_beginning[beginning] if window in text}
    return sum(of.window in found for of in questions.values())


def texts_of(path: pathlib.Path, collection: Collection) -> dict[str, list[str]]:
    """The texts of a run's passages, best first."""
    ranked = {}
    for qid, hits in progress.bar(metrics.read_run(path).items(), "  reading", "questions"):
        docids = metrics.ranked(hits, DEPTH)
        rows = collection.rows(docids)
        if (rows < 0).any():
            raise UserError(
                f"{path}: the passage {docids[int((rows < 0).argmax())]!r} is not in the corpus {collection.directory}"
            )
        ranked[qid] = [collection.passage(int(row)).text for row in rows]
    return ranked


def main() -> None:
    flags.DEFINE_string("corpus", "", "WORKDIR/corpus/LANG.")
    flags.DEFINE_string("answers", "", "File that jdmdr.questions wrote.")
    flags.DEFINE_enum("match", "text", list(MATCHES), "When a text holds an answer.")
    flags.DEFINE_string("out", "", "JSON file to write the figures to.")
    cli.run_tool(_command, __doc__)


def _command(words: list[str], values: flags.FlagValues) -> int:
    if not words or not values.corpus or not values.answers:
        raise UserError("name one run or more, the passages with --corpus and the answers with --answers")
    home = pathlib.Path(values.corpus)
    if not (home / "passages.jsonl").is_file():
        raise UserError(f"--corpus {home} holds no passages.jsonl; name WORKDIR/corpus/LANG of a working directory")
    collection, (questions, without) = Collection(home), read(pathlib.Path(values.answers))
    match = MATCHES[values.match]
    found = {word: score(questions, texts_of(pathlib.Path(word), collection), match) for word in words}
    names = list(next(iter(found.values())))
    rows = [
        [pathlib.Path(word).name.removesuffix(".trec"), *(f"{of[name]:.3f}" for name in names)]
        for word, of in found.items()
    ]
    print(tabulate(rows, ["run", *names], disable_numparse=True, stralign="right"))
    counts = {"questions": len(questions), "without_answer": without}
    print(f"\n{len(questions)} questions; {without} without an answer are left out", end="")
    if judged := sum(bool(of.window) for of in questions.values()):
        counts |= {"with_gold": judged, "reachable": reachable(questions, collection)}
        print(f"; of {judged} with a gold paragraph {counts['reachable']} have its answer in the corpus", end="")
    print(".")
    if values.out:
        workdir.write_json(pathlib.Path(values.out), {"counts": counts, "runs": rounded(found)})
    return 0


if __name__ == "__main__":
    main()
