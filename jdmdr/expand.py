"""Stage II of DMDR: tops up the queries that mining and judging left with fewer negatives than `mine.negatives`.

    python -m jdmdr.expand --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR \\
        --config.llm.base_url=http://localhost:8000/v1 --config.llm.model=NAME
    ... --dry_run       calls, tokens, cost and time before anything is sent; it judges first where that is not done yet

    expand/{lang}.jsonl      a row a short query: what each round wrote and found, and the negatives it brought

A language model summarises the query's positive and writes a new query from the summary; the ensemble searches with it; the
judge holds what it finds against the old query; what is kept is appended in rank order. `expand.rounds` times, then deeper in
the lists of the old query and the new ones. What is missing then, `jdmdr.negatives` fills up (DMDR, Huang et al., EMNLP 2025,
section 3.4). docs/llm.md has the rules, the keys and the cost.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import pathlib
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jdmdr import judge, mine, negatives, progress, requery, retrievers
from jdmdr.corpus import Collection, passage_text, write_jsonl
from jdmdr.filters import KEPT, Candidates, Context, Filter, apply_filters, rules_from_config
from jdmdr.judge import counts_table
from jdmdr.library import Library, TrainingQuery, used_in_training
from jdmdr.llm import Ask, Client, Plan, counting, prompts
from jdmdr.llm.client import Request
from jdmdr.llm.generate import QUERY, SUMMARISE, SUMMARY, Generated, generate
from jdmdr.llm.judging import QRELS, Asks, Pair, Verdict, judge_in_order, question_of, reference_of
from jdmdr.topup import GENERATED, RETRIEVAL, Found, Judge, Search, Short, Write, top_up
from jdmdr.types import NO_HIT, Hits


class Language:
    """One language's queries that need more negatives, and what is asked about them."""

    def __init__(
        self, lang: str, library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, judged_dir: pathlib.Path,
        config: ConfigDict,
    ):  # fmt: skip
        index = library.langs.index(lang)
        self.lang, self.config = lang, config
        self.collection, self.base = library.collections[index], int(library.bases[index])
        self.queries = used_in_training(training, index)
        self._by_qid = {q.qid: q for q in self.queries}
        self.shorts = self._shorts(mined_dir, judged_dir)

    def text(self, row: int) -> str:
        return passage_text(self.collection.passage(row))

    def _global_text(self, row: int) -> str:
        return self.text(row - self.base)

    def _shorts(self, mined_dir: pathlib.Path, judged_dir: pathlib.Path) -> list[Short]:
        c, wanted = self.config, self.config.mine.negatives
        verdicts = judge.read(judged_dir, self.lang).of_query
        kept = {qid: sum(kept for _, kept in found.values()) for qid, found in verdicts.items()}
        places = judge.chosen_of(self.queries, self.lang, c.judge.queries, c.seed)
        places = [place for place in places if kept.get(self.queries[place].qid, 0) < wanted]
        ensemble = retrievers.parse(c.mine.retrievers)
        mined = mine.read_mined(mined_dir, self.lang, [spec.name for spec in ensemble])
        candidates = Candidates(
            *(np.asarray(values)[places] for values in (mined.rows_QxK, mined.scores_QxK, *mined.dense(ensemble)))
        )
        rows_QxK = self._left(
            judge.filters_of(self.lang, self.queries, places, self.collection, mined_dir, c), candidates, places
        )
        out = []
        for place, rows_K, scores_K in zip(places, rows_QxK, candidates.scores_QxK, strict=True):
            query = self.queries[place]
            looked_at = self.collection.rows(list(verdicts.get(query.qid, {}))).tolist()
            seen = {*(query.positives - self.base).tolist(), *looked_at}
            out.append(Short(place, wanted - kept.get(query.qid, 0), seen, [Found(0, rows_K, scores_K)]))
        return out

    def _left(self, rules: Sequence[Filter], candidates: Candidates, places: Sequence[int]) -> np.ndarray:
        """The rows of the candidates that the rules leave, at their places; NO_HIT elsewhere."""
        positives = [self.queries[place].positives - self.base for place in places]
        _, reasons_QxK, _ = apply_filters(candidates, rules, Context(positives, self.text))
        return np.where(reasons_QxK == KEPT, candidates.rows_QxK, NO_HIT)

    def search(self, ask: requery.Search, pool: np.ndarray | None) -> Search:
        """The ensemble's lists for new queries, without copies of positives and what is not in the pool."""
        rules = rules_from_config({"near_duplicate": self.config.filters.near_duplicate})

        def search(shorts: Sequence[Short], texts: Sequence[str], depth: int) -> Hits:
            hits = ask(texts, depth)
            rows_QxK = hits.rows_QxK if pool is None else np.where(np.isin(hits.rows_QxK, pool), hits.rows_QxK, NO_HIT)
            unknown_Q = np.full(len(shorts), np.nan, np.float32)
            candidates = Candidates(rows_QxK, hits.scores_QxK, np.full(rows_QxK.shape, np.nan, np.float32), unknown_Q)
            return Hits(self._left(rules, candidates, [s.place for s in shorts]), hits.scores_QxK)

        return search

    def write(self, client: Asks, tokens: Callable[[str], int]) -> Write:
        async def write(short: Short, number: int) -> Generated:
            query = self.queries[short.place]
            passage = reference_of(query, self.lang, self._global_text, self.config.seed)
            if not passage:
                return Generated("", "", "no positive with a text")
            about = f"{self.lang} {query.qid}"
            return await generate(
                client, self.lang, query.text, passage, about, number, tokens, self.config.expand, self.config.seed
            )

        return write

    def judge(self, client: Asks) -> Judge:
        config = self.config.judge

        async def of(short: Short, rows: Sequence[int]) -> Sequence[Verdict]:
            query = self.queries[short.place]
            question = question_of(query, self.lang, self._global_text, self.config)
            irrelevant = set((query.judged - self.base).tolist()) if config.use_qrels else set()
            pairs = [
                Pair(docid, self.text(row), QRELS if row in irrelevant else "")
                for row, docid in zip(rows, self.collection.docids(np.array(rows)), strict=True)
            ]
            return await judge_in_order(client, config, question, pairs, short.wanted)

        return of

    def assumed(self, request: Request) -> str:
        """A usable reply to a request of this language, by which a pair is kept."""
        if request.purpose not in (SUMMARY, QUERY):
            return judge.ASSUMED[True]
        query = self._by_qid[request.about.partition(" ")[2]]
        words = reference_of(query, self.lang, self._global_text, self.config.seed).split()
        return " ".join(words)[:200] if request.purpose == SUMMARY else f"{' '.join(words[:6])[:40]} {request.vote}"

    def rows(self) -> Iterator[dict[str, Any]]:
        """What is written to the language's file."""
        for short in self.shorts:
            query = self.queries[short.place]
            docids = self.collection.docids(np.array([j.row for j in short.judged], np.int64))
            judged = [
                {
                    "docid": docid,
                    "source": j.source,
                    "round": j.number,
                    "rank": j.rank,
                    "score": j.score,
                    **j.verdict._asdict(),
                }
                for docid, j in zip(docids, short.judged, strict=True)
            ]
            yield {
                "query_id": query.qid,
                "query": query.text,
                "missing": short.missing,
                "rounds": short.rounds,
                "judged": judged,
            }


