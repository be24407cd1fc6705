"""Topic labels of every passage, by one of three methods.

    python -m jdmdr.topics --config configs/dmdr.py --workdir runs/dmdr

    kmeans    spherical k-means over the embeddings of the positives; every passage gets the nearest centroid
    embed     logistic regression over embeddings, from labelled examples of any language that the encoder knows
    fasttext  two fastText classifiers, as in the paper (English alone)

The last two give the 12 topics of `topic_table.py`. Source: Huang et al. (EMNLP 2025), section 3.5 and appendix.
"""

from __future__ import annotations

import collections
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jdmdr import encode, hashing, reading
from jdmdr.kmeans import assign, spherical_kmeans
from jdmdr.library import Library, TrainingQuery
from jdmdr.tokenizer import blocks
from jdmdr.topic_table import CODES, DBPEDIA, OTHERS, YAHOO, classifier_ids, id_of, topic_ids
from jdmdr.types import UserError

RULES = ("yahoo_first", "confidence")
PENALTIES = (1.0, 10.0, 100.0, 1e3, 1e4)  # scikit-learn's C, tried on the examples

Embed = Callable[[list[str]], np.ndarray]  # passages' texts -> NxD


def label(
    library: Library, training: list[TrainingQuery], embeddings: pathlib.Path, embed: Embed, config: Any, seed: int,
    out_dir: pathlib.Path,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """Writes `LANG.npy`, the topic (uint8) of every passage of a language with training queries.

    Args:
      embeddings: the store of the encoder that `embed` embeds with.
      config: the recipe's `topics` keys.

    Returns:
      {language: {topic: passages}}.
    """
    langs = sorted({q.lang for q in training})  # one without training queries needs no topics
    found = METHODS[config.method](library, training, langs, embeddings, embed, config, seed, out_dir)
    counts = {}
    for index, topics in found:
        np.save(out_dir / f"{library.langs[index]}.npy", topics.astype(np.uint8))
        bins = np.bincount(topics, minlength=len(names(config))).tolist()
        counts[library.langs[index]] = dict(zip(names(config), bins, strict=True))
    return counts


def names(config: Any) -> list[str]:
    """What the topics are called, by id."""
    return [str(i) for i in range(config.clusters)] if config.method == "kmeans" else CODES


def files(config: Any) -> tuple[pathlib.Path, ...]:
    """The files that the method reads; raises UserError where one is not named or not there."""
    keys = {"kmeans": (), "embed": ("examples",), "fasttext": ("yahoo", "dbpedia")}[config.method]
    for key in keys:
        if not config[key] or not pathlib.Path(config[key]).is_file():
            found = f"is {config[key]!r}, which is no file" if config[key] else "is empty"
            raise UserError(f"topics.{key} {found}; topics.method={config.method} needs it (docs/dmdr.md)")
    return tuple(pathlib.Path(config[key]) for key in keys)


def read_topics(directory: pathlib.Path, library: Library) -> np.ndarray:
    """Topic of every passage by global row, uint8; 0 in languages without labels."""
    parts = []
    for lang, collection in zip(library.langs, library.collections, strict=True):
        path = directory / f"{lang}.npy"
        parts.append(np.load(path) if path.exists() else np.zeros(len(collection), np.uint8))
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------- kmeans


def kmeans(library, training, langs, embeddings, embed, config, seed, out_dir) -> Iterator[tuple[int, np.ndarray]]:
    """`scope` says over what one set of clusters is made: `language` (each its own, for encoders that do not align
    languages) or `dataset`. Also writes `LANG.centroids.npy`."""
    if config.scope not in ("language", "dataset"):
        raise UserError(f"topics.scope is {config.scope!r}; it is one of language, dataset")
    if not 1 <= config.clusters <= 256:
        raise UserError(f"topics.clusters is {config.clusters}; it is a number from 1 to 256")
    positives = {i: np.unique(np.concatenate([q.positives for q in training if q.lang == i])) for i in langs}
    vectors = {
        i: encode.passage_vectors(embeddings / library.langs[i], rows - library.bases[i])
        for i, rows in positives.items()
    }
    if config.scope == "dataset":
        everything = np.concatenate(list(vectors.values()))
        shared = spherical_kmeans(
            everything, config.clusters, hashing.stable_hash(seed, "topics") % 2**31, config.iterations
        )
    for i in langs:
        if config.scope == "dataset":
            centroids = shared
        else:
            lang_seed = hashing.stable_hash(seed, "topics", library.langs[i]) % 2**31
            centroids = spherical_kmeans(vectors[i], config.clusters, lang_seed, config.iterations)
        np.save(out_dir / f"{library.langs[i]}.centroids.npy", centroids)
        blocks = encode.passage_blocks(embeddings / library.langs[i])
        yield i, np.concatenate([assign(block, centroids) for block in blocks])


# ----------------------------------------------------------------------------------------------------------------- embed


def from_examples(
    library, training, langs, embeddings, embed, config, seed, out_dir
) -> Iterator[tuple[int, np.ndarray]]:
    """Multinomial logistic regression; Others where no topic reaches `least_probability`."""
    texts, ids = zip(*read_examples(pathlib.Path(config.examples), config.mapping), strict=True)
    numbers = collections.Counter(ids)
    if len(numbers) < 2:
        raise UserError(f"{config.examples} has examples of one topic alone; give some of two or more")
    if alone := [CODES[topic] for topic, number in numbers.items() if number < 2]:
        raise UserError(
            f"{config.examples} has one example alone of {', '.join(alone)}; give two or more of every topic"
        )
    classifier = fit(embed(list(texts)), np.array(ids))
    for i in langs:
        parts = []
        for block in encode.passage_blocks(embeddings / library.langs[i]):
            probabilities_CxK = classifier.predict_proba(block)
            best_C = classifier.classes_[probabilities_CxK.argmax(axis=1)]
            parts.append(np.where(probabilities_CxK.max(axis=1) < config.least_probability, OTHERS, best_C))
        yield i, np.concatenate(parts)


def fit(vectors_NxD: np.ndarray, ids_N: np.ndarray) -> Any:
    """The classifier, its penalty chosen by cross-validated log-loss on the examples.

    Embeddings have norm 1: under one fixed penalty few examples leave all probabilities near 1 / topics, and every
    passage would be Others.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    folds = StratifiedKFold(min(5, int(np.unique(ids_N, return_counts=True)[1].min())))  # every topic in every fold
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": PENALTIES}, scoring="neg_log_loss", cv=folds)
    return search.fit(vectors_NxD, ids_N).best_estimator_


def read_examples(path: pathlib.Path, mapping: str) -> list[tuple[str, int]]:
    """(text, topic id) of the lines `label TAB text`, or of JSON objects with `label` and `text`."""
    ids, found = topic_ids(mapping), []
    for number, line in reading.lines(path):
        where = f"{path}, line {number}"
        if line.lstrip().startswith("{"):
            try:
                row = json.loads(line)
                name, text = str(row["label"]), str(row["text"])
            except (ValueError, KeyError) as error:
                raise UserError(f'{where}: no JSON object with "label" and "text" ({error})') from None
        else:
            name, tab, text = line.partition("\t")
            if not tab:
                raise UserError(f"{where}: no TAB; write label TAB text, or a JSON object with both")
        found.append((text, id_of(name, ids, where)))
    if not found:
        raise UserError(f"{path} has no examples; write lines label TAB text")
    return found


# -------------------------------------------------------------------------------------------------------------- fasttext


def fasttext(library, training, langs, embeddings, embed, config, seed, out_dir) -> Iterator[tuple[int, np.ndarray]]:
    """The paper's rule (`yahoo_first`): Yahoo's label where it stands for a topic, else DBpedia's. `confidence`: the more
    probable of the two, Others below `least_probability`. The text of a passage is labelled, without its title."""
    yahoo, dbpedia = (
        (_load_fasttext(config[key]), classifier_ids(labels, config.mapping), config[key])
        for key, labels in (("yahoo", YAHOO), ("dbpedia", DBPEDIA))
    )
    for i in langs:
        collection = library.collections[i]
        texts = (_one_line(collection.passage(row).text) for row in range(len(collection)))
        topics = [
            np.where(y_B != OTHERS, y_B, d_B)
            if config.rule == "yahoo_first"
            else np.where(np.maximum(p_B, r_B) < config.least_probability, OTHERS, np.where(p_B >= r_B, y_B, d_B))
            for (y_B, p_B), (d_B, r_B) in ((_predict(*yahoo, part), _predict(*dbpedia, part)) for part in blocks(texts))
        ]
        yield i, np.concatenate(topics)


def _load_fasttext(path: str) -> Any:
    try:
        import fasttext
    except ImportError:
        raise UserError("topics.method=fasttext needs the package fasttext; pip install 'jdmdr[fasttext]'") from None
    fasttext.FastText.eprint = lambda *words: None  # it warns of nothing on every load
    try:
        return fasttext.load_model(path)
    except ValueError as error:
        raise UserError(f"{path} is no fastText model ({error}); name a .bin or .ftz file") from None


def _predict(model: Any, ids: dict[str, int], path: str, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Topic ids and probabilities; an empty text is Others."""
    labels, probabilities = model.predict(texts)
    for found in labels:
        if found and found[0] not in ids:
            raise UserError(f"{path} answers {found[0]!r}, which is no label of its kind; is it the other classifier?")
    topics = [ids[found[0]] if text and found else OTHERS for text, found in zip(texts, labels, strict=True)]
    scores = [float(p[0]) if text and len(p) else 0.0 for text, p in zip(texts, probabilities, strict=True)]
    return np.array(topics), np.array(scores)


def _one_line(text: str) -> str:
    return " ".join(text.replace('"', "").splitlines()).strip()


METHODS = {"kmeans": kmeans, "embed": from_examples, "fasttext": fasttext}


if __name__ == "__main__":
    from jdmdr import pipeline

    pipeline.command("topics", __doc__)
