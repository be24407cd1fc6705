"""Any BERT, RoBERTa or XLM-R encoder for texts longer than it was trained on: tiled positions, sliding-window attention."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.types import UserError

PROJECTIONS = ("query", "key", "value")


def lengthen(config: EncoderConfig, params: Params, length: int, window: int) -> tuple[EncoderConfig, Params]:
    """The same encoder with `length` positions and attention over `window` neighbours: a Longformer.

    The learned position vectors are laid end to end as often as it takes, the last time in part. The projections of global
    tokens start as those of the others. On texts that the old positions and the window cover it computes what it did.

    Source: Beltagy et al., "Longformer" (2020), section 5, and the released `BertLong` of Yu, Fei and Li (WWW 2021).

    Raises:
      UserError: an encoder without attention or with a window already; a window that is odd or not positive.
    """
    if config.kind != "transformer" or config.window:
        has = "token vectors and no attention" if config.kind == "static" else "a window already"
        raise UserError(f"encoder.window is {window}, but this encoder has {has}; leave it 0")
    if window <= 0 or window % 2:
        raise UserError(f"encoder.window is {window}; it is an even number of neighbours, half of them on each side")
    if config.untied:
        towers = {side: lengthen(dataclasses.replace(config, towers="tied"), tower, length, window)
                  for side, tower in params.items()}  # fmt: skip
        long = next(iter(towers.values()))[0]
        return dataclasses.replace(long, towers="untied"), {side: tower for side, (_, tower) in towers.items()}
    # A Longformer counts positions from behind the padding id's row, as RoBERTa does; BERT's table has no such row.
    first = config.pad_token_id + 1
    table_RxD = params["embeddings"]["position"]
    learned_RxD = table_RxD[config.first_position :]
    before_RxD = table_RxD[: config.first_position] if config.first_position else jnp.zeros((first, config.width))
    times = -(-length // len(learned_RxD))
    position_RxD = jnp.concatenate([before_RxD, jnp.tile(learned_RxD, (times, 1))[:length]])
    out = {**params, "embeddings": {**params["embeddings"], "position": position_RxD}}
    for name, layer in params.items():
        if name.startswith("layer_"):
            copies = {f"{p}_global": jax.tree.map(jnp.array, layer["attention"][p]) for p in PROJECTIONS}
            out[name] = {**layer, "attention": {**layer["attention"], **copies}}
    long = dataclasses.replace(config, family="longformer", window=window, max_positions=first + length)
    return long, out
