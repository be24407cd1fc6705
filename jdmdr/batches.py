"""The batch of a step: its queries from the planner, its passages, tokens, masks and weights; and the grain pipeline."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jdmdr import maxp
from jdmdr import shapes as fixed
from jdmdr.hashing import hash_array, mix64, stable_hash
from jdmdr.planner import Plan, Planner
from jdmdr.types import UserError
from jdmdr.weights import Weights, beta_of_batch

# Room for known positives of one query that meet in one batch; beyond it they would count as negatives.
MAX_KNOWN_POSITIVES = 32


class Ragged(NamedTuple):
    """One list of integers per row: `values[offsets[i]:offsets[i + 1]]`."""

    offsets: np.ndarray  # int64, rows + 1
    values: np.ndarray  # int64

    @classmethod
    def of(cls, lists: Iterable[Sequence[int]]) -> Ragged:
        arrays = [np.asarray(row, np.int64) for row in lists]
        offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
        return cls(offsets, np.concatenate([np.empty(0, np.int64), *arrays]))

    def counts(self, rows: np.ndarray) -> np.ndarray:
        return self.offsets[rows + 1] - self.offsets[rows]

    def flat(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values of these rows behind one another; the index into `rows` and the place in its list of each."""
        counts = self.counts(rows)
        owner = np.repeat(np.arange(len(rows)), counts)
        place = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
        return self.values[self.offsets[rows][owner] + place], owner, place


class Taught(NamedTuple):
    """What a teacher says of a training set: its vectors, float32, of queries by index and of passages by row."""

    queries: Callable[[np.ndarray], np.ndarray] | None  # None where it reads passages alone
    passages: Callable[[np.ndarray], np.ndarray]


class TrainingSet(NamedTuple):
    """n training queries; passages are global rows (the languages' collections one after another).

    `passage_topic` is by global row; None lets a passage inherit the topic of its query. Row i of `queries` is query i.
    `passages` may be their chunks (jdmdr/maxp.py).
    Where `passages` holds altered copies of passages, `passage_row` gives the global row of each and the other fields
    name copies: two copies of one passage are the same passage to the loss.
    """

    lang_n: np.ndarray  # int32
    topic_n: np.ndarray  # int32
    positives: Ragged
    negatives: Ragged
    passage_topic: np.ndarray | None
    queries: fixed.TokenSource
    passages: fixed.TokenSource
    passage_row: np.ndarray | None = None
    taught: Taught | None = None


class BatchShapes(NamedTuple):
    """Everything that fixes the shapes of a batch; `len(profiles)` of them exist."""

    profiles: tuple[fixed.Profile, ...]
    sides: tuple[fixed.Side, fixed.Side]  # queries and passages
    positives_width: int


def choose_passages(
    query_index_B: np.ndarray,
    epoch: int | np.ndarray,
    positives: Ragged,
    negatives: Ragged,
    passages_per_query: int,
    seed: int,
) -> np.ndarray:
    """Passage rows of each query, B x P, int64: its positive of this epoch (a number or one per query), then negatives.

    Positives take turns. K = P - 1 negatives are a window that moves by K each epoch over the query's own shuffle of
    its list, so all are seen in turn; a list shorter than K is drawn from with replacement.

    Raises:
      UserError: a query has no positive, or no negative while P > 1.
    """
    B, K = len(query_index_B), passages_per_query - 1
    if K < 0:
        return np.empty((B, 0), np.int64)
    epoch_B = np.broadcast_to(np.asarray(epoch, np.int64), B)
    hash_B = hash_array(seed, "passages of a query", query_index_B)
    _require_lists(positives, negatives, query_index_B, passages_per_query)
    counts_B = positives.counts(query_index_B)
    turn_B = ((hash_B % counts_B.astype(np.uint64)).astype(np.int64) + epoch_B) % counts_B
    positive_B = positives.values[positives.offsets[query_index_B] + turn_B]
    if K == 0:
        return positive_B[:, None]
    values, owner, place = negatives.flat(query_index_B)
    shuffled = values[np.lexsort((mix64(hash_B[owner] + place.astype(np.uint64)), owner))]
    counts_Bx1 = negatives.counts(query_index_B)[:, None]
    first_Bx1 = np.cumsum(counts_Bx1, axis=0) - counts_Bx1
    turn_BxK = epoch_B[:, None] * K + np.arange(K)
    draw_BxK = mix64(~hash_B[:, None] + turn_BxK.astype(np.uint64)) % counts_Bx1.astype(np.uint64)
    place_BxK = np.where(counts_Bx1 < K, draw_BxK.astype(np.int64), turn_BxK % counts_Bx1)
    return np.concatenate([positive_B[:, None], shuffled[first_Bx1 + place_BxK]], axis=1)


