"""Fixed shapes without padding waste.

The sequences of a batch are packed into rows of close to equal length, one after another. Attention, where it cannot
tell them apart by their lengths, and static encoders take them in runs of like length that are padded to one width each. A
*profile* fixes the widths of the rows and of the runs for queries and passages together. A few profiles are computed
before training from the lengths of planned batches; a batch uses the cheapest one that covers it, so the number of
compiled shapes is small and known.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.types import Tokens, UserError

SEQUENCES_PER_ROW = 16  # of packed rows: few make rows of unequal sums, many make attention look far for its sequence


class TokenSource(Protocol):
    """Token sequences by row."""

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Token counts, int32."""

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        """The sequences, truncated or padded to `width`."""


class Profile(NamedTuple):
    """Widths in tokens: of the rows, then of the runs of sequences that attention pads to one width, longest first."""

    query_widths: tuple[int, ...]
    passage_widths: tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ids_RxT", "mask_RxT", "lengths_RxS", "order_N"],
    meta_fields=["widths"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A block of sequences, S - 1 in each of R rows, one after another and padding behind them (a pytree).

    `order_N[i]` is the place of row i of the plan: (S - 1) * r + s for sequence s of row r.
    """

    ids_RxT: Any  # int32
    mask_RxT: Any  # int32
    lengths_RxS: Any  # int32, of the padding last, which is at least 1
    order_N: Any  # int32
    widths: tuple[int, ...] | None  # that attention pads each sequence of a row to; None: it takes them as they lie

    @property
    def tokens(self) -> Tokens:
        """For a call of the encoder."""
        return Tokens(self.ids_RxT, self.mask_RxT, lengths_BxS=self.lengths_RxS)


OwnRows = Callable[[int], np.ndarray]  # number of an array's rows -> those that this process needs (parallel.own_rows)


class Side(NamedTuple):
    """How the sequences of one side of a batch, queries or passages, lie."""

    per_row: int
    max_length: int
    runs: int  # of sequences that attention pads to one width; 0: it takes the sequences as they lie

    def needed(self, lengths_SxN: np.ndarray, multiple: int) -> np.ndarray:
        """The widths that each of S batches needs, S x (1 + runs), rounded up."""
        if not self.per_row:
            return np.empty((len(lengths_SxN), 0), np.int64)
        lengths_SxN = np.minimum(lengths_SxN.astype(np.int64), self.max_length)
        rows = [lengths_N[balanced_rows(lengths_N, self.per_row)].sum(axis=1).max() for lengths_N in lengths_SxN]
        longest_first_SxN = -np.sort(-lengths_SxN, axis=1)
        longest = longest_first_SxN[:, self._first_of_runs() * (lengths_SxN.shape[1] // self.per_row)]
        widths = np.clip(-(-longest // multiple) * multiple, 1, self.max_length)
        return np.concatenate([-(-(np.array(rows)[:, None] + 1) // multiple) * multiple, widths], axis=1)

    def pack(
        self, source: TokenSource, rows_N: np.ndarray, widths: Sequence[int], own: OwnRows | None = None
    ) -> Packed | None:
        """The sequences of `rows_N`, cut off at `max_length`, laid out with these widths; None if there are none.

        Of each array's rows only those that `own` names are read; the others are 0.
        """
        if not len(rows_N):
            return None
        lengths_N = np.minimum(source.lengths(rows_N), self.max_length)
        index_RxS = balanced_rows(lengths_N, self.per_row)
        order_N = np.empty(len(rows_N), np.int32)
        order_N[index_RxS.ravel()] = np.arange(len(rows_N), dtype=np.int32)
        lengths_RxS = lengths_N[index_RxS]
        mask_RxT = np.arange(widths[0]) < lengths_RxS.sum(axis=1, keepdims=True)
        places = own(len(index_RxS)) if own else np.arange(len(index_RxS))
        tokens = source.gather(rows_N[index_RxS[places].ravel()], int(lengths_N.max()))
        ids_RxT = np.zeros(mask_RxT.shape, np.int32)
        read_RxT = np.zeros_like(mask_RxT)
        read_RxT[places] = mask_RxT[places]
        ids_RxT[read_RxT] = tokens.ids_BxT[tokens.mask_BxT > 0]
        padding_Rx1 = widths[0] - lengths_RxS.sum(axis=1, keepdims=True)
        return Packed(
            ids_RxT,
            mask_RxT.astype(np.int32),
            np.concatenate([lengths_RxS, padding_Rx1], axis=1).astype(np.int32),
            order_N,
            self.of_sequences(widths[1:]),
        )

    def _first_of_runs(self) -> np.ndarray:
        return np.arange(self.runs) * self.per_row // max(self.runs, 1)

    def of_sequences(self, widths: Sequence[int]) -> tuple[int, ...] | None:
        """The width of each sequence of a row, from those of the runs."""
        counts = np.diff(np.append(self._first_of_runs(), self.per_row))
        return tuple(np.repeat(widths, counts).tolist()) if self.runs else None


def make_side(rows: int, max_length: int, *, chunk_rows: int, grad_cache: int, devices: int, pads: bool) -> Side:
    """The layout of a side of `rows` sequences.

    Args:
      chunk_rows: wanted sequences in a run, where the encoder `pads` them (not `attention.packs`).
      grad_cache: sequences that a device encodes at a time, so that a row holds no more; 0: all.
    """
    most_per_row = min(SEQUENCES_PER_ROW, grad_cache or SEQUENCES_PER_ROW)
    per_row = part_count(rows, max(1, rows // most_per_row), devices)
    return Side(per_row, max_length, min(per_row, max(1, rows // chunk_rows)) if pads else 0)


def part_count(rows: int, wanted: float, devices: int) -> int:
    """Number of equal parts such that a part has close to `wanted` rows and splits evenly over the devices; 0 for no rows.

    Raises:
      UserError: `rows` is not a multiple of `devices`.
    """
    if rows % devices:
        raise UserError(f"A batch has {rows} sequences, not a multiple of {devices} devices; change batch_size.")
    if not rows:
        return 0
    sizes = [size for size in range(devices, rows + 1, devices) if rows % size == 0]
    return rows // min(sizes, key=lambda size: (abs(np.log(size / wanted)), size))


def plan_profiles(
    query_lengths_SxB: np.ndarray,
    passage_lengths_SxN: np.ndarray,
    sides: tuple[Side, Side],
    *,
    width_multiple: int = 16,
    max_profiles: int = 4,
) -> tuple[Profile, ...]:
    """Chooses at most `max_profiles` profiles from the lengths of S sampled batches, plus the ceiling, cheapest first.

    The sampled batches are grouped by the tokens they need; a profile is the elementwise maximum of its group. The
    ceiling (every sequence at its maximum) comes last and covers any batch.
    """
    lengths = query_lengths_SxB, passage_lengths_SxN
    query_widths, passage_widths = (side.needed(own, width_multiple) for side, own in zip(sides, lengths, strict=True))
    rows = [own.shape[1] for own in lengths]
    tokens_S = [_tokens(Profile(*widths), sides, rows) for widths in zip(query_widths, passage_widths, strict=True)]
    groups = np.array_split(np.argsort(tokens_S, kind="stable"), max_profiles)
    profiles = {
        Profile(tuple(query_widths[group].max(0).tolist()), tuple(passage_widths[group].max(0).tolist()))
        for group in groups
        if len(group)
    }
    ceiling = (
        side.needed(np.full((1, count), side.max_length), 1)[0].tolist()
        for side, count in zip(sides, rows, strict=True)
    )
    profiles.add(Profile(*map(tuple, ceiling)))
    return tuple(sorted(profiles, key=lambda profile: (_tokens(profile, sides, rows), profile)))


def cheapest(
    profiles: Sequence[Profile], query_lengths_B: np.ndarray, passage_lengths_N: np.ndarray, sides: tuple[Side, Side]
) -> Profile:
    """The first of the profiles (cheapest first, ceiling last) that truncates nothing the ceiling would keep."""
    query_widths, passage_widths = (
        side.needed(lengths[None], 1)[0]
        for side, lengths in zip(sides, (query_lengths_B, passage_lengths_N), strict=True)
    )
    return next(
        profile
        for profile in profiles
        if np.all(profile.query_widths >= query_widths) and np.all(profile.passage_widths >= passage_widths)
    )


def balanced_rows(lengths_N: np.ndarray, per_row: int) -> np.ndarray:
    """Which sequences share a row, R x per_row: as many in each, their lengths summing to about the same.

    Longest first, each round of R sequences goes to the rows in order of what they hold so far, the longest to the
    emptiest.
    """
    longest_first_SxR = np.argsort(-lengths_N.astype(np.int64), kind="stable").reshape(per_row, -1)
    total_R = np.zeros(longest_first_SxR.shape[1], np.int64)
    index_RxS = np.empty(longest_first_SxR.T.shape, np.int64)
    for s, round_R in enumerate(longest_first_SxR):
        emptiest_first_R = np.argsort(total_R, kind="stable")
        index_RxS[emptiest_first_R, s] = round_R
        total_R[emptiest_first_R] += lengths_N[round_R]
    return index_RxS


def padding_share(tokens: int, *blocks: Packed | None) -> float:
    """Share of the blocks' token slots that hold padding, where `tokens` of them do not."""
    return 1.0 - tokens / sum(block.mask_RxT.size for block in blocks if block)


def encode_rows(
    apply: Callable[[Any, Tokens, jax.Array | None, tuple[int, ...] | None], jax.Array],
    params: Any,
    block: Packed,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Embeds all sequences in one call and returns them in plan order, NxD, or as they lie where `order_N` is None;
    differentiable, to be called under jit.

    Args:
      apply: (params, tokens, dropout key or None, widths for attention or None) -> a vector for each sequence.
      rng: the dropout key; None for a deterministic encoder.
    """
    embeddings = apply(params, block.tokens, rng, block.widths)
    return embeddings if block.order_N is None else jnp.take(embeddings, block.order_N, axis=0)


def _tokens(profile: Profile, sides: tuple[Side, Side], rows: Sequence[int]) -> float:
    return sum(
        count / side.per_row * widths[0] for count, side, widths in zip(rows, sides, profile, strict=True) if count
    )
