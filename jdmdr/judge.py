"""The judge: a language model says which mined candidates answer their query; the others are its hard negatives.

    python -m jdmdr.judge --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR \\
        --config.llm.base_url=http://localhost:8000/v1 --config.llm.model=NAME
    ... --dry_run       calls, tokens, cost and time before anything is sent; it mines first where that is not done yet

    judge/{lang}.jsonl                one row a judged pair, in rank order: label, votes, whether it is kept
    judge/calibration.json, .md       what the judge says about pairs that people judged
    judge/audit.csv, audit.html       a sample of its verdicts for a person to check

The candidates of a query are those that the filters leave, `judge.depth` at most, judged in rank order until `mine.negatives`
are kept (DMDR, Huang et al., EMNLP 2025, section 3.3). docs/llm.md has the rules, the keys and the cost.
"""

from __future__ import annotations

import asyncio
import json
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from jdmdr import hashing, progress
from jdmdr.corpus import Collection, passage_text, write_jsonl
from jdmdr.filters import (
    CROSS_ENCODER,
    KEPT,
    Candidates,
    Context,
    Filter,
    answers,
    apply_filters,
    cross_encoder,
    cross_encoder_rules,
    rules_from_config,
)
from jdmdr.filters.rules import SCORE_RULES, Column, percent_of_positive
from jdmdr.library import Library, TrainingQuery, docid_lookup, used_in_training
from jdmdr.llm import calibration, counting, judge_audit
from jdmdr.llm.client import Client, Request
from jdmdr.llm.counting import Counter
from jdmdr.llm.estimate import Plan
from jdmdr.llm.judging import LLM, QRELS, SCORE, Pair, Question, Verdict, judge_in_order, question_of, requests
from jdmdr.llm.votes import fewest
from jdmdr.mine import read_mined
from jdmdr.retrievers import parse
from jdmdr.types import NO_HIT, UserError

PAPER_DROPS = 0.195  # share of the candidates that the paper's judge took out
ASSUMED = {True: '{"accuracy": 0, "completeness": 0}', False: '{"accuracy": 2, "completeness": 2}'}  # kept, dropped


class Work(NamedTuple):
    """One query's candidates, best first."""

    query: TrainingQuery
    question: Question
    pairs: list[Pair]
    ranks: list[int]  # in the mined list, from 1
    scores: list[float]  # of the mined list


# ------------------------------------------------------------------------------------------------------- what is asked


def langs(library: Library, config: ConfigDict) -> list[str]:
    """The languages that are judged."""
    wanted = [lang.strip() for lang in config.judge.langs.split(",") if lang.strip()]
    for lang in wanted:
        if lang not in library.langs:
            raise UserError(
                f"judge.langs names {lang!r}, of which there are no data; there are {', '.join(library.langs)}"
            )
    return [lang for lang in library.langs if not wanted or lang in wanted]


def active_rules(config: ConfigDict) -> dict[str, Any]:
    """The filter rules before the judge; without `judge.score_rules` those are off that stand in for it."""
    filters = config.filters.to_dict()
    return filters if config.judge.score_rules else filters | dict.fromkeys(SCORE_RULES)


def filters_of(
    lang: str, queries: Sequence[TrainingQuery], chosen: Sequence[int], collection: Collection, mined_dir: pathlib.Path,
    config: ConfigDict,
) -> list[Filter]:  # fmt: skip
    """The filters before the judge, for the candidates of those of the language's queries that are `chosen`, by place."""
    rules = rules_from_config(active_rules(config))
    rules += answers.rules(config.filters.answers, lang, [queries[q].qid for q in chosen], collection)
    if config.cross_encoder.name:
        scores = cross_encoder.column(*cross_encoder.read(mined_dir.with_name(CROSS_ENCODER), lang))
        rules += cross_encoder_rules(config.filters.to_dict(), Column(*(values[chosen] for values in scores)))
    return rules


