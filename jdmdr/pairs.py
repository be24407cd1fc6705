"""Scores pairs of a query and a passage, by a cross-encoder or as inner products of a bi-encoder: as many as there are, in pieces
that outlive a killed run."""

from __future__ import annotations

import itertools
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from jdmdr import encoders, models, parallel, progress, retrievers, tokenizer
from jdmdr.encode import Embedder, InBlocks, embed_texts
from jdmdr.encoders.long_attention import MOST_GLOBAL
from jdmdr.encoders.pretrained import find_checkpoint
from jdmdr.tokenizer import CHARACTERS_PER_TOKEN
from jdmdr.types import Tokens, UserError

# Pairs tokenised and scored at a time, on each device: what a killed run loses at most.
PIECE = {"cpu": 256, "gpu": 8192, "tpu": 8192}
DUAL_PIECE = 16 * PIECE["gpu"]  # of a bi-encoder, which encodes a passage once for all pairs of a piece
QUERY_SHARE = 0.75  # of the tokens of a pair that a query may take; the rest is the passage's


class Template(NamedTuple):
    """How a tokenizer puts a pair together: PREFIX query MIDDLE passage SUFFIX."""

    prefix: np.ndarray  # token ids, int32, as the next two
    middle: np.ndarray
    suffix: np.ndarray
    segments: tuple[int, ...]  # of the five parts

    @property
    def size(self) -> int:
        """Special tokens of a pair."""
        return len(self.prefix) + len(self.middle) + len(self.suffix)


class PairTokenizer:
    """A checkpoint's tokenizer for pairs of at most `length` tokens, special tokens included.

    Of a pair that is too long the passage is cut. A query is cut only where it is longer than QUERY_SHARE of the room.
    """

    def __init__(self, name_or_dir: str, length: int):
        found = tokenizer.load_pretrained(name_or_dir)
        self._backend = found.backend_tokenizer
        self._backend.no_padding()
        self._backend.no_truncation()
        self._characters = length * CHARACTERS_PER_TOKEN
        self.template = _template(self._backend, name_or_dir)
        self.vocab_size = len(found)
        self.mask_id, self.special_ids = found.mask_token_id, sorted({*found.all_special_ids})
        self.uses_segments = "token_type_ids" in found.model_input_names
        self.room = length - self.template.size
        if self.room < 2:
            raise UserError(f"the length of a pair is {length} tokens, {self.template.size} of them special ones; raise "
                            "--length, or in a recipe cross_encoder.length")  # fmt: skip
        self.longest_query = max(1, int(QUERY_SHARE * self.room))

    def ids(self, texts: Sequence[str], whole: bool = False) -> list[np.ndarray]:
        """Token ids of each text, int32, without special tokens and at most `room` of them, or all."""
        cut = texts if whole else [text[: self._characters] for text in texts]
        encoded = self._backend.encode_batch_fast(cut, add_special_tokens=False)
        return [np.asarray(e.ids if whole else e.ids[: self.room], np.int32) for e in encoded]


def _template(backend: Any, name: str) -> Template:
    """Reads the template off what the tokenizer makes of a probe."""
    words = itertools.chain("a", backend.get_vocab())
    probe = next(e for word in words if (e := backend.encode(word, add_special_tokens=False)).ids)
    pair = backend.post_process(probe, probe)
    count, ids = len(probe.ids), pair.ids
    query = ids.index(probe.ids[0])
    passage = ids.index(probe.ids[0], query + count)
    ends = [0, query, query + count, passage, passage + count, len(ids)]
    if not query:
        raise UserError(f"the tokenizer of {name!r} puts no special token before a pair, which a cross-encoder scores by; "
                        "take the tokenizer that it was trained with")  # fmt: skip
    parts = [np.asarray(ids[start:end], np.int32) for start, end in itertools.pairwise(ends)]
    segments = tuple(pair.type_ids[min(start, len(ids) - 1)] for start in ends[:-1])
    return Template(*parts[::2], segments)


