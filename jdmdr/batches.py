"""Batch planning: who is in the batch of a step, as a pure function of (labels, seed, step).

Languages and topics are balanced by plan: every global batch holds one language (its passages are everybody's
negatives) and close to that language's mix of topics, and every query is used once per pass.

Source: Huang et al., "Boosting Data Utilization for Multilingual Dense Retrieval" (EMNLP 2025), section 3.5, for
monolingual, topic-balanced batches; the stratified order is this project's way to get them.
"""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from jdmdr import shapes as fixed
from jdmdr.hashing import hash_array, mix64, stable_hash
from jdmdr.types import Passage, UserError
from jdmdr.weights import Weights, beta_of_batch

# policy -> (one language per batch, order of a language's queries within a pass)
POLICIES = {
    "stratified": (True, "stratified"),
    "round_robin": (True, "round_robin"),
    "uniform": (True, "uniform"),
    "language_only": (True, "shuffled"),
    "topic_only": (False, "stratified"),
    "random": (False, "shuffled"),
}
MIXED = -1  # "language" of a batch that may hold several
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


class TrainingSet(NamedTuple):
    """n training queries; passages are global rows (the languages' collections one after another).

    `passage_topic` is by global row; None lets a passage inherit the topic of its query. Row i of `queries` is query i.
    """

    lang_n: np.ndarray  # int32
    topic_n: np.ndarray  # int32
    positives: Ragged
    negatives: Ragged
    passage_topic: np.ndarray | None
    queries: fixed.TokenSource
    passages: fixed.TokenSource


class Plan(NamedTuple):
    """Who is in a batch. `visit_B` counts how often the plan has come by each query before (its pass)."""

    lang: int  # or MIXED
    epoch: int
    index_B: np.ndarray  # int64
    visit_B: np.ndarray  # int64


class Shares(NamedTuple):
    """Shares of the languages and topics among query slots; each sums to 1."""

    lang_L: np.ndarray
    topic_C: np.ndarray


class BatchShapes(NamedTuple):
    """Everything that fixes the shapes of a batch; `len(profiles)` of them exist."""

    profiles: tuple[fixed.Profile, ...]
    positives_width: int