Open = Callable[[Language], contextlib.AbstractContextManager[Search]]


def expand(
    languages: Iterable[Language],
    open_search: Open,
    tokens: Callable[[str], int],
    client: Client,
    out_dir: pathlib.Path,
) -> dict[str, Any]:
    """Tops up every language and writes what came of it; a language that is written stays. Returns the counts.

    Args:
      open_search: the ensemble over the language's collection, opened where a new query may be written.
      tokens: counts those of a query.
    """
    counts: dict[str, Any] = {}
    for of in languages:
        path = out_dir / f"{of.lang}.jsonl"
        if not path.exists():
            if of.shorts:
                with _searching(of, open_search) as search:
                    top_up(
                        of.shorts,
                        of.write(client, tokens),
                        search,
                        of.judge(client),
                        client.map,
                        of.config.expand,
                        of.lang,
                    )
            write_jsonl(path, of.rows())
        counts[of.lang] = _counts(read_rows(path))
    if counts:
        progress.say(textwrap.indent(counts_table(counts), "  "))
    return {"languages": counts}


def _searching(of: Language, open_search: Open) -> contextlib.AbstractContextManager[Search | None]:
    return open_search(of) if of.config.expand.rounds else contextlib.nullcontext()


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    judged = [j for row in rows for j in row["judged"]]
    rounds = [r for row in rows for r in row["rounds"]]
    kept = collections.Counter(j["source"] for j in judged if j["kept"])
    missing = sum(row["missing"] for row in rows)
    return {
        "short queries": len(rows),
        "missing": missing,
        "rounds": len(rounds),
        "new queries": sum(not r["fault"] for r in rounds),
        "judged": len(judged),
        "from new queries": kept[GENERATED],
        "from old queries": kept[RETRIEVAL],
        "still missing": missing - kept.total(),
    }


def report(counts: Mapping[str, Any], config: ConfigDict) -> list[str]:
    """Paragraphs of Markdown about what new queries brought; `counts` are what the stage recorded."""
    table = [counts_table(counts["languages"], "github")] if counts["languages"] else []
    return [
        f"`{config.expand.model or config.llm.model}` wrote new queries for those left with fewer than {config.mine.negatives}.",
        *table,
    ]


# --------------------------------------------------------------------------------------------- what others read of it