class Pairs:
    """A token source whose sequence i is query `query_N[i]` with passage `passage_N[i]`, by the template."""

    def __init__(
        self, template: Template, queries: Sequence[np.ndarray], query_N: np.ndarray, passages: Sequence[np.ndarray],
        passage_N: np.ndarray, length: int, segments: bool,
    ):  # fmt: skip
        self._template, self._length, self._segments = template, length, segments
        self._queries, self._query_N, self._passages, self._passage_N = queries, query_N, passages, passage_N

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Token counts, int32."""
        parts = (self._parts(row) for row in rows)
        return np.fromiter((sum(map(len, of)) for of in parts), np.int32, len(rows))

    def gather(self, rows: np.ndarray, width: int) -> Tokens:
        """The sequences of `rows` padded with id 0 to `width` tokens, which none exceeds."""
        ids, mask = np.zeros((2, len(rows), width), np.int32)
        segments = np.zeros((len(rows), width), np.int32) if self._segments else None
        prefix = np.zeros((len(rows), 1), np.int32)  # a long document is read with its query in sight
        for i, row in enumerate(rows):
            parts = self._parts(row)
            sequence = np.concatenate(parts)
            ids[i, : len(sequence)] = sequence
            mask[i, : len(sequence)] = 1
            prefix[i] = sum(map(len, parts[:3]))
            if self._segments:
                segments[i, : len(sequence)] = np.repeat(self._template.segments, [len(part) for part in parts])
        return Tokens(ids, mask, segments, prefix)

    def _parts(self, row: int) -> tuple[np.ndarray, ...]:
        t, query = self._template, self._queries[self._query_N[row]]
        passage = self._passages[self._passage_N[row]][: self._length - t.size - len(query)]
        return t.prefix, query, t.middle, passage, t.suffix


def window_starts(tokens: int, room: int, overlap: int) -> list[int]:
    """First tokens of windows of `room` tokens that overlap by `overlap`, or by half a window where that is less, and leave none
    of `tokens` out. The last one ends with the text."""
    if tokens <= room:
        return [0]
    step = room - min(overlap, room // 2)
    return [*range(0, tokens - room, step), tokens - room]


class Scorer:
    """A cross-encoder with its tokenizer, on the devices of a mesh.

    Args:
      section: name (Hugging Face name or directory), label and length of a recipe's `cross_encoder` keys.
      dtype: of the matmuls; empty: what the devices are fast at.
      overlap: a passage beyond the length is read in windows that overlap by so many tokens, and its best one counts; None: it
        is cut.
    """

    def __init__(self, section: Any, dtype: str, mesh: jax.sharding.Mesh, overlap: int | None = None):
        self._overlap = overlap
        directory = str(find_checkpoint(section.name))
        self.encoder, params = encoders.load_cross_encoder(directory, section.label, models.matmul_dtype(dtype))
        config = self.encoder.config
        if section.length > config.usable_positions:
            raise UserError(f"the length of a pair is {section.length} tokens, but {section.name} has room for "
                            f"{config.usable_positions}; lower --length, or in a recipe cross_encoder.length")  # fmt: skip
        self.tokenizer, self.length = PairTokenizer(directory, section.length), section.length
        if self.tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"the tokenizer of {section.name} has {self.tokenizer.vocab_size} tokens, but its weights have "
                            f"vectors for {config.vocab_size}; they do not belong together")  # fmt: skip
        if config.window:  # a query is read with all of the document in sight, and so many tokens can be
            around = len(self.tokenizer.template.prefix) + len(self.tokenizer.template.middle)
            self.tokenizer.longest_query = min(self.tokenizer.longest_query, MOST_GLOBAL - around)
        self.piece = PIECE.get(jax.default_backend(), PIECE["gpu"]) * mesh.devices.size
        self._segments = self.tokenizer.uses_segments and config.type_vocab > 1
        self._params = jax.device_put(params, parallel.replicated(mesh))
        self._blocks = InBlocks(self.encoder, mesh, section.length)

    def queries(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The token ids of queries, for `score`; those that are cut are told in one line."""
        found, longest = self.tokenizer.ids(texts), self.tokenizer.longest_query
        cut = sum(len(ids) > longest for ids in found)
        if cut:
            progress.say(f"  warning: {cut} of {len(texts)} queries are longer than {longest} tokens and are cut there")
        return [ids[:longest] for ids in found]

    def score(
        self, queries: Sequence[np.ndarray], query_N: np.ndarray, passages: Sequence[str], passage_N: np.ndarray
    ) -> np.ndarray:
        """The log-odds that passage `passage_N[i]` is relevant to query `query_N[i]`, float32 N."""
        ids = self.tokenizer.ids(passages, whole=self._overlap is not None)
        first_N = np.arange(len(query_N))
        if self._overlap is not None:
            ids, passage_N, counts_N = self._windows(queries, query_N, ids, passage_N)
            query_N, first_N = np.repeat(query_N, counts_N), np.cumsum(counts_N) - counts_N
        pairs = Pairs(self.tokenizer.template, queries, query_N, ids, passage_N, self.length, self._segments)
        scores = self._blocks.apply(self._params, pairs, np.arange(len(query_N)))
        return np.maximum.reduceat(scores, first_N) if len(scores) else scores

    def _windows(
        self, queries: Sequence[np.ndarray], query_N: np.ndarray, ids: Sequence[np.ndarray], passage_N: np.ndarray
    ) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """The windows of every pair one after another, the place of each, and how many a pair has."""
        parts, counts = [], []
        for query, passage in zip(query_N, passage_N, strict=True):
            room = self.tokenizer.room - len(queries[query])
            starts = window_starts(len(ids[passage]), room, self._overlap)
            parts += [ids[passage][start : start + room] for start in starts]
            counts.append(len(starts))
        return parts, np.arange(len(parts)), np.array(counts)


