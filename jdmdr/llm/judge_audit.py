"""The sheet of a judge's verdicts for people to check: a CSV to fill in, and a page to read."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from jdmdr import hashing, workdir
from jdmdr.filters.audit import write_sheet
from jdmdr.llm.judging import Verdict
from jdmdr.llm.votes import CRITERIA
from jdmdr.page import RIGHT_TO_LEFT

if TYPE_CHECKING:
    from jdmdr.judge import Work

SHEET = (
    "lang",
    "qid",
    "query",
    "reference",
    "candidate",
    "docid",
    "rank",
    "by",
    "votes",
    "label",
    "outcome",
    "verdict",
)
Row = dict[str, Any]


def sample(
    lang: str, work: Sequence[Work], verdicts: Sequence[Sequence[Verdict]], count: int, seed: int
) -> Iterator[Row]:
    """`count` pairs that the model judged, half of them kept and half not where there are as many, chosen by a hash."""
    judged = [
        (of, place, verdict)
        for of, found in zip(work, verdicts, strict=True)
        for place, verdict in enumerate(found)
        if verdict.votes
    ]
    order = lambda of: hashing.stable_hash(seed, "judge audit", lang, of[0].query.qid, of[0].pairs[of[1]].docid)
    for kept, share in ((True, count - count // 2), (False, count // 2)):
        for of, place, verdict in sorted((of for of in judged if of[2].kept is kept), key=order)[:share]:
            yield {
                "lang": lang, "qid": of.query.qid, "query": of.query.text, "reference": of.question.reference,
                "candidate": of.pairs[place].text, "docid": of.pairs[place].docid, "rank": of.ranks[place], "by": verdict.by,
                "votes": " ".join("-" if v is None else "/".join(str(v[name]) for name in CRITERIA) for v in verdict.votes),
                "label": "unjudged" if verdict.label is None else verdict.label, "outcome": "kept" if kept else "dropped",
                "verdict": "",
            }  # fmt: skip


def write(rows: Iterable[Row], out_dir: pathlib.Path) -> None:
    rows = list(rows)
    write_sheet(out_dir / "audit.csv", SHEET, ([str(row[name]) for name in SHEET] for row in rows))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("jdmdr"), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page = environment.get_template("judge_audit.html").render(
        rows=rows, criteria=CRITERIA, right_to_left=RIGHT_TO_LEFT
    )
    workdir.write_text(out_dir / "audit.html", page)