def work_of(
    lang: str, library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, config: ConfigDict
) -> list[Work]:
    """What there is to judge in a language; `judge.queries` of its training queries, chosen by a hash."""
    index = library.langs.index(lang)
    queries = used_in_training(training, index)
    if not queries:
        return []
    collection, base = library.collections[index], int(library.bases[index])
    ensemble, judge = parse(config.mine.retrievers), config.judge
    mined = read_mined(mined_dir, lang, [spec.name for spec in ensemble])
    text = lambda row: passage_text(collection.passage(int(row)))
    chosen = chosen_of(queries, lang, judge.queries, config.seed)
    candidates = Candidates(mined.rows_QxK, mined.scores_QxK, *mined.dense(ensemble))
    candidates = Candidates(*(np.asarray(values)[chosen] for values in candidates))
    context = Context([queries[q].positives - base for q in chosen], text)
    _, reasons_QxK, _ = apply_filters(
        candidates, filters_of(lang, queries, chosen, collection, mined_dir, config), context
    )
    docid = docid_lookup(collection, [mined])
    far_QxK = np.zeros(reasons_QxK.shape, bool)
    if judge.keep_below is not None:
        far_QxK = percent_of_positive(judge.keep_below).keep(candidates, context)
        far_QxK &= ~np.isnan(candidates.threshold_scores_QxK)
    out = []
    for at, q in enumerate(chosen):
        query, judged = queries[q], set((queries[q].judged - base).tolist()) if judge.use_qrels else set()
        places = np.flatnonzero(reasons_QxK[at] == KEPT)[: judge.depth]
        rows = candidates.rows_QxK[at, places].tolist()
        free = [
            QRELS if row in judged else SCORE if far_QxK[at, place] else ""
            for row, place in zip(rows, places, strict=True)
        ]
        out.append(
            Work(
                query, question_of(query, lang, lambda row: text(row - base), config),
                [Pair(docid(row), text(row), why) for row, why in zip(rows, free, strict=True)],
                [int(place) + 1 for place in places], candidates.scores_QxK[at, places].tolist(),
            )
        )  # fmt: skip
    return out


def chosen_of(queries: Sequence[TrainingQuery], lang: str, count: int | None, seed: int) -> list[int]:
    """Places of the queries that are judged."""
    order = sorted(range(len(queries)), key=lambda q: hashing.stable_hash(seed, "judged queries", lang, queries[q].qid))
    return sorted(order[:count])


# ----------------------------------------------------------------------------------------------------------- the stage


def judge(
    library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, client: Client, config: ConfigDict,
    out_dir: pathlib.Path,
) -> dict[str, Any]:  # fmt: skip
    """Judges every language and writes its verdicts; returns the counts.

    Args:
      config: the whole recipe.
    """
    judged = langs(library, config)
    measured = calibration.calibrate(judged, library, training, client, config, out_dir)
    counts: dict[str, Any] = {}
    sheet: list[judge_audit.Row] = []
    for lang in judged:
        work = work_of(lang, library, training, mined_dir, config)
        if not work:
            continue
        ask = lambda of: judge_in_order(client, config.judge, of.question, of.pairs, config.mine.negatives)
        verdicts = client.map(ask, work, f"  judging {lang}")
        write_jsonl(out_dir / f"{lang}.jsonl", _rows(work, verdicts))
        counts[lang] = _counts(verdicts, config.mine.negatives)
        sheet += judge_audit.sample(lang, work, verdicts, config.audit.rows, config.seed)
    judge_audit.write(sheet, out_dir)
    progress.say(textwrap.indent(counts_table(counts), "  "))
    return {"languages": counts, "calibration": measured}


def _rows(work: Sequence[Work], verdicts: Sequence[Sequence[Verdict]]) -> Iterator[dict[str, Any]]:
    for of, found in zip(work, verdicts, strict=True):
        for pair, rank, score, verdict in zip(of.pairs, of.ranks, of.scores, found, strict=False):
            yield {"query_id": of.query.qid, "docid": pair.docid, "rank": rank, "score": score, **verdict._asdict()}


def _counts(verdicts: Sequence[Sequence[Verdict]], wanted: int) -> dict[str, int]:
    flat = [verdict for found in verdicts for verdict in found]
    asked = [verdict for verdict in flat if verdict.by == LLM]
    return {
        "queries": len(verdicts),
        "pairs": len(flat),
        "free": len(flat) - len(asked),
        "votes": sum(len(v.votes) for v in asked),
        "invalid votes": sum(v.votes.count(None) for v in asked),
        "unjudged": sum(v.label is None for v in asked),
        "dropped": sum(not v.kept for v in flat),
        "kept": sum(v.kept for v in flat),
        f"with {wanted} kept": sum(sum(v.kept for v in found) >= wanted for found in verdicts),
    }


