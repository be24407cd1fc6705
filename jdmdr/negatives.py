"""The negatives store: versioned, id-based, one for every method; training JSONL with texts is an export of it.

    python -m jdmdr.negatives --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

    negatives/v00000/{lang}.qids.txt      one query id a line
    negatives/v00000/{lang}.rows.npy      int64 [Q, N], rows of the language's collection, best first
    negatives/v00000/{lang}.rank.npy      int32 [Q, N], rank in its list from 1; 0 for what was filled in
    negatives/v00000/{lang}.score.npy     float32 [Q, N], score of that list; NaN for what was filled in
    negatives/v00000/{lang}.source.npy    uint8 [Q, N], index into SOURCES

Version 0 is static; a run that mines again while it trains adds versions of its own (jdmdr/versions.py).
"""

from __future__ import annotations

import collections
import pathlib
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jdmdr import hashing, judge, progress
from jdmdr.corpus import Collection, passage_row, passage_text, write_jsonl
from jdmdr.filters import (
    CROSS_ENCODER,
    KEPT,
    Candidates,
    Context,
    Filter,
    answers,
    apply_filters,
    audit,
    counts_table,
    cross_encoder,
    cross_encoder_rules,
    explain,
    rules_from_config,
)
from jdmdr.library import Library, TrainingQuery, docid_lookup, used_in_training
from jdmdr.mine import Mined, candidate_pool, read_mined
from jdmdr.retrievers import Spec, parse
from jdmdr.types import NO_HIT
from jdmdr.versions import version_dir

if TYPE_CHECKING:
    from jdmdr.expand import Outcome

SOURCES = ("retrieval", "llm", "judged", "random")  # llm: found by a query that a language model wrote
RETRIEVAL, LLM, JUDGED, RANDOM = range(len(SOURCES))


class Negatives(NamedTuple):
    """Negatives of one language's training queries; places beyond the last hold `NO_HIT`."""

    rows_QxN: np.ndarray
    rank_QxN: np.ndarray  # in the list of its source
    score_QxN: np.ndarray
    source_QxN: np.ndarray


class Filler(NamedTuple):
    """A passage that a short query is filled up with."""

    source: int
    row: int
    rank: int = 0
    score: float = np.nan


class Selection(NamedTuple):
    """What the filters did to one language's candidates, and what came of it."""

    candidates: Candidates
    filters: list[Filter]
    reasons_QxK: np.ndarray  # index of the filter that dropped a candidate, KEPT or EMPTY
    negatives: Negatives
    counts: dict[str, Any]  # of candidates, per filter, and per source


def select(
    mined: Mined, ensemble: Sequence[Spec], queries: Sequence[TrainingQuery], base: int, collection: Collection, config: Any,
    rules: Sequence[Filter], seed: int, brought: Sequence[Sequence[Filler]] = (), barred: Sequence[set[int]] = (),
    draw: int = 0,
) -> Selection:  # fmt: skip
    """Filters the candidates, keeps the best of each query, or a sample of them, and fills up the short ones.

    Filling follows DMDR's stage II: what new queries brought, then passages judged not relevant, then random ones of the pool,
    never a positive, nor what the judge found relevant, and none twice. With `config.least` there is no filling but by what
    new queries brought.

    Args:
      ensemble: the retrievers of the recipe; score rules compare those of the first dense one.
      config: the recipe's `mine` keys; `rules` are its filters, the judge's among them.
      draw: numbers the samples of `mine.sample=uniform`.
      brought: a list a query, of what `jdmdr.expand` found for it; `barred` are the rows that are no random negatives of it.
    """

    def text(row: int) -> str:
        return passage_text(collection.passage(row))

    found_pool = candidate_pool(queries, base, config.pool)
    pool = range(len(collection)) if found_pool is None else found_pool
    filling = config.least is None
    count = config.negatives
    positives = [q.positives - base for q in queries]
    candidates = Candidates(mined.rows_QxK, mined.scores_QxK, *mined.dense(ensemble))
    kept, reasons_QxK, counts = apply_filters(candidates, rules, Context(positives, text))
    rank_QxK = np.take_along_axis(
        np.broadcast_to(np.arange(1, reasons_QxK.shape[1] + 1, dtype=np.int32), reasons_QxK.shape),
        np.argsort(reasons_QxK != -1, axis=1, kind="stable"), 1,
    )  # fmt: skip
    if config.sample == "uniform":
        drawn_QxK = _sample(kept.rows_QxK != NO_HIT, count, [q.qid for q in queries], seed, draw)
        kept = kept._replace(
            rows_QxK=np.take_along_axis(kept.rows_QxK, drawn_QxK, 1),
            scores_QxK=np.take_along_axis(kept.scores_QxK, drawn_QxK, 1),
        )
        rank_QxK = np.take_along_axis(rank_QxK, drawn_QxK, 1)
    shape = len(queries), count
    out = Negatives(
        np.full(shape, NO_HIT, np.int64), np.zeros(shape, np.int32), np.full(shape, np.nan, np.float32),
        np.zeros(shape, np.uint8),
    )  # fmt: skip
    width = min(count, kept.rows_QxK.shape[1])
    found = kept.rows_QxK[:, :width] != NO_HIT
    out.rows_QxN[:, :width] = kept.rows_QxK[:, :width]
    out.rank_QxN[:, :width] = np.where(found, rank_QxK[:, :width], 0)
    out.score_QxN[:, :width] = np.where(found, kept.scores_QxK[:, :width], np.nan)
    for q, query in enumerate(queries):
        never = {*positives[q].tolist(), *(barred[q] if barred else ())}
        judged = (query.judged - base)[: None if filling else 0]
        _fill(out, q, query, never, brought[q] if brought else (), judged, pool if filling else range(0), seed)
    sources = {
        name: int(((out.source_QxN == index) & (out.rows_QxN != NO_HIT)).sum()) for index, name in enumerate(SOURCES)
    }
    # pairs, because the order of the rules matters and JSON objects are written sorted
    dropped = [[name, count] for name, count in counts.items() if name != "kept"]
    candidates_found = int((mined.rows_QxK != NO_HIT).sum())
    counts = {"candidates": candidates_found, "dropped": dropped, "kept": counts["kept"], "sources": sources}
    return Selection(candidates, list(rules), reasons_QxK, out, counts)


