"""A checkpoint's layers under another vocabulary: a multilingual student built from an English teacher."""

from __future__ import annotations

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import tokenizers

from jdmdr import hashing
from jdmdr.encoders.config import EncoderConfig, Params
from jdmdr.types import UserError
from jdmdr.workdir import read_json

SPECIAL = ("pad", "unk", "cls", "sep")
BLANK = "\u2581"  # Unigram's mark of a word's beginning


def keep_layers(config: EncoderConfig, params: Params, layers: int) -> tuple[EncoderConfig, Params]:
    """The first `layers` of an encoder, and its embeddings and head."""
    if config.kind != "transformer" or layers > config.layers:
        raise UserError(f"encoder.layers is {layers}, but the checkpoint has {config.layers}")
    dropped = {f"layer_{i}" for i in range(layers, config.layers)}
    cut = lambda tower: {name: of for name, of in tower.items() if name not in dropped}
    kept = {side: cut(tower) for side, tower in params.items()} if config.untied else cut(params)
    return dataclasses.replace(config, layers=layers), kept


def transplant(
    config: EncoderConfig, params: Params, old: pathlib.Path, new: pathlib.Path, seed: int
) -> tuple[EncoderConfig, Params]:  # fmt: skip
    """The encoder with token vectors for the tokenizer in directory `new`; `old` holds the one that it was made with.

    A piece starts as the mean of the vectors of what the old tokenizer makes of it; special tokens keep their own. A piece
    that the old one does not know in full starts at random, about the mean of the old vectors with their spread.
    """
    if config.kind != "transformer" or config.untied:
        raise UserError(
            "encoder.new_vocabulary keeps the layers of a transformer with one tower; name such a checkpoint"
        )
    theirs, ours = (tokenizers.Tokenizer.from_file(str(home / "tokenizer.json")) for home in (old, new))
    theirs.no_padding()
    specials_old, specials_new = specials(old), specials(new)
    table_VxD = np.asarray(params["embeddings"]["word"])
    unknown = {theirs.token_to_id(specials_old["unk"])}
    pieces = ours.get_vocab(with_added_tokens=True)
    rng = hashing.rng(seed, "new vocabulary")
    out_VxD = rng.normal(table_VxD.mean(0), table_VxD.std(0), (len(pieces), table_VxD.shape[1])).astype(np.float32)
    by_name = {name: theirs.token_to_id(specials_old[kind]) for kind, name in specials_new.items()}
    for piece, row in pieces.items():
        text = piece.replace(BLANK, " ").strip()
        ids = [by_name[piece]] if piece in by_name else theirs.encode(text, add_special_tokens=False).ids
        if ids and None not in ids and (piece in by_name or not unknown & {*ids}):
            out_VxD[row] = table_VxD[ids].mean(axis=0)
    params = {**params, "embeddings": {**params["embeddings"], "word": jnp.asarray(out_VxD)}}
    return dataclasses.replace(config, vocab_size=len(pieces)), params


def specials(directory: pathlib.Path) -> dict[str, str]:
    """{kind: token} of a tokenizer's special tokens (SPECIAL).

    Raises:
      UserError: one of them is not there.
    """
    found = read_json(directory / "tokenizer_config.json") or {}
    tokens = {kind: found.get(f"{kind}_token") for kind in SPECIAL}
    tokens = {kind: token["content"] if isinstance(token, dict) else token for kind, token in tokens.items()}
    if lacking := [kind for kind, token in tokens.items() if not token]:
        raise UserError(f"encoder.new_vocabulary: the tokenizer in {directory} has no {lacking[0]} token; name another checkpoint")  # fmt: skip
    return tokens


def around(directory: pathlib.Path) -> tuple[str, str]:
    """The tokens that a checkpoint's layers are used to before and behind a text."""
    found = specials(directory)
    return found["cls"], found["sep"]
