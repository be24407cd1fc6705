"""The ensemble of `jdmdr.mine`, asked with new queries: texts that no file holds and that get their vectors on the spot.

Retrievers that know the queries of the data alone (runs and vectors made elsewhere) have no say here.
"""

from __future__ import annotations

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jdmdr import mine, retrievers
from jdmdr.index import Searcher
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.index.fusion import concat_vectors, fuse
from jdmdr.retrievers import Retriever, Spec, Vectors
from jdmdr.types import Hits, UserError

ASKABLE = (retrievers.WARMUP, retrievers.BM25, retrievers.ENCODER)
Embed = Callable[[Sequence[str]], np.ndarray]  # texts -> float32 QxD
Search = Callable[[Sequence[str], int], Hits]  # texts, depth -> the fused list


class Encoded(NamedTuple):
    """A collection as one encoder sees it."""

    blocks: list[np.ndarray]  # its passages, CixD, memory-mapped
    embed: Embed


def askable(ensemble: Sequence[Spec]) -> list[Spec]:
    """The retrievers of the ensemble that can search for a new query; raises UserError where none can."""
    found = [spec for spec in ensemble if spec.kind in ASKABLE]
    if not found:
        raise UserError(
            "expand.rounds: no retriever of mine.retrievers can search for a new query, since runs and vectors made "
            "elsewhere know the old ones alone; add bm25 or an encoder, or set expand.rounds=0"
        )
    return found


@contextlib.contextmanager
def opened(
    members: Mapping[str, Bm25Searcher | Encoded], weights: Mapping[str, float], fusion: str,
    index: Callable[[list[np.ndarray]], Searcher], scratch: pathlib.Path,
) -> Iterator[Search]:  # fmt: skip
    """A search over one collection by the fused members, while the block lasts.

    Args:
      weights: those that mining used, by name.
      index: makes an index of vectors; those that `concat` makes lie in `scratch` meanwhile.
    """
    weight_M = [weights[name] for name in members]
    with tempfile.TemporaryDirectory(prefix=".concat.", dir=scratch) as directory:
        if fusion == mine.CONCAT:
            path = pathlib.Path(directory) / "passages.npy"
            both = index([mine.concatenated([member.blocks for member in members.values()], weight_M, path)])
            yield lambda texts, depth: both.search(
                concat_vectors([member.embed(texts) for member in members.values()], weight_M), depth
            )
            return
        searchers = {name: index(member.blocks) for name, member in members.items() if isinstance(member, Encoded)}

        def ask(name: str, texts: Sequence[str]) -> Retriever:
            member = members[name]
            if isinstance(member, Encoded):
                return retrievers.over(searchers[name], Vectors(member.embed(texts), member.blocks))
            return retrievers.lexical(member, texts)

        def search(texts: Sequence[str], depth: int) -> Hits:
            asked = [ask(name, texts) for name in members]
            rows = np.arange(len(texts))
            lists = [retriever.search(rows, depth) for retriever in asked]
            return fuse(lists, fusion, weight_M, depth, [retriever.rescore(rows) for retriever in asked])

        yield search
