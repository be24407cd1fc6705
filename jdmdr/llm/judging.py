"""Whether a passage answers a query, by a language model: pairs judged by votes, the candidates of a query in rank order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from ml_collections import ConfigDict

from jdmdr import hashing
from jdmdr.library import TrainingQuery
from jdmdr.llm import prompts
from jdmdr.llm.client import Reply, Request
from jdmdr.llm.votes import Vote, fewest, label, majority, read_vote, settled
from jdmdr.types import NO_HIT

QRELS, SCORE, LLM = "qrels", "score", "llm"  # what a verdict is by
KEEP = "keep"  # of judge.unjudged


class Question(NamedTuple):
    """A query, and the known positive that candidates are compared with; "" where there is none to show."""

    about: str  # language and qid, for the log
    text: str
    reference: str


class Pair(NamedTuple):
    """A candidate of a query."""

    docid: str
    text: str
    free: str = ""  # why it needs no call, QRELS or SCORE; "": the model is asked


class Verdict(NamedTuple):
    label: int | None  # None: no valid vote
    kept: bool  # as a hard negative
    by: str
    votes: tuple[Vote | None, ...] = ()  # in the order of judge.sampling; None: no valid reply


class Asks(Protocol):
    """What answers requests: a client, or what counts them beforehand."""

    async def complete(self, request: Request) -> Reply: ...


def question_of(
    query: TrainingQuery, lang: str, text: Callable[[int], str], config: ConfigDict, other_than: int = NO_HIT
) -> Question:
    """The query with one of its positives, chosen by a hash, for the judge to compare with; none without judge.reference.

    Args:
      text: of a global row; a positive without one is no reference.
      config: the whole recipe.
      other_than: a positive that is not to be shown, since it is the candidate.
    """
    reference = reference_of(query, lang, text, config.seed, other_than) if config.judge.reference else ""
    return Question(f"{lang} {query.qid}", query.text, reference)


def reference_of(
    query: TrainingQuery, lang: str, text: Callable[[int], str], seed: int, other_than: int = NO_HIT
) -> str:
    """The text of one positive that has any, chosen by a hash; "" where none has."""
    texts = [text(int(row)) for row in query.positives if row != other_than]
    known = [found for found in texts if found.strip()]
    return known[int(hashing.rng(seed, "reference", lang, query.qid).integers(len(known)))] if known else ""


def requests(config: ConfigDict, question: Question, pair: Pair, purpose: str = "judge") -> list[Request]:
    """All votes on a pair, one a line of judge.sampling."""
    messages = prompts.judge(question.text, question.reference, pair.text, config.passage_chars)
    about = f"{question.about} {pair.docid}"
    return [
        Request(purpose, about, prompts.JUDGE, messages,
                {"temperature": temperature, "top_p": top_p, "max_tokens": config.max_tokens}, index, prompts.JUDGE_SCHEMA)
        for index, (temperature, top_p) in enumerate(config.sampling)
    ]  # fmt: skip


async def judge_pair(
    client: Asks, config: ConfigDict, question: Question, pair: Pair, purpose: str = "judge"
) -> Verdict:
    """Votes are cast until the rest cannot change whether the pair is kept.

    Args:
      config: the recipe's `judge` keys.
    """
    left = requests(config, question, pair, purpose)
    first = fewest(len(left), config.keep_max_label)
    votes = list(await asyncio.gather(*(_vote(client, request) for request in left[:first])))
    del left[:first]
    while not settled(_labels(votes), len(left), config.keep_max_label):
        votes.append(await _vote(client, left.pop(0)))
    found = majority(_labels(votes))
    kept = config.unjudged == KEEP if found is None else found <= config.keep_max_label
    return Verdict(found, kept, LLM, tuple(votes))


async def _vote(client: Asks, request: Request) -> Vote | None:
    return read_vote((await client.complete(request)).text)


def _labels(votes: Sequence[Vote | None]) -> list[int]:
    return [label(vote) for vote in votes if vote]


async def judge_in_order(
    client: Asks, config: ConfigDict, question: Question, pairs: Sequence[Pair], wanted: int
) -> list[Verdict]:
    """Verdicts of the first pairs, until `wanted` are kept; what lies behind is not asked.

    No pair is asked that a strict walk from the first to the last would not ask too: at a time go as many as are still
    wanted. A pair that needs no call is kept.
    """
    verdicts: list[Verdict] = []
    while (missing := wanted - sum(v.kept for v in verdicts)) > 0 and len(verdicts) < len(pairs):
        block = pairs[len(verdicts) : len(verdicts) + missing]
        asked = [_free(pair) if pair.free else judge_pair(client, config, question, pair) for pair in block]
        verdicts += await asyncio.gather(*asked)
    return verdicts


async def _free(pair: Pair) -> Verdict:
    return Verdict(0, True, pair.free)
