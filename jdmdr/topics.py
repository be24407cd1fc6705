"""Topic labels: spherical k-means over the embeddings of the positives; every passage gets the nearest centroid.

python -m jdmdr.topics --config configs/dmdr.py --workdir runs/dmdr --config.data.root=DIR
"""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from jdmdr import encode, hashing
from jdmdr.kmeans import assign, spherical_kmeans
from jdmdr.library import Library, TrainingQuery
from jdmdr.types import UserError


def label(
    library: Library,
    training: list[TrainingQuery],
    embeddings: pathlib.Path,
    config: Any,
    seed: int,
    out_dir: pathlib.Path,
) -> dict[str, Any]:
    """Writes `{lang}.npy`, the topic (uint8) of every passage of a language, and the centroids.

    `scope` says over what one set of clusters is made: `language` (each its own, for encoders that do not align
    languages) or `dataset`. Returns the passages per topic and language.
    """
    if config.scope not in ("language", "dataset"):
        raise UserError(f"topics.scope is {config.scope!r}; it is one of language, dataset")
    if not 1 <= config.clusters <= 256:
        raise UserError(f"topics.clusters is {config.clusters}; it is a number from 1 to 256")
    blocks = [encode.shards(embeddings / lang, "passages") for lang in library.langs]
    positives = [
        np.unique(np.concatenate([q.positives for q in training if q.lang == i] or [np.zeros(0, np.int64)]))
        for i in range(len(library.langs))
    ]
    vectors = [
        encode.gather_rows(blocks[i], rows - library.bases[i]) if len(rows) else None
        for i, rows in enumerate(positives)
    ]
    if config.scope == "dataset":
        everything = np.concatenate([v for v in vectors if v is not None])
        shared = spherical_kmeans(
            everything, config.clusters, hashing.stable_hash(seed, "topics") % 2**31, config.iterations
        )
    counts = {}
    for i, lang in enumerate(library.langs):
        if vectors[i] is None:  # a language without training queries needs no topics
            continue
        if config.scope == "dataset":
            centroids = shared
        else:
            lang_seed = hashing.stable_hash(seed, "topics", lang) % 2**31
            centroids = spherical_kmeans(vectors[i], config.clusters, lang_seed, config.iterations)
        topics = np.concatenate([assign(np.asarray(block, np.float32), centroids) for block in blocks[i]]).astype(
            np.uint8
        )
        np.save(out_dir / f"{lang}.npy", topics)
        np.save(out_dir / f"{lang}.centroids.npy", centroids)
        counts[lang] = np.bincount(topics, minlength=config.clusters).tolist()
    return counts


def read_topics(directory: pathlib.Path, library: Library) -> np.ndarray:
    """Topic of every passage by global row, uint8; 0 in languages without labels."""
    parts = []
    for lang, collection in zip(library.langs, library.collections, strict=True):
        path = directory / f"{lang}.npy"
        parts.append(np.load(path) if path.exists() else np.zeros(len(collection), np.uint8))
    return np.concatenate(parts)


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("topics", __doc__)
