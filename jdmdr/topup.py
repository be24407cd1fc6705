"""The loop of DMDR's stage II over the short queries of a language: write, search, judge, append; then deeper."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr.llm.generate import Generated
from jdmdr.llm.judging import Verdict
from jdmdr.types import NO_HIT, Hits

RETRIEVAL, GENERATED = (
    "retrieval",
    "llm",
)  # where an added negative comes from: a list of the old query, or of a new one


class Found(NamedTuple):
    """A ranked list of a query: the mined one (round 0), or that of a round's new query."""

    number: int
    rows_K: np.ndarray  # of the collection; NO_HIT behind the last, and where a filter took one out
    scores_K: np.ndarray


class Judged(NamedTuple):
    """A candidate that the judge saw."""

    row: int
    source: str
    number: int  # of the round, 0 for the mined list
    rank: int  # from 1, in that list
    score: float
    verdict: Verdict


@dataclasses.dataclass
class Short:
    """A query on its way to enough negatives; rows are those of its language's collection."""

    place: int  # among the language's training queries
    missing: int
    seen: set[int]  # its positives, and what was looked at already
    lists: list[Found]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    judged: list[Judged] = dataclasses.field(default_factory=list)

    @property
    def wanted(self) -> int:
        return self.missing - sum(j.verdict.kept for j in self.judged)

    def take(self, lists: Sequence[Found], depth: int) -> dict[int, tuple[Found, int]]:
        """New candidates among the first `depth` of the lists: row -> its list and place there; they count as seen now."""
        new: dict[int, tuple[Found, int]] = {}
        for found in lists:
            for place, row in enumerate(found.rows_K[:depth].tolist()):
                if row != NO_HIT and row not in self.seen:
                    self.seen.add(row)
                    new[row] = found, place
        return new


Write = Callable[[Short, int], Awaitable[Generated]]  # the query, number of the round
Judge = Callable[
    [Short, Sequence[int]], Awaitable[Sequence[Verdict]]
]  # rows in order -> verdicts until enough are kept
Search = Callable[[Sequence[Short], Sequence[str], int], Hits]  # for these queries, with these texts, so deep
Map = Callable[[Callable[[Any], Awaitable[Any]], Sequence[Any], str], list[Any]]  # work of every item; see Client.map


def top_up(
    shorts: Sequence[Short], write: Write, search: Search, judge: Judge, run: Map, config: Any, lang: str
) -> None:
    """Tops up the short queries of one language, as far as rounds and depths go; `config` are the `expand` keys."""
    depths = tuple(config.depths)
    for number in range(1, config.rounds + 1):
        short = [s for s in shorts if s.wanted]
        written = run(lambda s, n=number: write(s, n), short, f"  {lang}: round {number}")
        asked = [s for s, generated in zip(short, written, strict=True) if _note(s, number, generated)]
        if asked:
            hits = search(asked, [s.rounds[-1]["generated_query"] for s in asked], depths[-1])
            for s, rows_K, scores_K in zip(asked, *hits, strict=True):
                s.lists.append(Found(number, rows_K, scores_K))
            _judge(asked, lambda s: s.take(s.lists[-1:], depths[0]), judge, run, f"  {lang}: judging")
    for depth in depths[1:]:
        short = [s for s in shorts if s.wanted]
        _judge(short, lambda s, deep=depth: s.take(s.lists, deep), judge, run, f"  {lang}: to {depth}")


def _note(short: Short, number: int, generated: Generated) -> bool:
    """Enters what a round wrote; whether it is to be searched for."""
    fault = generated.fault
    if not fault and generated.query in [r["generated_query"] for r in short.rounds if not r["fault"]]:
        fault = "written in an earlier round"
    short.rounds.append(
        {"round": number, "summary": generated.summary, "generated_query": generated.query, "fault": fault}
    )
    return not fault


def _judge(
    shorts: Sequence[Short], take: Callable[[Short], dict[int, tuple[Found, int]]], judge: Judge, run: Map, what: str
) -> None:
    work = [(s, new) for s in shorts if (new := take(s))]
    verdicts = run(lambda item: judge(item[0], list(item[1])), work, what)
    for (s, new), found in zip(work, verdicts, strict=True):
        for (row, (of, place)), verdict in zip(new.items(), found, strict=False):  # the rest was not needed
            source = GENERATED if of.number else RETRIEVAL
            s.judged.append(Judged(row, source, of.number, place + 1, float(of.scores_K[place]), verdict))
