"""Fixed shapes without padding waste.

Inside a batch the sequences are sorted by length and cut into chunks of equal row count, each padded to its own width.
A *profile* fixes the widths of all chunks, longest first, for queries and passages together. A few profiles are
computed before training from the lengths of planned batches; a batch uses the cheapest one that covers it, so the
number of compiled shapes is small and known.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jdmdr.types import Tokens, UserError


class TokenSource(Protocol):
    """Token sequences by row."""

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Token counts, int32."""

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        """The sequences, truncated or padded to `width`."""


class Profile(NamedTuple):
    """Chunk widths in tokens, longest first; the row count of a chunk is rows / len(widths)."""

    query_widths: tuple[int, ...]
    passage_widths: tuple[int, ...]


class Chunks(NamedTuple):
    """A block of sequences, sorted by length and cut into chunks (a pytree).

    `order_N[i]` is the place of row i of the plan among the concatenated chunk rows.
    """

    ids: tuple[Any, ...]  # C_k x T_k, int32
    mask: tuple[Any, ...]  # C_k x T_k, int32
    order_N: Any  # int32


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
    *,
    query_chunks: int,
    passage_chunks: int,
    query_max_length: int,
    passage_max_length: int,
    width_multiple: int = 16,
    max_profiles: int = 4,
) -> tuple[Profile, ...]:
    """Chooses at most `max_profiles` profiles from the lengths of S sampled batches, plus the ceiling, cheapest first.

    The sampled batches are grouped by the tokens they need; a profile is the elementwise maximum of its group. The
    ceiling (every width at its maximum) comes last and covers any batch.
    """
    query_widths = _needed(query_lengths_SxB, query_chunks, width_multiple, query_max_length)
    passage_widths = _needed(passage_lengths_SxN, passage_chunks, width_multiple, passage_max_length)
    query_rows, passage_rows = query_lengths_SxB.shape[1], passage_lengths_SxN.shape[1]
    tokens_S = [
        _tokens(Profile(*widths), query_rows, passage_rows) for widths in zip(query_widths, passage_widths, strict=True)
    ]
    groups = np.array_split(np.argsort(tokens_S, kind="stable"), max_profiles)
    profiles = {
        Profile(tuple(query_widths[group].max(0).tolist()), tuple(passage_widths[group].max(0).tolist()))
        for group in groups
        if len(group)
    }
    profiles.add(Profile((query_max_length,) * query_chunks, (passage_max_length,) * passage_chunks))
    return tuple(sorted(profiles, key=lambda profile: (_tokens(profile, query_rows, passage_rows), profile)))


def cheapest(profiles: Sequence[Profile], query_lengths_B: np.ndarray, passage_lengths_N: np.ndarray) -> Profile:
    """The first of the profiles (cheapest first, ceiling last) that truncates nothing the ceiling would keep."""
    ceiling = profiles[-1]
    query_widths, passage_widths = (
        _needed(lengths[None], len(widths), 1, max(widths, default=0))[0]
        for lengths, widths in zip((query_lengths_B, passage_lengths_N), ceiling, strict=True)
    )
    return next(
        profile
        for profile in profiles
        if np.all(profile.query_widths >= query_widths) and np.all(profile.passage_widths >= passage_widths)
    )


def pack(source: TokenSource, rows_N: np.ndarray, widths: Sequence[int]) -> Chunks:
    """Gathers the sequences of `rows_N`, longest first, into one chunk per width; no rows make no chunk."""
    if not len(rows_N):
        return Chunks((), (), np.empty(0, np.int32))
    longest_first_N = np.argsort(-source.lengths(rows_N).astype(np.int64), kind="stable")
    order_N = np.empty(len(rows_N), np.int32)
    order_N[longest_first_N] = np.arange(len(rows_N), dtype=np.int32)
    parts = np.split(rows_N[longest_first_N], len(widths))
    blocks = [source.gather(part, width) for part, width in zip(parts, widths, strict=True)]
    return Chunks(tuple(block.ids_BxT for block in blocks), tuple(block.mask_BxT for block in blocks), order_N)


def padding_share(*blocks: Chunks) -> float:
    """Share of token slots that hold padding (host arrays only)."""
    masks = [mask for chunks in blocks for mask in chunks.mask]
    return 1.0 - sum(int(mask.sum()) for mask in masks) / sum(mask.size for mask in masks)


def encode_chunks(
    apply: Callable[[Any, Tokens, jax.Array | None], jax.Array],
    params: Any,
    chunks: Chunks,
    rng: jax.Array | None = None,
) -> jax.Array:
    """Embeds all rows and returns them in plan order, NxD; differentiable, to be called under jit.

    Args:
      apply: (params, tokens, dropout key or None) -> emb_BxD.
      rng: root of the dropout keys, one per call of `apply`; None for a deterministic encoder.
    """
    embeddings = []
    # Neighbours of one width go through the encoder together: as many tokens, fewer copies of it to compile.
    for _, run in itertools.groupby(zip(chunks.ids, chunks.mask, strict=True), key=lambda pair: pair[0].shape[1]):
        ids, mask = zip(*run, strict=True)
        key = None if rng is None else jax.random.fold_in(rng, len(embeddings))
        embeddings.append(apply(params, Tokens(jnp.concatenate(ids), jnp.concatenate(mask)), key))
    return jnp.take(jnp.concatenate(embeddings), chunks.order_N, axis=0)


def _needed(lengths_SxN: np.ndarray, chunks: int, multiple: int, max_length: int) -> np.ndarray:
    """Width each chunk of each batch needs, S x chunks: its longest sequence, rounded up."""
    if not chunks:
        return np.empty((len(lengths_SxN), 0), np.int64)
    longest_first_SxN = -np.sort(-lengths_SxN.astype(np.int64), axis=1)
    longest = longest_first_SxN[:, :: lengths_SxN.shape[1] // chunks]
    return np.clip(-(-longest // multiple) * multiple, 1, max_length)


def _tokens(profile: Profile, query_rows: int, passage_rows: int) -> float:
    sides = (query_rows, profile.query_widths), (passage_rows, profile.passage_widths)
    return sum(rows / len(widths) * sum(widths) for rows, widths in sides if rows)
