import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdmdr import parallel
from jdmdr.index import resident
from jdmdr.types import NO_HIT, UserError

MESH = parallel.data_mesh()


def search(corpus, q_BxD, k, first=0, end=None, dtype="float32"):
    placed = resident.place([corpus], MESH, dtype)
    bounds = [np.full(len(q_BxD), value, np.int32) for value in (first, len(corpus) if end is None else end)]
    rows, scores = jax.jit(lambda placed, *x: resident.top_k(placed, x[0], k, x[1], x[2], MESH))(placed, q_BxD, *bounds)
    return np.asarray(rows), np.asarray(scores)


def oracle(corpus, q_BxD, k, first=0, end=None):
    """The best k of [first, end) by brute force, ties to the lower row, padded."""
    end = len(corpus) if end is None else end
    scores = q_BxD.astype(np.float64) @ corpus[first:end].T.astype(np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    missing = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(order + first, missing, constant_values=NO_HIT),
        np.pad(np.take_along_axis(scores, order, 1), missing, constant_values=-np.inf),
    )


def vectors(rows, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


@pytest.mark.parametrize(
    ("rows", "k", "first", "end"),
    [(1000, 10, 0, None), (1000, 200, 0, None), (130, 129, 0, None), (50, 60, 0, None), (1000, 10, 333, 340), (1, 1, 0, None)],
)  # fmt: skip
def test_finds_what_brute_force_finds(rows, k, first, end):
    corpus, queries = vectors(rows), vectors(3, seed=1)
    found, scores = search(corpus, queries, k, first, end)
    expected, expected_scores = oracle(corpus, queries, k, first, end)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-6)


def test_many_queries_are_searched_in_parts_that_fit(monkeypatch):
    corpus, queries = vectors(500), vectors(7, seed=1)
    whole = search(corpus, queries, 10)
    monkeypatch.setattr(resident, "MOST_SCORES", 3 * 512)
    for found, expected in zip(search(corpus, queries, 10), whole, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_ties_go_to_the_lower_row():
    corpus = np.tile(vectors(7), (60, 1))
    queries = vectors(2, seed=1)
    np.testing.assert_array_equal(search(corpus, queries, 100)[0], oracle(corpus, queries, 100)[0])
    np.testing.assert_array_equal(search(np.ones((300, 4), np.float32), np.ones((1, 4)), 5)[0], [[0, 1, 2, 3, 4]])


def test_padding_never_beats_negative_scores():
    corpus = -np.abs(vectors(5))
    found, scores = search(corpus, np.ones((1, 6), np.float32), 5)
    assert sorted(found[0].tolist()) == [0, 1, 2, 3, 4] and (scores < 0).all()


def test_bfloat16_finds_what_brute_force_finds_among_the_rounded_vectors():
    corpus, queries = vectors(1000, 32), vectors(4, 32, seed=1)
    rounded = [np.asarray(x.astype(jnp.bfloat16), np.float32) for x in (corpus, queries)]
    found, scores = search(corpus, queries, 50, dtype="bfloat16")
    expected, expected_scores = oracle(*rounded, 50)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-5, atol=1e-5)
    assert all(set(a) == set(b) for a, b in zip(found.tolist(), expected.tolist(), strict=True))


def test_int8_with_rescoring_keeps_the_float32_ranking():
    corpus, queries = vectors(3000, 64), vectors(8, 64, seed=1)
    found, scores = search(corpus, queries, 50, dtype="int8")
    expected, expected_scores = oracle(corpus, queries, 50)
    recall = np.mean([len(set(a) & set(b)) / 50 for a, b in zip(found.tolist(), expected.tolist(), strict=True)])
    assert recall > 0.99
    np.testing.assert_allclose(scores[:, :10], expected_scores[:, :10], rtol=1e-5)


def test_scores_of_pairs_are_exact_and_differentiable_in_the_queries():
    corpus, queries = vectors(300), vectors(3, seed=1)
    placed = resident.place([corpus[:100], corpus[100:]], MESH, "float32")
    rows = np.array([[0, 299, 150], [NO_HIT, 100, 99], [7, 7, NO_HIT]], np.int32)
    score = jax.jit(lambda q: resident.scores(placed, q, rows, MESH))
    expected = np.where(rows == NO_HIT, 0, np.einsum("bd,bmd->bm", queries, corpus[rows]))
    np.testing.assert_allclose(score(queries), expected, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda q: score(q).sum())(queries)
    np.testing.assert_allclose(gradient, (corpus[rows] * (rows != NO_HIT)[:, :, None]).sum(1), rtol=1e-5, atol=1e-6)


def test_a_row_that_is_not_finite_is_named():
    corpus = vectors(300)
    corpus[123, 2] = np.nan
    with pytest.raises(UserError, match="row 123 of the embeddings holds NaN"):
        resident.place([corpus[:50], corpus[50:]], MESH, "bfloat16")


def test_eight_devices_find_and_score_the_same():
    program = "import tests.test_resident as t; t.check_eight_devices()"
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_eight_devices():
    assert MESH.devices.size == 8
    test_finds_what_brute_force_finds(3000, 200, 700, 2900)
    test_finds_what_brute_force_finds(50, 60, 0, None)
    test_ties_go_to_the_lower_row()
    test_int8_with_rescoring_keeps_the_float32_ranking()
    test_scores_of_pairs_are_exact_and_differentiable_in_the_queries()
    import tests.test_adore as adore

    adore.test_the_step_searches_with_the_query_vectors_of_now("own", "float32")
    adore.test_the_gradient_reaches_the_queries_and_matches_finite_differences()
