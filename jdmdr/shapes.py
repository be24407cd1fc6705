"""Fixed shapes without padding waste.

Inside a batch the sequences are sorted by length and cut into chunks of equal row count, each padded to its own width;
or, where attention can tell sequences in a row apart by their lengths, packed into rows without padding between them.
A *profile* fixes the widths of all chunks, or of the packed rows, for queries and passages together. A few profiles are
computed before training from the lengths of planned batches; a batch uses the cheapest one that covers it, so the
number of compiled shapes is small and known.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
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
    """Widths in tokens: of the chunks, longest first, whose row count is rows / len(widths); or the one of packed rows."""

    query_widths: tuple[int, ...]
    passage_widths: tuple[int, ...]


class Chunks(NamedTuple):
    """A block of sequences, sorted by length and cut into chunks of C rows (a pytree).

    `order_N[i]` is the place of row i of the plan: K * r + k for row r of chunk k among K. None: embeddings stay in theirs.
    """

    ids: tuple[Any, ...]  # C_k x T_k, int32
    mask: tuple[Any, ...]  # C_k x T_k, int32
    order_N: Any  # int32


class Packed(NamedTuple):
    """A block of sequences, S - 1 in each of R rows, one after another and padding behind them (a pytree).

    `order_N[i]` is the place of row i of the plan: (S - 1) * r + s for sequence s of row r.
    """

    ids_RxT: Any  # int32
    mask_RxT: Any  # int32
    lengths_RxS: Any  # int32, of the padding last, which is at least 1
    order_N: Any  # int32


OwnRows = Callable[[int], np.ndarray]  # number of an array's rows -> those that this process needs (parallel.own_rows)


class Side(NamedTuple):
    """How the sequences of one side of a batch, queries or passages, lie."""

    per_row: int  # chunks, or sequences in a packed row
    max_length: int
    packed: bool

    def needed(self, lengths_SxN: np.ndarray, multiple: int) -> np.ndarray:
        """The widths that each of S batches needs, S x len(widths), rounded up."""
        if not self.per_row:
            return np.empty((len(lengths_SxN), 0), np.int64)
        lengths_SxN = np.minimum(lengths_SxN.astype(np.int64), self.max_length)
        if self.packed:
            rows = [lengths_N[balanced_rows(lengths_N, self.per_row)].sum(axis=1).max() for lengths_N in lengths_SxN]
            return -(-(np.array(rows)[:, None] + 1) // multiple) * multiple
        longest_first_SxN = -np.sort(-lengths_SxN, axis=1)
        longest = longest_first_SxN[:, :: lengths_SxN.shape[1] // self.per_row]
        return np.clip(-(-longest // multiple) * multiple, 1, self.max_length)

    def pack(
        self, source: TokenSource, rows_N: np.ndarray, widths: Sequence[int], own: OwnRows | None = None
    ) -> Chunks | Packed:
        """The sequences of `rows_N`, cut off at `max_length`, laid out with these widths.

        Of each array's rows only those that `own` names are read; the others are 0.
        """
        if self.packed and len(rows_N):
            return pack_rows(source, rows_N, self.per_row, self.max_length, widths[0], own)
        return pack(source, rows_N, widths, own)


def chunk_count(rows: int, wanted_rows: int, devices: int) -> int:
    """Number of equal chunks such that a chunk has close to `wanted_rows` rows and splits evenly over the devices; 0 for
    no rows.

    Raises:
      UserError: `rows` is not a multiple of `devices`.
    """
    if rows % devices:
        raise UserError(f"A batch has {rows} sequences, not a multiple of {devices} devices; change batch_size.")
    if not rows:
        return 0
    sizes = [size for size in range(devices, rows + 1, devices) if rows % size == 0]
    return rows // min(sizes, key=lambda size: (abs(np.log(size / wanted_rows)), size))


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


def pack(source: TokenSource, rows_N: np.ndarray, widths: Sequence[int], own: OwnRows | None = None) -> Chunks:
    """Gathers the sequences of `rows_N`, longest first, into one chunk per width; no rows make no chunk."""
    if not len(rows_N):
        return Chunks((), (), np.empty(0, np.int32))
    longest_first_N = np.argsort(-source.lengths(rows_N).astype(np.int64), kind="stable")
    order_N = np.empty(len(rows_N), np.int32)
    order_N[longest_first_N] = np.arange(len(rows_N), dtype=np.int32).reshape(-1, len(widths)).T.ravel()
    parts = np.split(rows_N[longest_first_N], len(widths))
    blocks = [_gather(source, part, width, own) for part, width in zip(parts, widths, strict=True)]
    return Chunks(tuple(block.ids_BxT for block in blocks), tuple(block.mask_BxT for block in blocks), order_N)


def _gather(source: TokenSource, rows_C: np.ndarray, width: int, own: OwnRows | None) -> Tokens:
    if own is None:
        return source.gather(rows_C, width)
    places = own(len(rows_C))
    return jax.tree.map(lambda found: _spread(found, places, len(rows_C)), source.gather(rows_C[places], width))


def _spread(found: np.ndarray, places: np.ndarray, count: int) -> np.ndarray:
    """An array of `count` rows with those of `found` at `places`, and 0 elsewhere."""
    whole = np.zeros((count, *found.shape[1:]), found.dtype)
    whole[places] = found
    return whole


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


def pack_rows(
    source: TokenSource, rows_N: np.ndarray, per_row: int, max_length: int, width: int, own: OwnRows | None = None
) -> Packed:
    """Gathers the sequences of `rows_N`, cut off at `max_length`, into rows of `width` tokens, `per_row` in each."""
    lengths_N = np.minimum(source.lengths(rows_N), max_length)
    index_RxS = balanced_rows(lengths_N, per_row)
    order_N = np.empty(len(rows_N), np.int32)
    order_N[index_RxS.ravel()] = np.arange(len(rows_N), dtype=np.int32)
    lengths_RxS = lengths_N[index_RxS]
    mask_RxT = np.arange(width) < lengths_RxS.sum(axis=1, keepdims=True)
    places = own(len(index_RxS)) if own else np.arange(len(index_RxS))
    tokens = source.gather(rows_N[index_RxS[places].ravel()], int(lengths_N.max()))
    ids_RxT = np.zeros((len(places), width), np.int32)
    ids_RxT[mask_RxT[places]] = tokens.ids_BxT[tokens.mask_BxT > 0]
    ids_RxT = _spread(ids_RxT, places, len(index_RxS)) if own else ids_RxT
    padding_Rx1 = width - lengths_RxS.sum(axis=1, keepdims=True)
    return Packed(
        ids_RxT, mask_RxT.astype(np.int32), np.concatenate([lengths_RxS, padding_Rx1], axis=1).astype(np.int32), order_N
    )


def padding_share(tokens: int, *blocks: Chunks | Packed) -> float:
    """Share of the blocks' token slots that hold padding, where `tokens` of them do not."""
    masks = [mask for block in blocks for mask in (block.mask if isinstance(block, Chunks) else (block.mask_RxT,))]
    return 1.0 - tokens / sum(mask.size for mask in masks)


