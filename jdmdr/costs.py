"""What stages and steps take, by formula: bytes on disk, FLOPs, and the bytes that devices send each other.

Ring algorithms are assumed: of X bytes that every device ends with, all-gather sends (n - 1) / n X from each device, and
all-reduce twice that. The formulas are asserted against the compiled step (tests/test_gradcache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from jdmdr.encoders import EncoderConfig
from jdmdr.objectives import SEARCHING
from jdmdr.sizes import Data

CHECKPOINTS = 2  # that stay: the latest and the best
OFFSETS = 70  # bytes beside a passage's text: its id, the JSON around it, where both begin, a hash to find it by
TREC_LINE = 50  # bytes of a hit in a run, with its row and score
LABELS = 4 + 4 + 1 + 4  # bytes that go round the ring with a passage: place, id, whether it is the first, weight


def sent_bytes(
    parameter_bytes: int, queries: int, passages: int, width: int, devices: int, *, in_blocks: bool
) -> dict[str, float]:
    """Bytes that each device sends in a step of a loss over all passages of the global batch (`objectives/blockwise.py`).

    Args:
      parameter_bytes: of all parameters that train, float32.
      queries, passages: of the global batch; their embeddings are `width` float32 numbers.
      in_blocks: whether the passages go round the devices instead of being on each.
    """
    n = devices
    gathered = (n - 1) / n
    # a gathered vector: its all-gather, and the all-reduce of its gradient
    there_and_back = 3 * gathered * 4 * width
    # n - 1 times round in the forward pass and in the backward pass, and a gradient that comes home
    round_and_home = 2 * gathered * (4 * width + LABELS) + 4 * width
    return {
        "gradient": 2 * gathered * parameter_bytes,
        "queries": queries * there_and_back,
        "passages": passages * (round_and_home if in_blocks else there_and_back),
    }


class Cost(NamedTuple):
    """What a stage leaves on disk and computes on the devices."""

    stage: str
    disk: float  # bytes
    flops: float = 0.0  # of the encoder; a second forward pass of the grad cache or of remat counts
    steps: int | None = None


def stage_costs(
    config: ConfigDict, data: Data, encoder: EncoderConfig, parameters: int, trained: Mapping[str, int],
    steps: Mapping[str, int], forward: Callable[[float], float],
) -> list[Cost]:  # fmt: skip
    """The stages that weigh, in order.

    Args:
      parameters: of the encoder; `trained` of these, and `steps`, in the sections `warmup` and `train`.
      forward: FLOPs of encoding one text of so many tokens.
    """
    passages, queries = data.passages.value, data.queries.value
    text, tokens = data.passage_bytes.value, data.passage_tokens.value
    id_bytes = 2 if encoder.vocab_size < 1 << 16 else 4
    vector = config.encode.dimensions or encoder.embedding_width
    vectors = (passages + queries) * vector * np.dtype(config.encode.dtype).itemsize
    embedding = passages * forward(tokens) + queries * forward(data.query_tokens.value)
    mined, kept = len(config.mine.retrievers.split(",")) + 1, config.mine.negatives

    def training(name: str) -> Cost:
        section = config[name]
        passes = 3 + bool(section.grad_cache) + bool(encoder.remat)
        of_query = forward(data.query_tokens.value) + section.passages_per_query * forward(tokens)
        saved = CHECKPOINTS * 12 * trained[name] if steps[name] else 0
        return Cost(name, saved + 4 * parameters, steps[name] * section.batch_size * passes * of_query, steps[name])

    searching = config.train.objective.name in SEARCHING
    return [
        Cost("corpus", passages * (text + OFFSETS)),
        Cost("tokens", passages * (tokens * id_bytes + 8) + queries * (data.query_tokens.value * id_bytes + 8)),
        training("warmup"),
        Cost("bm25", passages * text),
        Cost("embeddings-warmup", vectors, embedding),
        *([] if searching else [
            Cost("mine", queries * config.mine.depth * mined * TREC_LINE),
            Cost("negatives", queries * kept * 8 + config.mine.texts * queries * (kept + 1) * text),
        ]),
        training("train"),
        Cost("embeddings", vectors, embedding),
        Cost("export", 4 * parameters),
    ]  # fmt: skip
