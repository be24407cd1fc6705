"""SQuAD's JSON: questions whose answer is a span of a context. Read, made from retrieval data, and measured by F1 and EM.

Sources: Rajpurkar et al., "SQuAD" (EMNLP 2016; v2.0, ACL 2018) for the format and the two measures; Lewis et al., "MLQA" (ACL
2020) for how answers of other languages are compared.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jdmdr import datasets, reading
from jdmdr.corpus import article
from jdmdr.types import UserError
from jdmdr.workdir import write_json


class Question(NamedTuple):
    """`answers` are (text, its first character in the context); none where the context does not answer."""

    id: str
    question: str
    context: str
    answers: list[tuple[str, int]]


def read(path: pathlib.Path) -> list[Question]:
    """Reads a file of SQuAD 1.1, 2.0, MLQA, XQuAD or their kin.

    Raises:
      UserError: no such file or no such JSON; an answer that does not stand where it should.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [
            (qa, paragraph["context"])
            for a in found["data"]
            for paragraph in a["paragraphs"]
            for qa in paragraph["qas"]
        ]
        questions = []
        for qa, context in rows:
            given = [] if qa.get("is_impossible") else qa["answers"]
            answers = [(answer["text"], int(answer["answer_start"])) for answer in given]
            questions.append(Question(str(qa["id"]), qa["question"], context, answers))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file of SQuAD's JSON") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no SQuAD JSON ({type(error).__name__}: {error}); it is "
                        '{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}') from error  # fmt: skip
    for of in questions:
        for text, start in of.answers:
            if of.context[start : start + len(text)] != text:
                raise UserError(
                    f"{path}: the answer {text[:40]!r} of question {of.id!r} does not stand at character {start}"
                )
    if not questions:
        raise UserError(f"{path} holds no question")
    return questions


# ----------------------------------------------------------------------------------------------- from retrieval data


class Root:
    """A data root as the source of questions and contexts."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self._files = directory, datasets.discover(directory)
        self.langs = sorted(self._files)

    @functools.cache  # noqa: B019 - lives as long as the command
    def _passages(self, lang: str) -> dict[str, str]:
        return {p.docid: p.text for path in self._files[lang].corpus for p in reading.passages(path, ("text",))}

    @functools.cache  # noqa: B019
    def _contexts(self, lang: str) -> dict[str, str]:
        """Each passage's context: its row's own, or its article's passages joined."""
        rows = (json.loads(line) for path in self._files[lang].corpus for _, line in reading.lines(path))
        own = {row["docid"]: row["context"] for row in rows if row.get("context")}
        joined: dict[str, list[str]] = {}
        for docid, text in self._passages(lang).items():
            joined.setdefault(article(docid), []).append(text)
        return {docid: own.get(docid) or " ".join(joined[article(docid)]) for docid in self._passages(lang)}

    def questions(self, question: str, context: str, split: str) -> list[Question]:
        """The queries of a split in one language, with contexts of another.

        Args:
          split: the name of a set of topics; ONE-OTHER are the queries of ONE that OTHER lacks.

        The answer is the first relevant passage of the context's language; a query without one is left out.
        """
        name, _, without = split.partition("-")
        topics = self._files[question].topics
        for wanted in filter(None, (name, without)):
            if wanted not in topics:
                raise UserError(
                    f"{self.directory} has no topics {wanted!r} of {question}; there are: {', '.join(topics) or 'none'}"
                )
        left_out = {query.qid for query in reading.topics(topics[without])} if without else set()
        judged: dict[str, list[str]] = {}
        for path in self._files[question].qrels.values():
            for qid, of in reading.qrels(path)[0].items():
                judged.setdefault(qid, []).extend(docid for docid, relevance in of.items() if relevance > 0)
        passages, contexts, found = self._passages(context), self._contexts(context), []
        for query in reading.topics(topics[name]):
            docid = next((d for d in judged.get(query.qid, ()) if d in passages), None)
            start = contexts[docid].find(passages[docid]) if docid and query.qid not in left_out else -1
            if start >= 0:
                found.append(Question(query.qid, query.text, contexts[docid], [(passages[docid], start)]))
        if not found:
            raise UserError(
                f"{self.directory}: no query {split!r} of {question} has its answer in a context of {context}"
            )
        return found


def write(path: pathlib.Path, questions: Sequence[Question]) -> None:
    """Writes a file of SQuAD 1.1, a paragraph a context."""
    by_context: dict[str, list[dict[str, Any]]] = {}
    for q in questions:
        answers = [{"text": text, "answer_start": start} for text, start in q.answers]
        by_context.setdefault(q.context, []).append({"id": q.id, "question": q.question, "answers": answers})
    paragraphs = [{"context": context, "qas": qas} for context, qas in by_context.items()]
    write_json(path, {"version": "1.1", "data": [{"title": "", "paragraphs": paragraphs}]})


# ----------------------------------------------------------------------------------------------------------- F1, EM

ARTICLES = {
    "en": r"\b(a|an|the)\b",
    "es": r"\b(un|una|unos|unas|el|la|los|las)\b",
    "de": r"\b(ein|eine|einen|einem|eines|einer|der|die|das|den|dem|des)\b",
    "fr": r"\b(un|une|des|le|la|les)\b",
    "vi": r"\b(của|là|cái|chiếc|những)\b",
    "ar": r"\bال",
}
BY_CHARACTER = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]"
)  # written without spaces


def normalize(text: str, lang: str) -> list[str]:
    """The tokens of an answer: lower case, without punctuation and the language's articles; a token a character in scripts that
    set no spaces."""
    text = "".join(c for c in text.lower() if unicodedata.category(c)[0] not in "PS")
    if lang in ARTICLES:
        text = re.sub(ARTICLES[lang], " ", text)
    return BY_CHARACTER.sub(lambda match: f" {match[0]} ", text).split()


def f1_and_em(prediction: str, answers: Sequence[str], lang: str) -> tuple[float, float]:
    """The best F1 over tokens, and whether one matches exactly; without answers, whether nothing is predicted."""
    found = normalize(prediction, lang)
    golds = [normalize(answer, lang) for answer in answers] or [[]]
    return max(_f1(found, gold) for gold in golds), float(any(found == gold for gold in golds))


def _f1(found: Sequence[str], gold: Sequence[str]) -> float:
    if not found or not gold:
        return float(found == gold)
    common = sum((collections.Counter(found) & collections.Counter(gold)).values())
    return 2 * common / (len(found) + len(gold))


def score(questions: Sequence[Question], predictions: Mapping[str, str], lang: str) -> dict[str, float]:
    """Mean F1 and EM, 0 to 1, by the context's language; a question without a prediction counts as an empty one."""
    values = [f1_and_em(predictions.get(q.id, ""), [text for text, _ in q.answers], lang) for q in questions]
    f1, em = (sum(column) / len(values) for column in zip(*values, strict=True))
    return {"f1": f1, "em": em, "questions": len(values)}
