"""Search: one `Searcher` protocol, one file per index, and the fusion of their hits.

A new index is a file here with a class that has `search(queries, k) -> Hits`, and a line in `SEARCHERS`.
"""

from __future__ import annotations

from collections.abc import Callable

from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.index.exact import ExactSearcher
from jdmdr.index.faiss import FaissSearcher
from jdmdr.index.searcher import Searcher
from jdmdr.types import UserError

# name -> factory(collection, **options); the collection is vector blocks, or texts for bm25.
SEARCHERS: dict[str, Callable[..., Searcher]] = {
    "exact": ExactSearcher,
    "faiss": FaissSearcher,
    "bm25": Bm25Searcher,
}


def make_searcher(name: str, collection, **options) -> Searcher:
    """The searcher `name` over a collection: vector blocks CixD for 'exact' and 'faiss', texts for 'bm25'."""
    if name not in SEARCHERS:
        raise UserError(f"index is {name!r}: choose one of {', '.join(SEARCHERS)}")
    return SEARCHERS[name](collection, **options)