class DualScorer:
    """As `Scorer`, by the inner products of a bi-encoder's vectors.

    Args:
      spec: the bi-encoder, as `mine.retrievers` names one.
      section: its `encoder` keys (`retrievers.encoder_section`).
    """

    def __init__(self, spec: retrievers.Spec, section: ConfigDict, mesh: jax.sharding.Mesh):
        with tempfile.TemporaryDirectory() as scratch:
            home = pathlib.Path(scratch)
            name, as_in = retrievers.words(spec, section)
            tokenizer.copy_pretrained(name, home, as_in)
            self._tokenizers = {
                side: tokenizer.Tokenizer(home, section[f"{side}_length"], section[f"{side}_prompt"])
                for side in encoders.SIDES
            }
        config, self._params = models.start(section, self._tokenizers["query"].vocab_size, None, 0)
        encoder = encoders.build(config)
        self._embedders = {side: Embedder(encoder, mesh, section[f"{side}_length"], side) for side in encoders.SIDES}
        self.piece = DUAL_PIECE

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of queries, for `score`."""
        return self._embed("query", texts)

    def score(
        self, queries: np.ndarray, query_N: np.ndarray, passages: Sequence[str], passage_N: np.ndarray
    ) -> np.ndarray:
        """The inner product of query `query_N[i]` and passage `passage_N[i]`, float32 N."""
        return np.einsum("nd,nd->n", queries[query_N], self._embed("passage", passages)[passage_N])

    def _embed(self, side: str, texts: Sequence[str]) -> np.ndarray:
        return embed_texts(self._embedders[side], self._params, self._tokenizers[side], texts)


def score_all(
    scorer: Scorer | DualScorer, queries: Sequence[str], query_N: np.ndarray, passage_N: np.ndarray,
    texts: Callable[[np.ndarray], Sequence[str]], path: pathlib.Path, bar: Any,
) -> np.ndarray:  # fmt: skip
    """Scores N pairs piece by piece, each appended to `path` when it is done; a second call goes on behind the last one.

    Args:
      texts: the passages of distinct rows of `passage_N`.
      path: float32 scores in the order of the pairs; whoever calls removes it when the scores stand elsewhere.
    """
    piece = scorer.piece
    done = path.stat().st_size // 4 if path.exists() else 0
    if done < len(query_N):
        done -= done % piece  # the last one may be there in part
    bar.update(done)
    ids = scorer.queries(queries)
    with open(path, "ab") as file:
        file.truncate(4 * done)
        for first in range(done, len(query_N), piece):
            rows, place_N = np.unique(passage_N[first : first + piece], return_inverse=True)
            scores = scorer.score(ids, query_N[first : first + piece], texts(rows), place_N)
            file.write(scores.astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
            bar.update(len(scores))
    return np.fromfile(path, "<f4")
