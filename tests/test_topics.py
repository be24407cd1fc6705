import pathlib
import shutil

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict

from jdmdr import encode, pipeline, topics, workdir
from jdmdr.corpus import article
from jdmdr.topic_table import CODES, DBPEDIA, OTHERS, TOPICS, YAHOO, classifier_ids, topic_ids
from jdmdr.types import UserError


def label(finished, out_dir, training=None, embed=None, **changes):
    keys = finished.config.topics.copy_and_resolve_references().unlock()
    keys.update({"scope": "language", **changes})
    embeddings = finished.directory / "embeddings-warmup"
    training = finished.training if training is None else training
    return topics.label(finished.library, training, embeddings, embed, keys, 0, out_dir)


@pytest.mark.parametrize("scope", ["language", "dataset"])
def test_every_passage_gets_its_nearest_centroid(finished, tmp_path, scope):
    counts = label(finished, tmp_path, scope=scope)
    for lang in finished.library.langs:
        centroids = np.load(tmp_path / f"{lang}.centroids.npy")
        blocks = encode.shards(finished.directory / "embeddings-warmup" / lang, "passages")
        cosines_CxK = np.concatenate(blocks).astype(np.float32) @ centroids.T
        found = np.load(tmp_path / f"{lang}.npy")
        np.testing.assert_array_equal(found, cosines_CxK.argmax(axis=1))
        assert counts[lang] == {str(topic): int((found == topic).sum()) for topic in range(4)}
        assert found.dtype == np.uint8


def test_languages_share_their_centroids_under_scope_dataset_alone(finished, tmp_path):
    for scope, shared in (("language", False), ("dataset", True)):
        label(finished, tmp_path, scope=scope)
        en, sw = (np.load(tmp_path / f"{lang}.centroids.npy") for lang in ("en", "sw"))
        assert np.array_equal(en, sw) == shared


def test_centroids_are_made_of_the_positives_alone(finished, tmp_path):
    positives = np.unique(np.concatenate([q.positives for q in finished.training if q.lang == 0]))
    label(finished, tmp_path, clusters=len(positives))
    blocks = encode.shards(finished.directory / "embeddings-warmup" / "en", "passages")
    expected = encode.gather_rows(blocks, positives)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    centroids = np.load(tmp_path / "en.centroids.npy")
    assert (np.max(expected @ centroids.T, axis=1) > 0.999).all()


def test_topics_of_all_languages_stand_behind_one_another(finished, tmp_path):
    label(finished, tmp_path)
    parts = [np.load(tmp_path / f"{lang}.npy") for lang in ("en", "sw")]
    np.testing.assert_array_equal(topics.read_topics(tmp_path, finished.library), np.concatenate(parts))


@pytest.mark.parametrize("scope", ["language", "dataset"])
def test_language_without_training_queries_has_topic_0(finished, tmp_path, scope):
    english = [q for q in finished.training if q.lang == 0]
    assert list(label(finished, tmp_path, english, scope=scope)) == ["en"]
    found = topics.read_topics(tmp_path, finished.library)
    assert len(found) == finished.library.bases[-1] and not found[finished.library.bases[1] :].any()


