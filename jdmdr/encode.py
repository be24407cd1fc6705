"""Encodes a corpus and its queries to a sharded embedding store.

    python -m jdmdr.encode --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR

A shard is one `.npy` file for a fixed range of rows, renamed into place when it is complete: a restart encodes only the
shards that are missing.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdmdr import parallel, shapes
from jdmdr.encoders import attention
from jdmdr.maxp import Chunked
from jdmdr.tokenizer import Tokenizer, TokenStore, write_tokens
from jdmdr.types import Tokens
from jdmdr.workdir import atomic

# What blocks are padded to: steps of a quarter at most from 64 to 640 tokens, where passages lie.
WIDTHS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 1024, 2048, 4096, 8192)
# Padded tokens of one call on each device: enough to keep it busy, few enough that a small corpus is not mostly padding.
TOKENS_PER_BLOCK = {"cpu": 2048, "gpu": 32_768, "tpu": 32_768}
FIRST_CHUNKS = "passages.first.npy"
PACKED_MULTIPLE = 128  # tokens that the rows of packed blocks are rounded up to, so that like collections share a shape


@functools.lru_cache(maxsize=4)
def _compiled(encoder: Any) -> Callable:
    """One compiled function an encoder, so that validation and the stages of a pipeline share its shapes."""
    return jax.jit(encoder.apply)


@functools.lru_cache(maxsize=4)
def _compiled_packed(encoder: Any) -> Callable:
    """(params, Packed) -> embeddings in the order that was packed; one compiled function an encoder."""

    def embed(params, block):
        return shapes.encode_rows(
            lambda p, tokens, key, widths: encoder.apply(p, tokens, "pooled", key, widths), params, block
        )

    return jax.jit(embed)


class InBlocks:
    """Applies an encoder to any number of token sequences, in length order and in blocks of a few fixed shapes.

    Over a mesh of several processes all of them ask for the same rows, and all get the whole result.
    """

    def __init__(self, encoder: Any, mesh: jax.sharding.Mesh, max_length: int):
        self._mesh = mesh
        self._widths = [w for w in WIDTHS if w < max_length] + [max_length]
        self._tokens_per_block = TOKENS_PER_BLOCK.get(jax.default_backend(), TOKENS_PER_BLOCK["gpu"])
        self._apply = _compiled(encoder)

    def blocks(self, lengths: np.ndarray) -> Iterator[tuple[np.ndarray, int, int]]:
        """(positions, width, rows to pad to) of each block; positions sorted by length, longest first."""
        order = np.argsort(-lengths, kind="stable")
        devices = self._mesh.devices.size
        start = 0
        while start < len(order):
            width = next(w for w in self._widths if w >= min(lengths[order[start]], self._widths[-1]))
            rows = max(1, self._tokens_per_block // width) * devices
            yield order[start : start + rows], width, rows
            start += rows

    def apply(self, params: Any, source: Any, rows: np.ndarray) -> np.ndarray:
        """What the encoder gives, float32 with an entry a row, for the sequences at `rows` of a token source."""
        lengths = source.lengths(rows)
        parts, places = [], []
        for positions, width, size in self.blocks(lengths):
            tokens = source.gather(rows[positions], width)
            missing = ((0, size - len(positions)), (0, 0))
            padded = jax.tree.map(functools.partial(np.pad, pad_width=missing), tokens)
            parts.append(self._apply(params, parallel.put_batch(padded, self._mesh)))
            places.append(positions)
        if not parts:
            shape = jax.eval_shape(self._apply, params, Tokens(*(np.zeros((1, 1), np.int32),) * 2)).shape
            return np.zeros((0, *shape[1:]), np.float32)
        found = np.concatenate([parallel.to_host(part)[: len(of)] for part, of in zip(parts, places, strict=True)])
        out = np.empty_like(found)
        out[np.concatenate(places)] = found
        return out


class Embedder(InBlocks):
    """Turns token sequences into float32 embeddings."""

    def __init__(self, encoder: Any, mesh: jax.sharding.Mesh, max_length: int, side: str):
        """`side` is query or passage: it chooses the tower."""
        super().__init__(encoder, mesh, max_length)
        self._tower = functools.partial(encoder.tower, side=side)
        self._side = shapes.Side(shapes.SEQUENCES_PER_ROW, max_length, runs=0)
        self._packs = attention.packs(encoder.config)
        self._embed_packed = _compiled_packed(encoder)

    def embed(self, params: Any, source: Any, rows: np.ndarray) -> np.ndarray:
        """Embeddings, float32 [len(rows), D], of the sequences at `rows` of a token source."""
        if not (self._packs and len(rows)):
            return self.apply(self._tower(params), source, rows)
        tower, blocks = self._tower(params), self.packed_blocks(source.lengths(rows))
        width = self._side.needed(np.stack([source.lengths(rows[block]) for block in blocks]), PACKED_MULTIPLE).max()
        parts = []
        for block in blocks:
            packed = self._side.pack(source, rows[block], (int(width),))
            parts.append(self._embed_packed(tower, parallel.put_batch(packed, self._mesh)))
        found = np.concatenate([parallel.to_host(part) for part in parts])
        out = np.empty((len(rows), found.shape[1]), np.float32)
        out[np.concatenate(blocks)] = found
        return out

    def packed_blocks(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Positions of equally many sequences a block, short and long ones in each, so that one shape fits all; where
        there are too few sequences for that, some stand in their block twice."""
        lengths = np.minimum(lengths, self._side.max_length)
        rows = self._mesh.devices.size
        wanted = min(self._tokens_per_block * rows / lengths.mean(), len(lengths))
        while 2 * rows * self._side.per_row <= wanted:
            rows *= 2
        longest_first, size = np.argsort(-lengths, kind="stable"), rows * self._side.per_row
        count = -(-len(lengths) // size)
        return [np.resize(longest_first[i::count], size) for i in range(count)]


def embed_texts(embedder: Embedder, params: Any, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Embeddings, float32 [len(texts), D], of texts that no token store holds."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokens(tokenizer, texts, pathlib.Path(directory), "texts")
        store = TokenStore(pathlib.Path(directory), ["texts"], tokenizer.vocab_size)
        return embedder.embed(params, store, np.arange(len(texts)))


class Shard(NamedTuple):
    """A range of rows of a token source, and the file of their embeddings."""

    path: pathlib.Path
    rows: range


def shards_of(first: int, stop: int, directory: pathlib.Path, name: str, shard_rows: int) -> list[Shard]:
    """Rows [first, stop) as `directory/name-00000.npy` and so on; no rows are one empty shard."""
    starts = range(first, max(stop, first + 1), shard_rows)
    return [
        Shard(directory / f"{name}-{number:05d}.npy", range(start, min(start + shard_rows, stop)))
        for number, start in enumerate(starts)
    ]


def encode_shard(embedder: Embedder, params: Any, source: Any, shard: Shard, dtype: str) -> bool:
    """Encodes the shard unless it is there already, of texts in chunks those that have text; returns whether it did."""
    if shard.path.exists():
        return False
    rows = np.array(shard.rows, np.int64)
    if isinstance(source, Chunked):
        rows = source.of(rows)[source.has_text(rows)]
    vectors = embedder.embed(params, source, rows)
    with atomic(shard.path) as temporary, open(temporary, "wb") as handle:
        np.save(handle, vectors.astype(dtype))
    return True


def shards(directory: pathlib.Path, name: str) -> Sequence[np.ndarray]:
    """The memory-mapped shards of `name` in row order, each [rows, D]."""
    return [np.load(path, mmap_mode="r") for path in sorted(directory.glob(f"{name}-*.npy"))]


def write_first_chunks(source: Chunked, rows: range, directory: pathlib.Path) -> None:
    """Leaves beside the shards of these passages where each one's chunks begin: int64, one more than there are passages."""
    counts = source.counts(np.array(rows, np.int64))
    with atomic(directory / FIRST_CHUNKS) as temporary, open(temporary, "wb") as handle:
        np.save(handle, np.concatenate([[0], np.cumsum(counts)]))


def first_chunks(directory: pathlib.Path) -> np.ndarray | None:
    """Row of each passage's first chunk, and how many rows there are behind the last; None where a passage is a row."""
    path = directory / FIRST_CHUNKS
    return np.load(path, mmap_mode="r") if path.exists() else None


def passage_vectors(directory: pathlib.Path, rows: np.ndarray) -> np.ndarray:
    """float32 [len(rows), D]: of a passage in chunks its first one's."""
    first = first_chunks(directory)
    return gather_rows(shards(directory, "passages"), rows if first is None else first[rows])


def passage_blocks(directory: pathlib.Path) -> Iterator[np.ndarray]:
    """The shards of passages, float32; of passages in chunks the first ones' vectors."""
    first, begin = first_chunks(directory), 0
    for block in shards(directory, "passages"):
        if first is not None:
            low, high = np.searchsorted(first[:-1], [begin, begin + len(block)])
            begin, block = begin + len(block), block[first[low:high] - begin]
        yield np.asarray(block, np.float32)


def gather_rows(blocks: Sequence[np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Rows of a sharded matrix as float32 [len(rows), D]."""
    bases = np.cumsum([0] + [len(block) for block in blocks])
    out = np.empty((len(rows), blocks[0].shape[1]), np.float32)
    part = np.searchsorted(bases, rows, side="right") - 1
    for i in np.unique(part):
        own = part == i
        out[own] = blocks[i][rows[own] - bases[i]]
    return out


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("embeddings", __doc__)