def _sample(there_QxK: np.ndarray, count: int, qids: Sequence[str], seed: int, draw: int) -> np.ndarray:
    """Places of `count` candidates of each query, all equally likely, the better ones first; then the rest."""
    out_QxK = np.empty(there_QxK.shape, np.int64)
    for q, qid in enumerate(qids):
        found, empty = np.flatnonzero(there_QxK[q]), np.flatnonzero(~there_QxK[q])
        shuffled = hashing.rng(seed, "sampled negatives", qid, draw).permutation(found)
        out_QxK[q] = [*np.sort(shuffled[:count]), *shuffled[count:], *empty]
    return out_QxK


def _fill(
    out: Negatives, q: int, query: TrainingQuery, never: set[int], brought: Sequence[Filler], judged: np.ndarray,
    pool: np.ndarray | range, seed: int,
) -> None:  # fmt: skip
    rows_N = out.rows_QxN[q]
    place = int((rows_N != NO_HIT).sum())
    taken = {*rows_N[:place].tolist(), *never}
    judged = judged[np.argsort(hashing.hash_array(seed, f"judged {query.qid}", judged), kind="stable")]
    # so many that enough are left when all taken ones are among them
    draws = min(len(pool), len(rows_N) + len(taken)) if place < len(rows_N) else 0
    drawn = hashing.rng(seed, "random negatives", query.lang, query.qid).choice(len(pool), draws, replace=False)
    fillers = [*brought, *(Filler(JUDGED, int(row)) for row in judged), *(Filler(RANDOM, int(pool[i])) for i in drawn)]
    for filler in fillers:
        if place < len(rows_N) and filler.row not in taken:
            out.source_QxN[q, place], rows_N[place], out.rank_QxN[q, place], out.score_QxN[q, place] = filler
            taken.add(filler.row)
            place += 1


def write(directory: pathlib.Path, lang: str, qids: Sequence[str], negatives: Negatives) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for field, values in zip(("rows", "rank", "score", "source"), negatives, strict=True):
        np.save(directory / f"{lang}.{field}.npy", values)
    (directory / f"{lang}.qids.txt").write_text("".join(f"{qid}\n" for qid in qids), encoding="utf-8")


def read(directory: pathlib.Path, lang: str) -> tuple[list[str], Negatives]:
    """Query ids and negatives of a language; no ids and no rows where it has none."""
    path = directory / f"{lang}.qids.txt"
    if not path.exists():
        empty = np.zeros((0, 0))
        return [], Negatives(empty, empty, empty, empty)
    arrays = (
        np.load(directory / f"{lang}.{field}.npy", mmap_mode="r") for field in ("rows", "rank", "score", "source")
    )
    return path.read_text(encoding="utf-8").split("\n")[:-1], Negatives(*arrays)