def test_same_seed_gives_the_same_bytes(finished, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        label(finished, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [({"scope": "batch"}, "topics.scope is 'batch'"), ({"clusters": 0}, "topics.clusters is 0"),
     ({"clusters": 257}, "topics.clusters is 257; it is a number from 1 to 256")],
)  # fmt: skip
def test_settings_out_of_range_are_refused(finished, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        label(finished, tmp_path, **changes)


# -------------------------------------------------------------------------------------------------------- the 12 topics


def test_the_table_holds_every_label_of_both_classifiers_once():
    assert len(TOPICS) == 12 and CODES[OTHERS] == "OT" and TOPICS[OTHERS].name == "Others"
    assert sorted(label for topic in TOPICS for label in topic.dbpedia) == sorted(DBPEDIA) and len(DBPEDIA) == 14
    yahoo = [label for topic in TOPICS for label in topic.yahoo]
    assert set(YAHOO) - set(yahoo) == {"Society & Culture", "Family & Relationships"} and len(YAHOO) == 10


def test_the_fixed_mapping_moves_three_labels_and_no_other():
    paper, fixed = topic_ids("paper"), topic_ids("fixed")
    moved = {label: (CODES[paper[label]], CODES[fixed[label]]) for label in paper if paper[label] != fixed[label]}
    assert moved == {"OfficeHolder": ("BF", "PG"), "EducationalInstitution": ("SM", "JE"), "Company": ("CI", "BF")}


def test_classifiers_answer_by_name_or_number_with_fasttexts_prefix():
    ids = classifier_ids(DBPEDIA, "paper")
    assert ids["__label__14"] == ids["WrittenWork"] == CODES.index("BL") and ids["__label__9"] == CODES.index("GE")
    ids = classifier_ids(YAHOO, "paper")
    assert ids["__label__Science_&_Mathematics"] == ids["2"] == CODES.index("SM") and ids["__label__1"] == OTHERS


def write_examples(finished, path):
    collection = finished.library.collections[0]
    lines = []
    for row in range(len(collection)):
        number = int(article(collection.docid(row)))
        lines.append(f"{'GE' if number < 4 else 'Athlete'}\t{collection.passage(row).text}\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


EXAMPLES = pathlib.Path(__file__).parents[1] / "configs" / "topics.tsv"


def clustered(ids, rng):
    """Unit vectors around a direction of each topic's own, as an encoder gives."""
    vectors = 0.5 * np.eye(len(CODES), 32)[ids] + rng.normal(0, 0.1, (len(ids), 32))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_the_penalty_is_the_one_of_the_best_cross_validated_log_loss():
    ids = np.array([i for _, i in topics.read_examples(EXAMPLES, "paper")])
    vectors = clustered(ids, np.random.default_rng(0))
    losses = {}
    for penalty in topics.PENALTIES:
        folds = StratifiedKFold(5)
        model = LogisticRegression(max_iter=1000, C=penalty)
        probabilities = cross_val_predict(model, vectors, ids, cv=folds, method="predict_proba")
        values = -np.log(probabilities[np.arange(len(ids)), ids])
        losses[penalty] = np.mean([values[rows].mean() for _, rows in folds.split(vectors, ids)])
    found = topics.fit(vectors, ids).C
    assert found == min(losses, key=losses.get)


def test_the_shipped_examples_cover_the_topics_and_leave_few_of_their_kind_to_others():
    ids = np.array([i for _, i in topics.read_examples(EXAMPLES, "paper")])
    assert sorted(set(ids)) == list(range(len(CODES))) and np.bincount(ids).min() >= 5
    model = topics.fit(clustered(ids, np.random.default_rng(0)), ids)
    new = np.repeat(np.arange(len(CODES)), 20)
    probabilities = model.predict_proba(clustered(new, np.random.default_rng(1)))
    assert (probabilities.max(axis=1) >= 0.35).mean() > 0.8


def test_embedded_examples_label_by_the_most_probable_topic_or_others(finished, tmp_path):
    path = write_examples(finished, tmp_path / "examples.tsv")
    blocks = {lang: encode.shards(finished.directory / "embeddings-warmup" / lang, "passages") for lang in ("en", "sw")}
    vectors = {lang: np.concatenate(parts).astype(np.float32) for lang, parts in blocks.items()}
    counts = label(
        finished, tmp_path, embed=lambda texts: vectors["en"], method="embed", examples=str(path), least_probability=0.6
    )
    ids = [CODES.index("GE") if i < 12 else CODES.index("SP") for i in range(24)]
    model = topics.fit(vectors["en"], np.array(ids))
    for lang in ("en", "sw"):
        probabilities = model.predict_proba(vectors[lang])
        expected = np.where(probabilities.max(axis=1) < 0.6, OTHERS, model.classes_[probabilities.argmax(axis=1)])
        np.testing.assert_array_equal(np.load(tmp_path / f"{lang}.npy"), expected)
        assert counts[lang] == {code: int((expected == i).sum()) for i, code in enumerate(CODES)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("GE\tText\nNowhere\tText\n", "line 2: 'Nowhere' is no topic"),
        ("GE text\n", "line 1: no TAB"),
        ('{"label": "GE"}\n', 'no JSON object with "label" and "text"'),
        ("", "has no examples"),
        ("GE\ta\nGE\tb\n", "examples of one topic alone"),
        ("GE\ta\nGE\tb\nSP\tc\n", "one example alone of SP"),
    ],
)
def test_bad_examples_are_refused_with_their_line(finished, tmp_path, content, message):
    path = tmp_path / "examples.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        label(finished, tmp_path, embed=lambda texts: np.eye(len(texts)), method="embed", examples=str(path))


def test_examples_may_be_json_and_carry_the_labels_of_either_classifier(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text('{"label": "__label__Company", "text": "a"}\n{"label": "Health", "text": "b"}\nBL\tc\n')
    found = topics.read_examples(path, "fixed")
    assert [(text, CODES[i]) for text, i in found] == [("a", "BF"), ("b", "LH"), ("c", "BL")]


def test_a_missing_file_is_told_before_any_work(finished):
    config = finished.config.topics.copy_and_resolve_references().unlock()
    config.method = "embed"
    with pytest.raises(UserError, match="topics.examples is empty; topics.method=embed needs it"):
        topics.files(config)
    config.examples = "/no/such.tsv"
    with pytest.raises(UserError, match="topics.examples is '/no/such.tsv', which is no file"):
        topics.files(config)


def train_fasttext(fasttext, path, labels):
    lines = [f"__label__{name} {words} {words}\n" for name, words in labels.items() for _ in range(60)]
    path.with_suffix(".txt").write_text("".join(lines))
    fasttext.train_supervised(str(path.with_suffix(".txt")), epoch=25, lr=0.5, thread=1, verbose=0).save_model(
        str(path)
    )
    return str(path)


def test_fasttext_models_label_by_either_rule(finished, tmp_path):
    fasttext = pytest.importorskip("fasttext", reason="labels with fastText: pip install fasttext-wheel")
    yahoo = train_fasttext(
        fasttext, tmp_path / "y.bin", {"6": "ball goal team match", "1": "family custom village life"}
    )
    dbpedia = train_fasttext(fasttext, tmp_path / "d.bin", {"14": "novel poem book", "9": "family custom village life"})
    texts = ["ball goal team match", "village family custom life", ""]
    y, d = (
        (fasttext.load_model(p), classifier_ids(labels, "paper"), p)
        for p, labels in ((yahoo, YAHOO), (dbpedia, DBPEDIA))
    )
    ids, probabilities = topics._predict(*y, texts)
    assert [CODES[i] for i in ids] == ["SP", "OT", "OT"] and probabilities[0] > 0.5 and probabilities[2] == 0
    with pytest.raises(UserError, match="no label of its kind"):
        topics._predict(y[0], {"__label__x": 0}, yahoo, texts)
    for rule in topics.RULES:
        counts = label(finished, tmp_path, method="fasttext", yahoo=yahoo, dbpedia=dbpedia, rule=rule)
        assert sum(counts["en"].values()) == len(finished.library.collections[0])


def test_a_pipeline_labels_by_examples_and_names_the_topics(finished, tmp_path):
    directory = tmp_path / "workdir"
    shutil.copytree(finished.directory, directory)
    config = finished.config.copy_and_resolve_references().unlock()
    config.topics.method, config.topics.examples = "embed", str(write_examples(finished, tmp_path / "e.tsv"))
    pipeline.run(config, directory, "topics")
    counts = workdir.counts_of(directory, "topics")
    assert set(counts["en"]) == set(CODES) and counts["en"]["GE"] > 0
