"""The nouns of the project and the shape legend; nothing else.

Shape suffixes: `q_BxD`, `p_NxD`, `scores_BxN`, `ids_BxT`.

    B  queries in the global batch            P  passages per query, positive first
    N  passages in the global batch (B * P)   T  tokens
    D  embedding width                        K  top-k
    C  rows of a collection (its passages)    Q  queries of a search
    V  vocabulary size
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

NO_HIT = -1  # row of an empty place in `Hits`; its score is -inf


class UserError(Exception):
    """A mistake of the user's: one sentence with the file, line or key, what was found, and what to do.

    The command line prints the sentence without a traceback and exits with code 2.
    """


class Passage(NamedTuple):
    """A passage; `docid` is unique within its collection (one language). `separator` stands between title and text."""

    docid: str
    title: str
    text: str
    separator: str = " "


class Query(NamedTuple):
    """A query; `qid` is unique within its language and split."""

    qid: str
    text: str


class Hits(NamedTuple):
    """What a search found: row indices into the collection, best first; ties by lower row.

    Places beyond the last hit hold `NO_HIT` and -inf.
    """

    rows_QxK: np.ndarray  # int64
    scores_QxK: np.ndarray  # float32


class Tokens(NamedTuple):
    """A block of token sequences, padded on the right. `mask` is 1 on real tokens.

    `segments` tell the texts of a pair apart where an encoder has vectors for that; None is 0 everywhere. `prefix` counts
    the leading tokens of each row that see, and are seen by, the whole text in sliding-window attention; None is for a
    text that stands alone. Where a row holds S - 1 sequences one after another without padding between them, `lengths`
    are theirs and, last, that of the padding behind them, at least 1.
    """

    ids_BxT: np.ndarray  # int32
    mask_BxT: np.ndarray  # int32
    segments_BxT: np.ndarray | None = None  # int32
    prefix_Bx1: np.ndarray | None = None  # int32
    lengths_BxS: np.ndarray | None = None  # int32
