import numpy as np
import pytest

from jdmdr import kmeans
from jdmdr.kmeans import assign, spherical_kmeans
from jdmdr.types import UserError


def clustered(seed, k=5, each=40, width=16):
    rng = np.random.default_rng(seed)
    centres = np.linalg.qr(rng.standard_normal((width, k)))[0].T
    labels = np.repeat(np.arange(k), each)
    vectors = centres[labels] + 0.05 * rng.standard_normal((k * each, width))
    return (vectors * rng.uniform(0.1, 10, (len(vectors), 1))).astype(np.float32), labels


def assert_same_partition(labels, truth):
    pairs = set(zip(labels, truth, strict=True))
    assert len(pairs) == len(set(labels)) == len(set(truth))


@pytest.mark.parametrize("seed", range(5))
def test_well_separated_directions_are_found_whatever_their_lengths(seed):
    vectors, truth = clustered(seed)
    assert_same_partition(assign(vectors, spherical_kmeans(vectors, 5, seed)), truth)


def test_the_objective_never_falls_with_more_iterations():
    vectors = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    fits = [(unit @ spherical_kmeans(vectors, 7, 0, i).T).max(axis=1).sum() for i in (0, 1, 2, 5, 30)]
    assert np.all(np.diff(fits) > -1e-3) and fits[-1] > fits[0] + 1


def test_centroids_are_the_unit_means_of_their_clusters():
    vectors = np.random.default_rng(1).standard_normal((200, 6)).astype(np.float32)
    centroids = spherical_kmeans(vectors, 4, 3, iterations=200)
    labels = assign(vectors, centroids)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for label in range(4):
        mean = unit[labels == label].sum(axis=0)
        np.testing.assert_allclose(centroids[label], mean / np.linalg.norm(mean), atol=1e-5)


def test_chunks_of_any_size_and_half_precision_give_the_same_labels(monkeypatch):
    vectors, _ = clustered(2)
    vectors = vectors.astype(np.float16)
    whole = assign(vectors, spherical_kmeans(vectors, 5, 1))
    monkeypatch.setattr(kmeans, "_CHUNK_ROWS", 7)
    np.testing.assert_array_equal(assign(vectors, spherical_kmeans(vectors, 5, 1)), whole)


def test_the_same_seed_gives_the_same_centroids():
    vectors = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    np.testing.assert_array_equal(spherical_kmeans(vectors, 6, 5), spherical_kmeans(vectors, 6, 5))
    assert not np.array_equal(spherical_kmeans(vectors, 6, 5), spherical_kmeans(vectors, 6, 6))


def test_an_empty_cluster_restarts_at_the_farthest_vector(monkeypatch):
    truth = np.repeat([0, 1], 20)
    vectors = np.eye(2, dtype=np.float32)[truth] + np.linspace(0.1, 0.2, 40, dtype=np.float32)[:, None]
    monkeypatch.setattr(kmeans, "_plus_plus", lambda *_: np.array([[0.6, 0.8], [-1, 0]], np.float32))
    assert_same_partition(assign(vectors, spherical_kmeans(vectors, 2, 0)), truth)


@pytest.mark.parametrize("vectors", [np.eye(3), np.ones((50, 3)), np.zeros((4, 3))])
def test_fewer_directions_than_clusters_leave_clusters_empty(vectors):
    centroids = spherical_kmeans(vectors, 5, 0)
    assert centroids.shape == (5, 3) and np.isfinite(centroids).all()
    assert len(set(assign(vectors, centroids))) == len(np.unique(vectors, axis=0))


def test_nothing_to_cluster_is_refused():
    with pytest.raises(UserError, match="no vectors"):
        spherical_kmeans(np.zeros((0, 3)), 2, 0)
    with pytest.raises(UserError, match="at least 1"):
        spherical_kmeans(np.ones((2, 3)), 0, 0)