def counts_table(counts: Mapping[str, Mapping[str, int]], form: str = "simple") -> str:
    """A row a language and one of totals."""
    rows = [[lang, *of.values()] for lang, of in counts.items()]
    rows.append(["all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])])
    return tabulate(rows, ["lang", *next(iter(counts.values()))], tablefmt=form, intfmt=",")


def report(counts: Mapping[str, Any] | None, config: ConfigDict) -> list[str]:
    """Paragraphs of Markdown about the judge; `counts` are what the stage recorded, None where there is none."""
    if counts is None:
        return ["No language model judged the candidates (`llm.base_url` is empty): the rule filters stand in for it."]
    parts = [f"`{config.llm.model}` judged the candidates.", counts_table(counts["languages"], "github")]
    if counts["calibration"]:
        parts += ["What it says about pairs that people judged:", calibration.table(counts["calibration"], "github")]
    return parts + [f"**Warning:** {warning}" for warning in calibration.warnings(counts["calibration"], config.judge)]


# ------------------------------------------------------------------------------------------- what others read of it


class Judged(NamedTuple):
    """A language's verdicts: {qid: {docid: (label or None, kept)}}."""

    of_query: dict[str, dict[str, tuple[int | None, bool]]]

    def join(
        self, rules: Sequence[Filter], qids: Sequence[str], docid: Callable[[int], str], judge: ConfigDict
    ) -> list[Filter]:
        """The rules, and behind them filters for what the judge found relevant, what it could not judge, and what it was
        not asked about because enough were kept before.

        Candidates of queries that were not judged pass these, and those of judged queries pass the score rules unless
        judge.score_rules.
        """
        judged_Qx1 = np.array([[qid in self.of_query] for qid in qids])

        def sparing(rule: Filter) -> Filter:
            keep = lambda candidates, context: rule.keep(candidates, context) | judged_Qx1
            return rule._replace(keep=keep)

        def dropping(name: str, drops: Callable[[tuple[int | None, bool] | None], bool]) -> Filter:
            def keep(candidates: Candidates, context: Context) -> np.ndarray:
                kept_QxK = np.ones(candidates.rows_QxK.shape, bool)
                for q, qid in enumerate(qids):
                    if qid in self.of_query:
                        for place in np.flatnonzero(candidates.rows_QxK[q] != NO_HIT):
                            row = int(candidates.rows_QxK[q, place])
                            kept_QxK[q, place] = not drops(self.of_query[qid].get(docid(row)))
                return kept_QxK

            return Filter(name, keep)

        return [
            *(rule if judge.score_rules or rule.name not in SCORE_RULES else sparing(rule) for rule in rules),
            dropping("judged relevant", lambda of: of is not None and of[0] is not None and not of[1]),
            dropping("unjudged", lambda of: of is not None and of[0] is None and not of[1]),
            dropping("not asked", lambda of: of is None),
        ]


def read(directory: pathlib.Path, lang: str) -> Judged:
    """The verdicts of a finished stage; none of a language that was not judged."""
    of_query: dict[str, dict[str, tuple[int | None, bool]]] = {}
    if not (directory / f"{lang}.jsonl").exists():
        return Judged(of_query)
    with open(directory / f"{lang}.jsonl", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            of_query.setdefault(row["query_id"], {})[row["docid"]] = row["label"], row["kept"]
    return Judged(of_query)


# ------------------------------------------------------------------------------------------------------- the dry run


def plan(
    library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, client: Client, config: ConfigDict
) -> Plan:
    """What `judge` would send now, found out by running it on assumed replies."""
    return asyncio.run(_plan(library, training, mined_dir, client, config))


async def _plan(
    library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, client: Client, config: ConfigDict
) -> Plan:
    judge_ = config.judge
    first = fewest(len(judge_.sampling), judge_.keep_max_label)
    none, some = Counter(client, _keep), Counter(client, _drop_some)
    lower: dict[str, int] = {}
    upper: dict[str, int] = {}
    for lang in progress.bar(langs(library, config), "  counting", "languages"):
        units = [
            (asked, [pair], 1, _drop if relevant else _keep)
            for asked, pair, relevant in calibration.pairs_of(lang, library, training, config)
        ]
        units += [
            (of.question, of.pairs, config.mine.negatives, None)
            for of in work_of(lang, library, training, mined_dir, config)
        ]
        for asked, pairs, wanted, assumed in units:
            for counter, usual in ((none, _keep), (some, _drop_some)):
                counter.assumed = assumed or usual
                await judge_in_order(counter, judge_, asked, pairs, wanted)
            # The walk on which every pair is kept is the shortest, and no pair settles before its first votes are in.
            shortest = Counter(client, _keep)
            verdicts = await judge_in_order(shortest, judge_, asked, pairs, wanted)
            votes = [requests(judge_, asked, pair) for pair in pairs if not pair.free]
            walked = sum(verdict.by == LLM for verdict in verdicts)
            lower |= counting.missing(client, [r for of in votes[:walked] for r in of[:first]])
            if shortest.missing:
                upper |= counting.missing(client, [r for of in votes for r in of])
    most = judge_.max_tokens
    share = f"{PAPER_DROPS:.1%} are dropped, as in the paper"
    expected = {
        "every candidate is kept": counting.ask(none.missing, most),
        share: counting.ask(some.missing, most),
    }
    return Plan(counting.ask(lower, most), expected, counting.ask(upper, most))


def _keep(request: Request) -> str:
    return ASSUMED[True]


def _drop(request: Request) -> str:
    return ASSUMED[False]


def _drop_some(request: Request) -> str:
    return ASSUMED[hashing.stable_hash("dropped", request.about) % 1000 >= 1000 * PAPER_DROPS]


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("judge", __doc__, plan=lambda recipe: recipe.plan_judge())
