"""Passage vectors that are taken over instead of made: of an earlier working directory, or computed elsewhere.

A working directory's are taken only for the encoder and the passages that they were made with, and by links where the file
system has them. Of vectors computed elsewhere nothing but the width and the docids can be checked.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdmdr import encoders, models, workdir
from jdmdr.corpus import Collection
from jdmdr.retrievers import named_rows
from jdmdr.types import UserError

KEY = "encode.passages"
STAGES = ("embeddings", "embeddings-warmup")  # of a working directory, the first that is there
PASSAGES = "passages"
TOKENIZER_PARTS = ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")  # padding is no part of it


def origin(
    config: encoders.EncoderConfig, params: Any, section: Any, tokenizer_dir: pathlib.Path, side: str = "passage"
) -> dict[str, Any]:  # fmt: skip
    """What made the vectors of a side: the tower's parameters and everything else that they depend on.

    Args:
      section: the recipe's `encoder` keys.
    """
    tokenizer = workdir.read_json(tokenizer_dir / "tokenizer.json")
    tower = encoders.build(config).tower(params, side)
    return {
        "parameters_sha256": models.fingerprint(tower),
        "tokenizer_sha256": workdir.digest({key: tokenizer[key] for key in TOKENIZER_PARTS}),
        "width": config.embedding_width,
        "pooling": config.pooling,
        "normalize": config.normalize,
        f"{side}_prompt": section[f"{side}_prompt"],
        f"{side}_length": section[f"{side}_length"],
    }


def files(source: pathlib.Path, langs: Sequence[str]) -> tuple[pathlib.Path, ...]:
    """The files that tell whether the vectors at `source` have changed."""
    manifests = [source / stage / workdir.MANIFEST for stage in STAGES]
    external = [source / f"{lang}.{PASSAGES}.{suffix}" for lang in langs for suffix in ("npy", "txt")]
    return next(((path,) for path in manifests if path.is_file()), tuple(path for path in external if path.is_file()))


def take(
    source: pathlib.Path, own: pathlib.Path, langs: Sequence[str], collections: Sequence[Collection],
    made_by: Mapping[str, Any], out_dir: pathlib.Path,
) -> None:  # fmt: skip
    """Puts the vectors at `source` into `out_dir`, as `encode.encode_shard` would have left them.

    Args:
      own: this working directory, whose corpus the vectors must be of.
      made_by: `origin` of this working directory's encoder.

    Raises:
      UserError: the vectors are of another encoder, of other passages, or of another width.
    """
    if not source.is_dir():
        raise UserError(f"{KEY} is {source}, which is no directory; name a workdir, or a directory of vectors")
    stage = next((stage for stage in STAGES if (source / stage / workdir.MANIFEST).is_file()), None)
    if stage:
        _check_encoder(source, stage, made_by)
        _check_corpus(source, own, langs)
        for lang in langs:
            link(source / stage / lang, out_dir / lang)
        return
    for lang, collection in zip(langs, collections, strict=True):
        docids = collection.docids(np.arange(len(collection)))
        vectors_CxD = named_rows(KEY, source, f"{lang}.{PASSAGES}", "docid", docids)
        if vectors_CxD.shape[1] != made_by["width"]:
            raise UserError(
                f"{KEY}: {source / f'{lang}.{PASSAGES}.npy'} is {vectors_CxD.shape[1]} wide, but the queries' embeddings "
                f"are {made_by['width']}; set encoder.projection to {vectors_CxD.shape[1]}, or take another encoder"
            )
        with workdir.atomic(out_dir / lang / f"{PASSAGES}-00000.npy") as path, open(path, "wb") as handle:
            np.save(handle, vectors_CxD)


def link(donor: pathlib.Path, out_dir: pathlib.Path) -> None:
    """The shards of one language's passages from another stage's directory."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in donor.glob(f"{PASSAGES}-*.npy"):
        workdir.link(path, out_dir / path.name)


def _check_encoder(source: pathlib.Path, stage: str, made_by: Mapping[str, Any]) -> None:
    theirs = workdir.counts_of(source, stage).get(PASSAGES, {})
    if different := next((key for key, value in made_by.items() if theirs.get(key) != value), None):
        found, wanted = (str(of.get(different))[:12] for of in (theirs, made_by))
        raise UserError(
            f"{KEY}: the vectors in {source / stage} were made by another encoder ({different} is {found} there and "
            f"{wanted} here); start from that workdir's export, or leave {KEY} empty"
        )


def _check_corpus(source: pathlib.Path, own: pathlib.Path, langs: Sequence[str]) -> None:
    theirs, ours = (workdir.read_json(place / "corpus" / workdir.MANIFEST) or {} for place in (source, own))
    if not theirs:
        raise UserError(
            f"{KEY}: {source} has embeddings and no corpus/{workdir.MANIFEST}, so whose they are is unknown"
        )
    for key in ("fields", "separator"):
        found, wanted = (of["settings"][key] for of in (theirs, ours))
        if found != wanted:
            raise UserError(f"{KEY}: data.{key} was {found!r} in {source} and is {wanted!r} here")
    for lang in langs:
        name = f"{lang}/passages.jsonl"
        if theirs["files"].get(name) != ours["files"][name]:
            raise UserError(
                f"{KEY}: the passages of {lang} in {source} are not those of data.root; docids or texts differ"
            )
