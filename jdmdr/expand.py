"""Stage II of DMDR: tops up the queries that mining and judging left with fewer negatives than `mine.negatives`.

    python -m jdmdr.expand --config configs/dmdr.py --workdir runs/dmdr --config.llm.base_url=http://localhost:8000/v1 \
        --config.llm.model=NAME

A language model summarises the query's positive and writes a new query from the summary; the ensemble searches with it; the
judge holds what it finds against the old query; what is irrelevant is appended in rank order. `expand.rounds` times, then
deeper in the lists of the old and the new queries. What is still missing then, `jdmdr.negatives` fills up.

    expand/{lang}.jsonl      a row per short query: what each round wrote and found, and the negatives it brought
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr.llm import Client
from jdmdr.llm.generate import Generated
from jdmdr.types import NO_HIT, Hits

RETRIEVAL, GENERATED = (
    "retrieval",
    "llm",
)  # where an added negative comes from: a list of the old query, or of a new one


class Verdict(NamedTuple):
    """What the judge says of one candidate."""

    row: int
    kept: bool
    label: int | None  # None: unjudged
    votes: Sequence[Any]


class Found(NamedTuple):
    """A ranked list of a query: the mined one (round 0), or that of a round's new query."""

    number: int
    rows_K: np.ndarray  # of the collection, NO_HIT behind the last
    scores_K: np.ndarray


class Added(NamedTuple):
    """A negative and where it comes from."""

    row: int
    source: str
    rank: int  # from 1, in the list of `number`
    score: float
    number: int  # of the round, 0 for the mined list
    label: int | None
    votes: Sequence[Any]


@dataclasses.dataclass
class Short:
    """A query on its way to enough negatives; rows are those of its language's collection."""

    place: int  # among the language's training queries
    missing: int
    seen: set[int]  # its positives, and what was looked at already
    lists: list[Found]
    rounds: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    added: list[Added] = dataclasses.field(default_factory=list)

    @property
    def wanted(self) -> int:
        return self.missing - len(self.added)

    def take(self, lists: Sequence[Found], start: int, stop: int) -> dict[int, tuple[Found, int]]:
        """New candidates at the places [start, stop) of the lists: row -> its list and rank there; now they count as seen."""
        new: dict[int, tuple[Found, int]] = {}
        for found in lists:
            for place, row in enumerate(found.rows_K[start:stop].tolist(), start):
                if row != NO_HIT and row not in self.seen:
                    self.seen.add(row)
                    new[row] = found, place
        return new


Write = Callable[[Short, int], Awaitable[Generated]]  # the query, number of the round
Judge = Callable[
    [Short, Sequence[int]], Awaitable[Sequence[Verdict]]
]  # rows in order -> verdicts until enough are kept


def expand_language(
    shorts: Sequence[Short], write: Write, search: Callable[[Sequence[str], int], Hits], judge: Judge, client: Client, config: Any,
    lang: str,
) -> None:  # fmt: skip
    """Tops up the short queries of one language, as far as rounds and depths of `config`, the `expand` keys, go."""
    depths = tuple(config.depths)
    for number in range(1, config.rounds + 1):
        short = [s for s in shorts if s.wanted]
        written = client.map(lambda s, n=number: write(s, n), short, f"  {lang}, writing")
        asked = []
        for s, generated in zip(short, written, strict=True):
            repeated = generated.query in [r["generated_query"] for r in s.rounds if not r["fault"]]
            fault = generated.fault or ("written in an earlier round" if repeated else "")
            s.rounds.append(
                {"round": number, "summary": generated.summary, "generated_query": generated.query, "fault": fault}
            )
            if not fault:
                asked.append(s)
        if asked:
            hits = search([s.rounds[-1]["generated_query"] for s in asked], depths[-1])
            for s, rows_K, scores_K in zip(asked, *hits, strict=True):
                s.lists.append(Found(number, rows_K, scores_K))
            _judge([(s, s.take(s.lists[-1:], 0, depths[0])) for s in asked], judge, client, lang)
    for start, stop in itertools.pairwise(depths):
        deeper = [(s, s.take(s.lists, start, stop)) for s in shorts if s.wanted]
        _judge(deeper, judge, client, lang)


def _judge(
    work: Sequence[tuple[Short, Mapping[int, tuple[Found, int]]]], judge: Judge, client: Client, lang: str
) -> None:
    work = [(s, new) for s, new in work if new]
    verdicts = client.map(lambda item: judge(item[0], list(item[1])), work, f"  {lang}, judging")
    for (s, new), found in zip(work, verdicts, strict=True):
        for verdict in found:
            if verdict.kept and s.wanted:
                of, place = new[verdict.row]
                source = GENERATED if of.number else RETRIEVAL
                score = float(of.scores_K[place])
                s.added.append(Added(verdict.row, source, place + 1, score, of.number, verdict.label, verdict.votes))
