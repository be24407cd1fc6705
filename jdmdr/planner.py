"""Who is in the batch of a step, as a pure function of (labels, seed, step).

Languages and topics are balanced by plan, not by luck: every global batch holds one language (its passages are
everybody's negatives) and close to that language's mix of topics, and every query is used once per pass.

Source: Huang et al., "Boosting Data Utilization for Multilingual Dense Retrieval" (EMNLP 2025), section 3.5, for
monolingual, topic-balanced batches; the stratified order is this project's way to get them.
"""

from __future__ import annotations

import bisect
import functools
from typing import NamedTuple

import numpy as np

from jdmdr.hashing import hash_array
from jdmdr.types import UserError

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


def _largest_remainder(weights_L: np.ndarray, total: int) -> np.ndarray:
    """Integers in proportion to the weights that sum to `total`."""
    exact_L = weights_L / weights_L.sum() * total
    shares_L = np.floor(exact_L).astype(np.int64)
    shares_L[np.argsort(shares_L - exact_L, kind="stable")[: total - shares_L.sum()]] += 1
    return shares_L
