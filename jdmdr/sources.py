"""Training sources: the artefacts of a working directory as `TrainingSet`s, and batches drawn from them by step."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdmdr import batches, negatives
from jdmdr.batches import Ragged, TrainingSet
from jdmdr.cloze import inverse_cloze
from jdmdr.hashing import hash_array
from jdmdr.library import TRAIN, Library, TrainingQuery
from jdmdr.planner import Planner
from jdmdr.refresh import Refresh
from jdmdr.shapes import OwnRows
from jdmdr.tokenizer import Tokenizer, TokenStore, write_tokens
from jdmdr.types import NO_HIT, Tokens, UserError
from jdmdr.weights import make_weights
from jdmdr.workdir import write_text


class Selected(NamedTuple):
    """Some rows of a token store, renumbered from 0."""

    store: TokenStore
    rows: np.ndarray

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        return self.store.lengths(self.rows[rows])

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        return self.store.gather(self.rows[rows], width)


class Stores(NamedTuple):
    """The token stores of a working directory."""

    passages: TokenStore
    queries: TokenStore  # of split `train`


def open_stores(tokens: pathlib.Path, library: Library, vocab_size: int) -> Stores:
    return Stores(
        TokenStore(tokens / "passages", library.langs, vocab_size),
        TokenStore(tokens / f"queries.{TRAIN}", library.langs, vocab_size),
    )


def pairs(training: Sequence[TrainingQuery], stores: Stores) -> TrainingSet:
    """Training queries with their positives and no hard negatives."""
    used = [q for q in training if not q.held_out]
    return TrainingSet(
        lang_n=np.array([q.lang for q in used], np.int32),
        topic_n=np.zeros(len(used), np.int32),
        positives=Ragged.of(q.positives for q in used),
        negatives=Ragged.of([] for _ in used),
        passage_topic=None,
        queries=Selected(stores.queries, np.array([q.row for q in used])),
        passages=stores.passages,
    )


def labelled(
    training: Sequence[TrainingQuery], stores: Stores, library: Library, version: pathlib.Path | None, topics: np.ndarray,
    inherit: bool,
) -> TrainingSet:  # fmt: skip
    """The pairs with the topics of queries (their first positive's) and passages, and with the negatives of a version of
    the store; None for an objective that finds its own."""
    used = [q for q in training if not q.held_out]
    found = pairs(training, stores)._replace(
        topic_n=topics[np.array([q.positives[0] for q in used])].astype(np.int32),
        passage_topic=None if inherit else topics,
    )
    if version is None:
        return found
    return found._replace(negatives=mined_negatives(used, library, version))


def with_negatives(
    training: Sequence[TrainingQuery], library: Library, version: pathlib.Path, least: int
) -> list[TrainingQuery]:
    """The training queries but for those to be trained on that have fewer than `least` negatives in a version of the store.

    Raises UserError where none is left.
    """
    used = [q for q in training if not q.held_out]
    found = mined_negatives(used, library, version)
    short = {(q.lang, q.qid) for q, count in zip(used, np.diff(found.offsets), strict=True) if count < least}
    if len(short) == len(used):
        raise UserError(f"mine.least is {least}, and no training query has so many negatives; lower it, or mine deeper")
    return [q for q in training if (q.lang, q.qid) not in short]


def mined_negatives(used: Sequence[TrainingQuery], library: Library, version: pathlib.Path) -> Ragged:
    """The negatives of the training queries in a version of the store, as global rows; KeyError where a query lacks."""
    mined: dict[tuple[int, str], np.ndarray] = {}
    for index, lang in enumerate(library.langs):
        qids, stored = negatives.read(version, lang)
        for qid, rows in zip(qids, np.asarray(stored.rows_QxN), strict=True):
            mined[index, qid] = rows[rows != NO_HIT] + library.bases[index]
    return Ragged.of(mined[q.lang, q.qid] for q in used)


def cloze(directory: pathlib.Path, library: Library, vocab_size: int) -> TrainingSet:
    """Inverse-cloze pairs, as `write_cloze` left them; passages are those without their pseudo query."""
    return _written(directory, library, vocab_size, library.bases[:-1])


def weak(directory: pathlib.Path, library: Library, vocab_size: int) -> TrainingSet:
    """Weak pairs, as `section_pairs.write_training` left them; no section is a passage of the library."""
    return _written(directory, library, vocab_size, [library.bases[-1]] * len(library.langs))


def _written(
    directory: pathlib.Path, library: Library, vocab_size: int, bases: Sequence[int]
) -> TrainingSet:  # fmt: skip
    """Pairs of queries and passages in token stores of their own; `LANG.rows.npy` plus the language's base tell which passages
    are the same."""
    rows = [np.load(directory / f"{lang}.rows.npy") + base for lang, base in zip(library.langs, bases, strict=True)]
    lang_n = np.repeat(np.arange(len(rows), dtype=np.int32), [len(r) for r in rows])
    return TrainingSet(
        lang_n=lang_n,
        topic_n=np.zeros(len(lang_n), np.int32),
        positives=Ragged(np.arange(len(lang_n) + 1), np.arange(len(lang_n))),
        negatives=Ragged.of([] for _ in lang_n),
        passage_topic=None,
        queries=TokenStore(directory / "queries", library.langs, vocab_size),
        passages=TokenStore(directory / "passages", library.langs, vocab_size),
        passage_row=np.concatenate(rows),
    )


def write_cloze(
    library: Library, index: int, most: int, seed: int, directory: pathlib.Path,
    query_tokenizer: Tokenizer, passage_tokenizer: Tokenizer,
) -> None:  # fmt: skip
    """Makes the inverse-cloze pairs of one language from at most `most` of its passages."""
    lang, collection = library.langs[index], library.collections[index]
    chosen = np.sort(np.argsort(hash_array(seed, f"cloze {lang}", np.arange(len(collection))), kind="stable")[:most])
    pairs_ = list(inverse_cloze((int(row), collection.passage(int(row))) for row in chosen))
    lines = (f"{collection.docid(pair.row)}\t{' '.join(pair.query.split())}\n" for pair in pairs_)
    write_text(directory / f"{lang}.tsv", "".join(lines))
    np.save(directory / f"{lang}.rows.npy", np.array([pair.row for pair in pairs_], np.int64))
    write_tokens(query_tokenizer, (pair.query for pair in pairs_), directory / "queries", lang)
    write_tokens(passage_tokenizer, (pair.passage for pair in pairs_), directory / "passages", lang)


def cloze_pairs(directory: pathlib.Path, lang: str) -> int:
    """How many pairs `write_cloze` made."""
    return len(np.load(directory / f"{lang}.rows.npy"))


class Source(NamedTuple):
    """Where a share of the steps draws its batches from."""

    training_set: TrainingSet
    share: float
    passages_per_query: int
    refresh: Refresh | None = None  # whose negatives stand in for the training set's


def batch_maker(
    sources: Sequence[Source], section: Any, weights: Any, lengths: tuple[int, int], devices: int, seed: int,
    langs: int, topics: int, pads: bool = True, own: OwnRows | None = None,
) -> tuple[Callable[[int], tuple[dict, dict]], int, str]:  # fmt: skip
    """The function step -> (batch, figures to log) over `sources`, a pure function of the step; `own` as in `make_batch`.

    `pads` is true of an encoder that not `attention.packs`. Returns it with the number of batch shapes it can give and a sentence on what a
    query sees.
    """
    if section.batch_size % devices:
        raise UserError(f"batch_size is {section.batch_size}, not a multiple of the {devices} devices")
    settings = {key: weights[key] for key in ("a", "b", "gamma_a", "gamma_b", "sign", "topic_scope")}
    planned = []
    for s in sources:
        batches.check_training_set(s.training_set, s.passages_per_query)
        labels = s.training_set.lang_n, s.training_set.topic_n
        planner = Planner(*labels, section.batch_size, seed, section.policy, section.lang_temp)
        shapes = batches.plan_shapes(
            [(s.training_set, planner)], batch_size=section.batch_size, passages_per_query=s.passages_per_query,
            seed=seed, chunk_rows=section.chunk_rows, devices=devices, query_max_length=lengths[0],
            passage_max_length=lengths[1], max_profiles=section.max_profiles, pads=pads,
            grad_cache=section.grad_cache,
        )  # fmt: skip
        planned.append((s, planner, shapes, make_weights(*labels, langs, topics, **settings)))

    def make(step: int) -> tuple[dict, dict]:
        index, own_step = batches.interleave(step, [s.share for s in sources], seed)
        source, planner, shapes, tables = planned[index]
        training_set = source.training_set
        if source.refresh:
            training_set = training_set._replace(negatives=source.refresh.negatives())
        batch, figures = batches.make_batch(
            training_set, planner, own_step, passages_per_query=source.passages_per_query, seed=seed,
            shapes=shapes, weights=tables, own=own,
        )  # fmt: skip
        if source.refresh:
            figures |= source.refresh.figures(step)
        return batch, {**figures, "source": index}

    hard = sources[0].passages_per_query - 1
    others = (section.batch_size - 1) * (hard + 1)
    sentence = f"each query sees 1 positive, {hard} hard negatives and {others} in-batch passages"
    if section.objective.name == "pairwise" and section.objective.negatives == "query":
        sentence = f"each query sees 1 positive and {hard} hard negatives of its own"
    if hard < 0:
        sentence = f"each query sees the {section.objective.top_k} passages that it retrieves in the step"
    return make, sum(len(shapes.profiles) for _, _, shapes, _ in planned), sentence


def shares(
    source: Source, section: Any, seed: int, langs: Sequence[str], topic_names: Sequence[str]
) -> dict[str, dict[str, list[float]]]:
    """{"language_shares" | "topic_shares": {label: [share the policy aims at, share in the batches planned]}} of a source's
    queries.

    Counted over the steps that the source gets, 2000 of them at most.
    """
    labels = source.training_set.lang_n, source.training_set.topic_n
    planner = Planner(*labels, section.batch_size, seed, section.policy, section.lang_temp)
    steps = min(max(1, round(section.steps * source.share)), 2000)
    expected, realised = planner.expected_shares(), planner.realised_shares(0, steps)
    named = {"language_shares": (langs, 0), "topic_shares": (topic_names, 1)}
    return {
        key: {
            label: [round(float(wanted), 4), round(float(had), 4)]
            for label, wanted, had in zip(names, expected[part], realised[part], strict=False)
        }
        for key, (names, part) in named.items()
    }