class Planner:
    """Batches of query indices by step.

    Each language has one endless stream: its queries in a new order every pass, one pass after another, cut into
    batches of B. What does not fill a batch thus opens the next pass. An epoch is the smallest number of passes in
    which the largest language fills a batch (1 unless the data is tiny); it takes the batches that its passes complete,
    shuffled over the languages.

    Args:
      lang_n, topic_n: labels (>= 0) of the n training queries.
      batch_size: B, queries in the global batch.
      policy: "stratified" spreads each topic evenly over a pass; "round_robin" takes topics in turn while they last;
        "uniform" gives every topic the same number of slots, drawn with replacement; "language_only" ignores topics;
        "topic_only" (stratified) and "random" mix the languages.
      lang_temp: batches of a language are proportional to its share of queries to this power; below 1 small languages
        are repeated and large ones are stretched over several epochs.

    Raises:
      UserError: no queries, an unknown policy, or `lang_temp` with a policy that mixes languages.
    """

    def __init__(
        self,
        lang_n: np.ndarray,
        topic_n: np.ndarray,
        batch_size: int,
        seed: int,
        policy: str = "stratified",
        lang_temp: float = 1.0,
    ):
        if policy not in POLICIES:
            raise UserError(f"batches.policy is {policy!r}; choose one of {', '.join(POLICIES)}.")
        if not len(lang_n):
            raise UserError("There is no training query to plan batches from; check the training files.")
        monolingual, self._order = POLICIES[policy]
        if lang_temp != 1 and not monolingual:
            raise UserError(f"batches.lang_temp is {lang_temp} but policy {policy!r} mixes languages; set it to 1.")
        self._lang_n, self._topic_n = np.asarray(lang_n), np.asarray(topic_n)
        self._batch_size, self._seed = batch_size, seed
        groups = np.unique(lang_n).tolist() if monolingual else [MIXED]
        self._langs = np.array(groups)
        self._members = [
            np.flatnonzero(self._lang_n == lang) if monolingual else np.arange(len(lang_n)) for lang in groups
        ]
        sizes_L = np.array([len(members) for members in self._members], np.int64)
        slots_L = _largest_remainder(sizes_L.astype(np.float64) ** lang_temp, int(sizes_L.sum()))
        passes = -(-batch_size // int(slots_L.max()))
        self._slots_L = slots_L * passes  # query slots per epoch
        cached_passes = int((-(-self._slots_L // sizes_L) + 1).sum())
        self._pass = functools.lru_cache(cached_passes)(self._make_pass)
        self._epoch = functools.lru_cache(1)(self._make_epoch)

    def plan(self, step: int) -> Plan:
        """Who is in the batch of this step."""
        epoch = self.epoch_of(step)
        group_S, batch_S = self._epoch(epoch)
        slot = step - self.steps_before(epoch)
        group, batch = int(group_S[slot]), int(batch_S[slot])
        if self._order == "uniform":
            index_B, visit_B = self._uniform(group, batch), np.full(self._batch_size, batch)
        else:
            position_B = batch * self._batch_size + np.arange(self._batch_size)
            visit_B, place_B = np.divmod(position_B, len(self._members[group]))
            passes = range(int(visit_B[0]), int(visit_B[-1]) + 1)
            index_B = np.concatenate([self._pass(group, p)[place_B[visit_B == p]] for p in passes])
        return Plan(int(self._langs[group]), epoch, index_B, visit_B)

    def batch_indices(self, step: int) -> np.ndarray:
        """Indices of the B queries of this step, int64."""
        return self.plan(step).index_B

    def epoch_of(self, step: int) -> int:
        """The epoch this step belongs to."""
        # An epoch may be short of its slots by less than one batch a language.
        beyond = (step + len(self._langs)) * self._batch_size // int(self._slots_L.sum()) + 2
        return bisect.bisect_right(range(beyond), step, key=self.steps_before) - 1

    def steps_before(self, epoch: int) -> int:
        """Number of steps in the epochs before this one; `steps_before(10)` is the length of ten epochs."""
        return int(self._batches_before(epoch).sum())

    def expected_shares(self) -> Shares:
        """The shares the policy aims at."""
        lang_L, topic_C = np.zeros(self._lang_n.max() + 1), np.zeros(self._topic_n.max() + 1)
        for members, slots in zip(self._members, self._slots_L, strict=True):
            share = slots / self._slots_L.sum()
            topics_C = np.bincount(self._topic_n[members], minlength=len(topic_C))
            weight_C = topics_C > 0 if self._order == "uniform" else topics_C
            lang_L += share * np.bincount(self._lang_n[members], minlength=len(lang_L)) / len(members)
            topic_C += share * weight_C / weight_C.sum()
        return Shares(lang_L, topic_C)

    def realised_shares(self, start: int, stop: int) -> Shares:
        """The shares in the batches of steps start .. stop - 1."""
        index = np.concatenate([self.batch_indices(step) for step in range(start, stop)])
        counts = (np.bincount(labels[index], minlength=labels.max() + 1) for labels in (self._lang_n, self._topic_n))
        return Shares(*(count / len(index) for count in counts))

    def _batches_before(self, epoch: int) -> np.ndarray:
        return epoch * self._slots_L // self._batch_size

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        first_L, stop_L = self._batches_before(epoch), self._batches_before(epoch + 1)
        group_S = np.repeat(np.arange(len(first_L)), stop_L - first_L)
        batch_S = np.concatenate([np.arange(*bounds) for bounds in zip(first_L, stop_L, strict=True)])
        order_S = np.argsort(hash_array(self._seed, f"epoch {epoch}", np.arange(len(group_S))))
        return group_S[order_S], batch_S[order_S]

    def _make_pass(self, group: int, number: int) -> np.ndarray:
        """The queries of a language in the order of one pass."""
        purpose = f"pass {number} of language {self._langs[group]}"
        members = self._members[group]
        shuffle = hash_array(self._seed, purpose, members)
        if self._order == "shuffled":
            return members[np.argsort(shuffle)]
        by_topic = np.lexsort((shuffle, self._topic_n[members]))
        topics, counts = np.unique(self._topic_n[members], return_counts=True)
        rank = np.concatenate([np.arange(count) for count in counts])
        if self._order == "round_robin":
            return members[by_topic[np.argsort(rank, kind="stable")]]
        offset = (
            hash_array(self._seed, f"{purpose}, offset of topics", topics) >> np.uint64(11)
        ) * 2.0**-53  # in [0, 1)
        key = (rank + np.repeat(offset, counts)) / np.repeat(counts, counts)
        return members[by_topic[np.lexsort((by_topic, key))]]

    def _uniform(self, group: int, batch: int) -> np.ndarray:
        members = self._members[group]
        members = members[np.argsort(self._topic_n[members], kind="stable")]
        _, first, counts = np.unique(self._topic_n[members], return_index=True, return_counts=True)
        # Positions run on through the batches, so slots left over by B mod topics go round.
        position_B = batch * self._batch_size + np.arange(self._batch_size)
        topic_B = position_B % len(counts)
        draw_B = hash_array(self._seed, f"uniform draw of language {self._langs[group]}", position_B)
        return members[first[topic_B] + (draw_B % counts[topic_B].astype(np.uint64)).astype(np.int64)]


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
    sample: int = 64,
) -> BatchShapes:
    """Fixes the shapes before training, from `sample` batches spread over the first epoch of each source.

    Args:
      chunk_rows: wanted sequences per chunk; the nearest size that fits the batch and the devices is taken.
    """
    query_lengths, passage_lengths = [], []
    for training_set, planner in sources:
        for step in np.unique(np.linspace(0, planner.steps_before(1) - 1, sample).astype(int)).tolist():
            plan, rows_N = _rows(training_set, planner, step, passages_per_query, seed)
            query_lengths.append(training_set.queries.lengths(plan.index_B))
            passage_lengths.append(training_set.passages.lengths(rows_N))
    profiles = fixed.plan_profiles(
        np.stack(query_lengths),
        np.stack(passage_lengths),
        query_chunks=fixed.chunk_count(batch_size, chunk_rows, devices),
        passage_chunks=fixed.chunk_count(batch_size * passages_per_query, chunk_rows, devices),
        query_max_length=query_max_length,
        passage_max_length=passage_max_length,
        width_multiple=width_multiple,
        max_profiles=max_profiles,
    )
    most = max(int(np.diff(training_set.positives.offsets).max()) for training_set, _ in sources)
    return BatchShapes(profiles, min(most, MAX_KNOWN_POSITIVES))


def make_batch(
    training_set: TrainingSet,
    planner: Planner,
    step: int,
    *,
    passages_per_query: int,
    seed: int,
    shapes: BatchShapes,
    weights: Weights,
) -> tuple[dict[str, Any], dict[str, float]]:
    """The global batch of a step and figures to log about it; a pure function, NumPy only.

    Returns:
      queries, passages: `Chunks` of B queries and N = B * P passages, in plan order (row i * P is query i's positive).
      target_B: int32, the column of each query's positive.
      passage_ids_N: int32, global rows; first_N: bool, whether no earlier column holds the same passage.
      positive_ids_BxM: int32, the known positives of each query among these passages, padded with -1.
      weight_N, query_weight_B: float32, alpha[language] + beta[language][topic] of each passage and query.
      query_index_B: int32.
    """
    plan, rows_N = _rows(training_set, planner, step, passages_per_query, seed)
    lang_B, topic_B = training_set.lang_n[plan.index_B], training_set.topic_n[plan.index_B]
    lang_N = np.repeat(lang_B, passages_per_query)
    inherited = training_set.passage_topic is None
    topic_N = np.repeat(topic_B, passages_per_query) if inherited else training_set.passage_topic[rows_N]
    beta_LxC = beta_of_batch(weights, topic_B)
    target_B = np.arange(len(plan.index_B), dtype=np.int32) * passages_per_query
    first_N = np.zeros(len(rows_N), bool)
    first_N[np.unique(rows_N, return_index=True)[1]] = True

    profile = fixed.cheapest(
        shapes.profiles, training_set.queries.lengths(plan.index_B), training_set.passages.lengths(rows_N)
    )
    queries = fixed.pack(training_set.queries, plan.index_B, profile.query_widths)
    passages = fixed.pack(training_set.passages, rows_N, profile.passage_widths)
    batch = {
        "queries": queries,
        "passages": passages,
        "target_B": target_B,
        "passage_ids_N": rows_N.astype(np.int32),
        "first_N": first_N,
        "positive_ids_BxM": _known_positives(training_set.positives, plan.index_B, rows_N, shapes.positives_width),
        "weight_N": weights.alpha_L[lang_N] + beta_LxC[lang_N, topic_N],
        "query_weight_B": weights.alpha_L[lang_B] + beta_LxC[lang_B, topic_B],
        "query_index_B": plan.index_B.astype(np.int32),
    }
    figures = {"epoch": plan.epoch, "lang": plan.lang, "padding_share": fixed.padding_share(queries, passages)}
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


_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[。！？।؟۔])\s*|\n+")
_NO_SENTENCE_MARKS = re.compile("[\u0e00-\u0eff]")  # Thai and Lao set spaces, not marks, between sentences
_SHORTEST_SENTENCE = 8  # characters; less is an abbreviation or a number rather than a sentence


def inverse_cloze(passages: Iterable[tuple[int, Passage]], seed: int) -> tuple[list[str], np.ndarray]:
    """Pseudo queries for passages without any: the title, and one sentence of those that have several.

    Returns the query texts and the row of the passage each belongs to (int64).

    Source: the inverse cloze task of Lee et al., "Latent Retrieval for Weakly Supervised Open Domain Question
    Answering" (ACL 2019); the sentence stays in its passage here.
    """
    queries, rows = [], []
    for row, passage in passages:
        found = [passage.title.strip()] if passage.title.strip() else []
        sentences = _sentences(passage.text)
        if len(sentences) > 1:
            found.append(sentences[stable_hash(seed, "inverse cloze", row) % len(sentences)])
        queries += found
        rows += [row] * len(found)
    return queries, np.array(rows, np.int64)


def _sentences(text: str) -> list[str]:
    pieces = _SENTENCE_END.split(text)
    if 2 * len(_NO_SENTENCE_MARKS.findall(text)) > len(text):
        pieces = [part for piece in pieces for part in piece.split()]
    return [piece.strip() for piece in pieces if len(piece.strip()) >= _SHORTEST_SENTENCE]


def _rows(
    training_set: TrainingSet, planner: Planner, step: int, passages_per_query: int, seed: int
) -> tuple[Plan, np.ndarray]:
    plan = planner.plan(step)
    rows_BxP = choose_passages(
        plan.index_B, plan.visit_B, training_set.positives, training_set.negatives, passages_per_query, seed
    )
    return plan, rows_BxP.reshape(-1)


def _known_positives(positives: Ragged, index_B: np.ndarray, rows_N: np.ndarray, width: int) -> np.ndarray:
    """Known positives of each query that are in the batch, int32 B x width; the target's own is among them."""
    values, owner, _ = positives.flat(index_B)
    here = np.isin(values, rows_N)
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


def _largest_remainder(weights_L: np.ndarray, total: int) -> np.ndarray:
    """Integers in proportion to the weights that sum to `total`."""
    exact_L = weights_L / weights_L.sum() * total
    shares_L = np.floor(exact_L).astype(np.int64)
    shares_L[np.argsort(shares_L - exact_L, kind="stable")[: total - shares_L.sum()]] += 1
    return shares_L