def check_training_set(training_set: TrainingSet, passages_per_query: int) -> None:
    """Raises the `UserError` of `choose_passages` before training instead of in its middle."""
    _require_lists(
        training_set.positives, training_set.negatives, np.arange(len(training_set.lang_n)), passages_per_query
    )


def plan_shapes(
    sources: Sequence[tuple[TrainingSet, Planner]],
    *,
    batch_size: int,
    passages_per_query: int,
    seed: int,
    chunk_rows: int,
    devices: int,
    query_max_length: int,
    passage_max_length: int,
    width_multiple: int = 16,
    max_profiles: int = 4,
    grad_cache: int = 0,
    pads: bool = True,
    sample: int = 64,
) -> BatchShapes:
    """Fixes the shapes before training, from `sample` batches spread over the first epoch of each source.

    Args:
      chunk_rows, grad_cache, pads: see `shapes.make_side`.
    """
    query_lengths, passage_lengths = [], []
    for training_set, planner in sources:
        for step in np.unique(np.linspace(0, planner.steps_before(1) - 1, sample).astype(int)).tolist():
            plan, rows_N = _rows(training_set, planner, step, passages_per_query, seed)
            query_lengths.append(training_set.queries.lengths(plan.index_B))
            passage_lengths.append(training_set.passages.lengths(_sequences(training_set, rows_N)))

    side = functools.partial(fixed.make_side, chunk_rows=chunk_rows, grad_cache=grad_cache, devices=devices, pads=pads)
    sides = side(batch_size, query_max_length), side(len(passage_lengths[0]), passage_max_length)
    profiles = fixed.plan_profiles(
        np.stack(query_lengths),
        np.stack(passage_lengths),
        sides,
        width_multiple=width_multiple,
        max_profiles=max_profiles,
    )
    most = max(int(np.diff(training_set.positives.offsets).max()) for training_set, _ in sources)
    return BatchShapes(profiles, sides, min(most, MAX_KNOWN_POSITIVES))