def encode_chunks(
    apply: Callable[[Any, Tokens, jax.Array | None, tuple[int, ...] | None], jax.Array],
    params: Any,
    block: Chunks | Packed,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Embeds all rows in one call and returns them in plan order, NxD, or as encoded where `order_N` is None;
    differentiable, to be called under jit.

    Args:
      apply: (params, tokens, dropout key or None, widths of the sequences in a row) -> a vector for each sequence.
      rng: the dropout key; None for a deterministic encoder.
    """
    tokens, widths = in_rows(block)
    embeddings = apply(params, tokens, rng, widths)
    return embeddings if block.order_N is None else jnp.take(embeddings, block.order_N, axis=0)


def in_rows(block: Chunks | Packed) -> tuple[Tokens, tuple[int, ...] | None]:
    """The block for one call of the encoder: tokens with several sequences in a row, and their widths where these are fixed."""
    if isinstance(block, Packed):
        return Tokens(block.ids_RxT, block.mask_RxT, lengths_BxS=block.lengths_RxS), None
    # Side by side: row i holds row i of every chunk, so the split over devices stays as it is.
    tokens = Tokens(jnp.concatenate(block.ids, axis=1), jnp.concatenate(block.mask, axis=1))
    return tokens, tuple(ids.shape[1] for ids in block.ids)


def runs(chunks: Chunks) -> Iterator[Tokens]:
    """Neighbours of one width as rows behind one another."""
    for _, run in itertools.groupby(zip(chunks.ids, chunks.mask, strict=True), key=lambda pair: pair[0].shape[1]):
        ids, mask = zip(*run, strict=True)
        yield Tokens(jnp.concatenate(ids), jnp.concatenate(mask))


def _tokens(profile: Profile, sides: tuple[Side, Side], rows: Sequence[int]) -> float:
    return sum(
        count / side.per_row * sum(widths) for count, side, widths in zip(rows, sides, profile, strict=True) if count
    )
