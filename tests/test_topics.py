import numpy as np
import pytest

from jdmdr import encode, topics
from jdmdr.types import UserError


def label(finished, out_dir, training=None, **changes):
    keys = finished.config.topics.copy_and_resolve_references().unlock()
    keys.update({"scope": "language", **changes})
    embeddings = finished.directory / "embeddings-warmup"
    training = finished.training if training is None else training
    return topics.label(finished.library, training, embeddings, keys, 0, out_dir)


@pytest.mark.parametrize("scope", ["language", "dataset"])
def test_every_passage_gets_its_nearest_centroid(finished, tmp_path, scope):
    counts = label(finished, tmp_path, scope=scope)
    for lang in finished.library.langs:
        centroids = np.load(tmp_path / f"{lang}.centroids.npy")
        blocks = encode.shards(finished.directory / "embeddings-warmup" / lang, "passages")
        cosines_CxK = np.concatenate(blocks).astype(np.float32) @ centroids.T
        found = np.load(tmp_path / f"{lang}.npy")
        np.testing.assert_array_equal(found, cosines_CxK.argmax(axis=1))
        assert counts[lang] == [int((found == topic).sum()) for topic in range(4)]
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
