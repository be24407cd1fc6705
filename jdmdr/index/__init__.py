"""Search: one `Searcher` protocol, one file per index, and the fusion of their hits.

A new dense index is a file here with a class that has `search(queries, k) -> Hits`, and a line in `SEARCHERS`; a recipe
names it with `mine.index`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import numpy as np
from jax.sharding import Mesh

from jdmdr.index.exact import ExactSearcher
from jdmdr.index.faiss import FaissSearcher
from jdmdr.index.searcher import Searcher
from jdmdr.types import UserError

# name -> searcher over vector blocks CixD; of the mesh and the faiss factory string each takes what it needs
SEARCHERS: dict[str, Callable[[Sequence[np.ndarray], Mesh, str], Searcher]] = {
    "exact": lambda blocks, mesh, factory: ExactSearcher(blocks, mesh),
    "faiss": lambda blocks, mesh, factory: FaissSearcher(blocks, factory),
}


def dense_searcher(name: str, blocks: Sequence[np.ndarray], mesh: Mesh, factory: str = "Flat") -> Searcher:
    """The searcher `name` over a collection's vector blocks; without faiss the exact search stands in for a flat index.

    Raises UserError on an unknown name.
    """
    if name not in SEARCHERS:
        raise UserError(f"mine.index is {name!r}: choose one of {', '.join(SEARCHERS)}")
    if name == "faiss" and factory == "Flat" and not importlib.util.find_spec("faiss"):
        name = "exact"
    return SEARCHERS[name](blocks, mesh, factory)