def training_rows(
    queries: Sequence[TrainingQuery], lang: str, base: int, collection: Collection, negatives: Negatives,
    notes: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The rows of the training JSONL, texts included: the de-facto format of dense retrieval training.

    Args:
      notes: more about the negative docid of the query qid, by (qid, docid).
    """
    notes = notes or {}
    for q, query in enumerate(queries):
        places = np.flatnonzero(negatives.rows_QxN[q] != NO_HIT)
        passages = [collection.passage(int(negatives.rows_QxN[q, n])) for n in places]
        yield {
            "query_id": query.qid,
            "query": query.text,
            "lang": lang,
            "positive_passages": [passage_row(collection.passage(int(row))) for row in query.positives - base],
            "negative_passages": [
                {
                    **passage_row(passage),
                    "source": SOURCES[negatives.source_QxN[q, n]],
                    "rank": int(negatives.rank_QxN[q, n]),
                    "score": None if np.isnan(negatives.score_QxN[q, n]) else float(negatives.score_QxN[q, n]),
                    **notes.get((query.qid, passage.docid), {}),
                }
                for n, passage in zip(places, passages, strict=True)
            ],
        }


def make(
    library: Library, training: Sequence[TrainingQuery], mined_dir: pathlib.Path, outcome: Callable[[str], Outcome] | None,
    config: Any, out_dir: pathlib.Path, draw: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Selects the negatives of every language and explains the filters; returns the counts per language.

    Args:
      outcome: of the stages with a language model, for a language; None without them.
      config: the whole recipe.
      draw: numbers the samples of `mine.sample=uniform`.
    """
    ensemble = parse(config.mine.retrievers)
    compared = next((spec.name for spec in ensemble if spec.dense), None)
    totals: dict[str, Any] = {}
    names = [spec.name for spec in ensemble] + ([CROSS_ENCODER] if config.cross_encoder.name else [])
    scored: dict[str, dict[str, explain.Scored]] = {name: {} for name in names}
    sheet: list[list[str]] = []
    for index, lang in enumerate(progress.bar(library.langs, "  filtering", "languages")):
        queries = used_in_training(training, index)
        if not queries:
            continue
        collection, base, qids = library.collections[index], int(library.bases[index]), [q.qid for q in queries]
        mined = read_mined(mined_dir, lang, [spec.name for spec in ensemble])
        docid = docid_lookup(collection, [mined])
        rules = rules_from_config(config.filters.to_dict()) + answers.rules(
            config.filters.answers, lang, qids, collection
        )
        more, notes = (), None
        if config.cross_encoder.name:
            scores = cross_encoder.read(mined_dir.with_name(CROSS_ENCODER), lang)
            mined = mined._replace(by_retriever={**mined.by_retriever, CROSS_ENCODER: scores})
            rules += cross_encoder_rules(config.filters.to_dict(), cross_encoder.column(*scores))
        if outcome:
            found = outcome(lang)
            rules = found.verdicts.join(rules, qids, docid, config.judge)
            more, notes = (found.fillers(qids, collection), found.barred(qids, collection)), found.notes()
        selected = select(mined, ensemble, queries, base, collection, config.mine, rules, config.seed, *more, draw=draw)
        write(version_dir(out_dir, 0), lang, qids, selected.negatives)
        if config.mine.texts:
            rows = training_rows(queries, lang, base, collection, selected.negatives, notes)
            write_jsonl(out_dir / "train_aug" / f"{lang}.jsonl", rows)
        totals[lang] = selected.counts
        for name, (candidates_QxK, positives_QxM) in mined.by_retriever.items():
            kept_QxK = selected.reasons_QxK == KEPT
            scored[name][lang] = explain.Scored(candidates_QxK, positives_QxM, kept_QxK)
        shown = selected.candidates, selected.reasons_QxK, selected.filters, docid
        (out_dir / "dropped").mkdir(exist_ok=True)
        audit.write_drops(out_dir / "dropped" / f"{lang}.tsv", qids, *shown)
        text = lambda row, of=collection: passage_text(of.passage(row))
        sheet += audit.sample(lang, config.audit.rows, queries, base, *shown, text, config.seed)
    audit.write_sheet(out_dir / "audit.csv", audit.SHEET, sheet)
    active = judge.active_rules(config) if outcome else config.filters.to_dict()
    shown = explain.explain(scored, compared, active, out_dir)
    dropped = collections.Counter()
    for counts in totals.values():
        dropped.update({**dict(counts["dropped"]), "kept": counts["kept"]})
    progress.say(textwrap.indent(f"{shown}\n\n{counts_table(dropped)}", "  "))
    return {"languages": totals}


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("negatives", __doc__)
