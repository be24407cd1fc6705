"""What both sides of a comparison start from: one checkpoint, one collection, and the same batches in the same order.

The losses of the two sides differ only where a batch holds a passage twice or a second positive of a query, which
jdmdr's masks and sentence-transformers' takes as negatives. Such batches are left out, so that the rest is one loss.
"""

from __future__ import annotations

import itertools
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from configs import default
from jdmdr import hashing, pipeline, sources
from jdmdr.batches import Ragged, TrainingSet
from jdmdr.corpus import passage_text
from jdmdr.library import Library, TrainingQuery
from jdmdr.recipe import Recipe
from jdmdr.types import UserError
from jdmdr.workdir import write_json

NEGATIVES = 3  # drawn for a query that has none of its own
TRIES = 100  # planned batches per batch wanted


def cut_checkpoint(source: pathlib.Path, directory: pathlib.Path, layers: int, length: int) -> pathlib.Path:
    """Copies a sentence-transformers BERT with its first `layers` layers, no dropout and texts of `length` tokens."""
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(source, directory)
    config = json.loads((source / "config.json").read_text())
    dropout = {key: 0.0 for key in config if key.endswith("dropout_prob")}
    write_json(directory / "config.json", {**config, **dropout, "num_hidden_layers": layers})
    limits = json.loads((source / "sentence_bert_config.json").read_text())
    write_json(directory / "sentence_bert_config.json", {**limits, "max_seq_length": length})
    tensors = safetensors.numpy.load_file(source / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if _layer(name) < layers}
    safetensors.numpy.save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def _layer(name: str) -> int:
    found = re.search(r"\blayer\.(\d+)\.", name)
    return int(found[1]) if found else -1


def prepare(root: str, langs: str, checkpoint: pathlib.Path, length: int, directory: pathlib.Path) -> Recipe:
    """Reads and tokenises a data root by the ordinary stages; no query is held out."""
    config = default.get_config()
    with config.unlocked():
        config.data.root, config.data.langs, config.data.valid_share = root, langs, 0.0
        config.encoder.name = str(checkpoint)
        config.encoder.query_length = config.encoder.passage_length = length
    pipeline.run(config, directory, "tokens")
    return Recipe(config, directory)


def training_set(recipe: Recipe, seed: int) -> TrainingSet:
    """All training queries with the negatives that the data give, or with some drawn from their language."""
    pairs = sources.pairs(recipe.training, recipe.stores)
    return pairs._replace(negatives=Ragged.of(_negatives(q, recipe.library, seed) for q in recipe.training))


def _negatives(query: TrainingQuery, library: Library, seed: int) -> np.ndarray:
    if len(query.judged):
        return query.judged
    base, stop = library.bases[query.lang : query.lang + 2]
    others = np.setdiff1d(np.arange(base, stop), query.positives)
    return hashing.rng(seed, "drawn negatives", query.row).choice(others, min(NEGATIVES, len(others)), replace=False)


def section(**values: Any) -> ConfigDict:
    """The keys of a training run without weights."""
    found = default.training()
    found.objective.mode = "none"
    found.update(values)
    return found


def clean_steps(make_batch: Callable[[int], tuple[dict, dict]], count: int) -> list[int]:
    """The first `count` steps in whose batches every passage stands once and no query meets another of its positives.

    Raises:
      UserError: there are too few of them in the data.
    """
    clean = (step for step in range(TRIES * count) if _unmasked(make_batch(step)[0]))
    steps = list(itertools.islice(clean, count))
    if len(steps) < count:
        raise UserError(
            f"only {len(steps)} of the first {TRIES * count} batches are free of repeated passages; give more data with "
            "--data, or smaller batches"
        )
    return steps


def _unmasked(batch: dict[str, Any]) -> bool:
    known = (batch["positive_ids_BxM"] >= 0).sum(axis=1)
    return bool(batch["first_N"].all() and (known == 1).all())


def batch_texts(recipe: Recipe, batch: dict[str, Any]) -> list[dict[str, str]]:
    """The batch as rows of the columns that sentence-transformers trains on."""
    rows_BxP = batch["passage_ids_N"].reshape(len(batch["target_B"]), -1)
    names = columns(rows_BxP.shape[1])
    return [
        dict(zip(names, [recipe.training[index].text, *passage_texts(recipe.library, rows)], strict=True))
        for index, rows in zip(batch["query_index_B"], rows_BxP, strict=True)
    ]


def columns(passages_per_query: int) -> list[str]:
    """In the order that its loss relies on."""
    return ["query", "positive", *(f"negative_{k}" for k in range(1, passages_per_query))]


def passage_texts(library: Library, rows: Iterable[int]) -> list[str]:
    """Texts of passages by global row."""
    lang_N, local_N = library.locate(np.asarray(rows))
    return [
        passage_text(library.collections[lang].passage(int(row))) for lang, row in zip(lang_N, local_N, strict=True)
    ]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spread."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]