def make_batch(
    training_set: TrainingSet,
    planner: Planner,
    step: int,
    *,
    passages_per_query: int,
    seed: int,
    shapes: BatchShapes,
    weights: Weights,
    own: fixed.OwnRows | None = None,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The global batch of a step and figures to log about it; a pure function, NumPy only.

    Every process plans the whole batch; of its tokens it reads the rows that `own` names (`shapes.Side.pack`).

    Returns:
      queries, passages: `shapes.Packed` of B queries and N = B * P passages, in plan order (row i * P is query i's
        positive).
      target_B: int32, the column of each query's positive.
      passage_ids_N: int32, global rows; first_N: bool, whether no earlier column holds the same passage.
      positive_ids_BxM: int32, the known positives of each query among these passages, padded with -1; in a batch of
        queries alone (P = 0) all that there are.
      lang_B: int32, the language of each query.
      weight_N, query_weight_B: float32, alpha[language] + beta[language][topic] of each passage and query.
      query_index_B: int32.
      has_text_NxC: bool, of passages in chunks, which are then N * C sequences, those of a passage behind one another.
      teacher_q_BxE, teacher_p_NxE: float32, of a training set with a teacher; the first where that reads queries.
    """
    plan, rows_N = _rows(training_set, planner, step, passages_per_query, seed)
    lang_B, topic_B = training_set.lang_n[plan.index_B], training_set.topic_n[plan.index_B]
    lang_N = np.repeat(lang_B, passages_per_query)
    inherited = training_set.passage_topic is None
    topic_N = np.repeat(topic_B, passages_per_query) if inherited else training_set.passage_topic[rows_N]
    beta_LxC = beta_of_batch(weights, topic_B)
    target_B = np.arange(len(plan.index_B), dtype=np.int32) * passages_per_query
    identity = _identity(training_set)
    ids_N = identity(rows_N)
    first_N = np.zeros(len(rows_N), bool)
    first_N[np.unique(ids_N, return_index=True)[1]] = True

    sequences = _sequences(training_set, rows_N)
    lengths = training_set.queries.lengths(plan.index_B), training_set.passages.lengths(sequences)
    profile = fixed.cheapest(shapes.profiles, *lengths, shapes.sides)
    query_side, passage_side = shapes.sides
    queries = query_side.pack(training_set.queries, plan.index_B, profile.query_widths, own)
    passages = passage_side.pack(training_set.passages, sequences, profile.passage_widths, own)
    tokens = sum(int(np.minimum(of, side.max_length).sum()) for of, side in zip(lengths, shapes.sides, strict=True))
    batch = {
        "queries": queries,
        "passages": passages,
        "target_B": target_B,
        "passage_ids_N": ids_N.astype(np.int32),
        "first_N": first_N,
        "positive_ids_BxM": _known_positives(
            training_set, plan.index_B, ids_N if passages_per_query else None, shapes.positives_width
        ),
        "lang_B": lang_B.astype(np.int32),
        "weight_N": weights.alpha_L[lang_N] + beta_LxC[lang_N, topic_N],
        "query_weight_B": weights.alpha_L[lang_B] + beta_LxC[lang_B, topic_B],
        "query_index_B": plan.index_B.astype(np.int32),
    }
    if isinstance(training_set.passages, maxp.Chunked):
        batch[maxp.BATCH_KEY] = training_set.passages.has_text(rows_N)
    if training_set.taught:
        batch["teacher_p_NxE"] = training_set.taught.passages(rows_N)
        if training_set.taught.queries:
            batch["teacher_q_BxE"] = training_set.taught.queries(plan.index_B)
    figures = {"epoch": plan.epoch, "lang": plan.lang, "padding_share": fixed.padding_share(tokens, queries, passages)}
    return batch, figures


def interleave(step: int, shares: Sequence[float], seed: int) -> tuple[int, int]:
    """Which source a step draws from, and the number of that step within the source.

    After any number of steps each source is within one step of its share (two sources; for more, within one of its
    share of what the sources before it leave).
    """
    for source in range(len(shares) - 1):
        share = shares[source] / sum(shares[source:])
        phase = stable_hash(seed, "interleave", source) % 1024 / 1024
        drawn, after = (int(s * share + phase) for s in (step, step + 1))
        if after > drawn:
            return source, drawn
        step -= drawn
    return len(shares) - 1, step


def batch_iterator(
    make: Callable[[int], Any], start_step: int, stop_step: int, threads: int = 1, prefetch: int = 2
) -> grain.DatasetIterator:
    """Yields make(start_step) .. make(stop_step - 1), made ahead in threads.

    Its whole state is the next step: `get_state()` gives `{"next_index": step}`, `set_state` seeks.
    """
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    iterator = iter(grain.MapDataset.source(range(stop_step)).map(make).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator


def _rows(
    training_set: TrainingSet, planner: Planner, step: int, passages_per_query: int, seed: int
) -> tuple[Plan, np.ndarray]:
    plan = planner.plan(step)
    rows_BxP = choose_passages(
        plan.index_B, plan.visit_B, training_set.positives, training_set.negatives, passages_per_query, seed
    )
    return plan, rows_BxP.reshape(-1)


def _sequences(training_set: TrainingSet, rows_N: np.ndarray) -> np.ndarray:
    """The sequences of `passages` that make up these passages."""
    chunked = isinstance(training_set.passages, maxp.Chunked)
    return training_set.passages.of(rows_N).ravel() if chunked else rows_N


def _identity(training_set: TrainingSet) -> Callable[[np.ndarray], np.ndarray]:
    """Rows of `passages` -> global rows."""
    return (lambda rows: rows) if training_set.passage_row is None else training_set.passage_row.__getitem__


def _known_positives(
    training_set: TrainingSet, index_B: np.ndarray, ids_N: np.ndarray | None, width: int
) -> np.ndarray:
    """Known positives of each query that are among `ids_N` (None: all), int32 B x width; the target's own is one."""
    values, owner, _ = training_set.positives.flat(index_B)
    values = _identity(training_set)(values)
    if ids_N is not None:
        here = np.isin(values, ids_N)
        values, owner = values[here], owner[here]
    counts_B = np.bincount(owner, minlength=len(index_B))
    place = np.arange(len(owner)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    known_BxM = np.full((len(index_B), width), -1, np.int32)
    fits = place < width
    known_BxM[owner[fits], place[fits]] = values[fits]
    return known_BxM


def _require_lists(positives: Ragged, negatives: Ragged, index_B: np.ndarray, passages_per_query: int) -> None:
    needed = [(positives, "positive passage", "remove them from the training files")]
    if passages_per_query > 1:
        needed.append((negatives, "negative passage", "mine negatives first or set passages_per_query to 1"))
    for lists, what, remedy in needed:
        lacking = lists.counts(index_B) == 0
        if lacking.any():
            raise UserError(
                f"{lacking.sum()} of {len(index_B)} training queries have no {what} (the first is number "
                f"{index_B[lacking.argmax()]}, from 0); {remedy}."
            )