class Outcome(NamedTuple):
    """What the stages with a language model found for the queries of a language; rows are those of their files."""

    verdicts: judge.Judged  # of stage I
    judged: list[dict[str, Any]]
    short: list[dict[str, Any]]

    def fillers(self, qids: Sequence[str], collection: Collection) -> list[list[negatives.Filler]]:
        """What the top-up brought each query, best first."""
        of_query = {row["query_id"]: [j for j in row["judged"] if j["kept"]] for row in self.short}
        out = []
        for qid in qids:
            kept = of_query.get(qid, [])
            rows = collection.rows([j["docid"] for j in kept]).tolist()
            out.append(
                [
                    negatives.Filler(negatives.SOURCES.index(j["source"]), row, j["rank"], j["score"])
                    for row, j in zip(rows, kept, strict=True)
                ]
            )
        return out

    def barred(self, qids: Sequence[str], collection: Collection) -> list[set[int]]:
        """Of each query the passages that answer it, for all the judge knows."""
        docids: dict[str, list[str]] = {qid: [] for qid in qids}
        for qid, row in self._rows():
            if row["label"] is not None and not row["kept"]:
                docids[qid].append(row["docid"])
        return [set(collection.rows(docids[qid]).tolist()) for qid in qids]

    def notes(self) -> dict[tuple[str, str], dict[str, Any]]:
        """For the training rows, by query and passage: label and votes, and the new query that a passage comes from."""
        written = {row["query_id"]: {r["round"]: r["generated_query"] for r in row["rounds"]} for row in self.short}
        notes = {}
        for qid, row in self._rows():
            new = {"round": row["round"], "generated_query": written[qid][row["round"]]} if row.get("round") else {}
            notes[qid, row["docid"]] = {"label": row["label"], "by": row["by"], "votes": row["votes"], **new}
        return notes

    def _rows(self) -> Iterator[tuple[str, dict[str, Any]]]:
        yield from ((row["query_id"], row) for row in self.judged)
        yield from ((row["query_id"], judged) for row in self.short for judged in row["judged"])


def read(judged_dir: pathlib.Path, directory: pathlib.Path, lang: str) -> Outcome:
    """What the finished stages wrote; nothing of a language that was not judged."""
    paths = [home / f"{lang}.jsonl" for home in (judged_dir, directory)]
    return Outcome(judge.read(judged_dir, lang), *([*read_rows(path)] if path.exists() else [] for path in paths))


# --------------------------------------------------------------------------------------------------------- the dry run


def plan(
    languages: Sequence[Language], open_search: Open, tokens: Callable[[str], int], client: Client, config: ConfigDict
) -> Plan:
    """What `expand` would send now: found out by running it, searches included, on assumed replies."""
    lower, upper = Ask(0, 0, 0), Ask(0, 0, 0)
    counter = counting.Counter(client, lambda request: "")
    for of in languages:
        for short in of.shorts:
            least, most = _bounds(of, short, tokens, client)
            lower, upper = _sum(lower, least), _sum(upper, most)
        counter.assumed = of.assumed
        if of.shorts:
            with _searching(of, open_search) as search:
                top_up(
                    of.shorts, of.write(counter, tokens), search, of.judge(counter), _one_by_one, config.expand, of.lang
                )
    most = max(config.expand.summary_tokens, config.expand.query_tokens, config.judge.max_tokens)
    expected = {"every new query is usable and all that it finds irrelevant": counting.ask(counter.missing, most)}
    return Plan(lower._replace(most_reply_tokens=most), expected, upper._replace(most_reply_tokens=most))


def _bounds(of: Language, short: Short, tokens: Callable[[str], int], client: Client) -> tuple[Ask, Ask]:
    """The fewest and the most calls that are still to be sent for one query."""
    c, judge_, text = of.config.expand, of.config.judge, of.queries[short.place].text
    # An unusable summary asks for no query, but for another summary where a round is left.
    first = counting.Counter(client, of.assumed if c.rounds > 1 else lambda request: "")
    known = 0
    for number in range(1, c.rounds + 1):
        generated = asyncio.run(of.write(first, tokens)(short, number))
        if first.missing:
            break
        known += 1
        if not generated.fault:  # what comes behind depends on the judge
            break
    writing, votes = 2 * (c.rounds - known), len(judge_.sampling)
    old_K = short.lists[0].rows_K[: c.depths[-1] if len(c.depths) > 1 else 0]
    pairs = len(set(old_K[old_K != NO_HIT].tolist()) - short.seen) + c.rounds * c.depths[-1]
    pairs = min(pairs, len(of.collection) - len(short.seen))
    most_bytes = lambda empty, chars: sum(len(m["content"].encode()) for m in empty) + 4 * (len(text) + chars)
    pair_bytes = most_bytes(prompts.judge("", "", "", 0), 2 * judge_.passage_chars)
    write_bytes = most_bytes([{"content": SUMMARISE}], c.passage_chars)
    return counting.ask(first.missing, 0), Ask(
        writing + pairs * votes, writing * write_bytes + pairs * votes * pair_bytes, 0
    )


def _one_by_one(work: Callable[[Any], Any], items: Sequence[Any], what: str) -> list[Any]:
    async def every() -> list[Any]:
        return [await work(item) for item in items]

    return asyncio.run(every())


def _sum(one: Ask, other: Ask) -> Ask:
    return Ask(*(a + b for a, b in zip(one, other, strict=True)))


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("expand", __doc__, plan=lambda recipe: recipe.plan_expand())
