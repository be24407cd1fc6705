import numpy as np
import pytest

from jdmdr.index import fusion
from jdmdr.index.fusion import choose_weight, concat_vectors, dense_rescore, fuse, inverse_sigma_weights
from jdmdr.types import NO_HIT, Hits, UserError


def random_hits(rng, queries, depth, collection=30):
    rows = np.stack([rng.permutation(collection)[:depth] for _ in range(queries)])
    scores = -np.sort(-rng.standard_normal((queries, depth)).astype(np.float32), axis=1)
    lengths = rng.integers(0, depth + 1, queries)
    beyond = np.arange(depth) >= lengths[:, None]
    return Hits(np.where(beyond, NO_HIT, rows), np.where(beyond, -np.inf, scores).astype(np.float32))


def oracle(hits, method, weights, k, rescore=None):
    """Query by query, dictionary by dictionary."""
    rankings = []
    for q in range(len(hits[0].rows_QxK)):
        lists = [
            {int(row): float(score) for row, score in zip(h.rows_QxK[q], h.scores_QxK[q], strict=True) if row != NO_HIT}
            for h in hits
        ]
        total = dict.fromkeys(sorted({row for found in lists for row in found}), 0.0)
        for m, (found, weight) in enumerate(zip(lists, weights, strict=True)):
            if method == "rrf":
                for rank, row in enumerate(found, 1):
                    total[row] += weight / (60 + rank)
                continue
            if rescore:
                values = {row: float(rescore[m](np.array([q]), np.array([row]))[0]) for row in total}
            else:
                values = {row: found.get(row, min(found.values(), default=0.0)) for row in total}
            numbers = list(values.values())
            if not numbers or max(numbers) == min(numbers):
                continue
            centre, width = (
                (np.mean(numbers), np.std(numbers))
                if method == "zscore"
                else (min(numbers), max(numbers) - min(numbers))
            )
            for row in total:
                total[row] += weight * (values[row] - centre) / width
        rankings.append(sorted(total.items(), key=lambda item: (-np.float32(item[1]), item[0]))[:k])
    return rankings


def assert_equals_oracle(fused, rankings):
    for rows_K, scores_K, ranking in zip(*fused, rankings, strict=True):
        found = rows_K != NO_HIT
        assert rows_K[found].tolist() == [row for row, _ in ranking]
        np.testing.assert_allclose(scores_K[found], [score for _, score in ranking], rtol=1e-5, atol=1e-6)
        assert np.isneginf(scores_K[~found]).all()


@pytest.mark.parametrize("chunk_entries", [1, 50, 65_536])
@pytest.mark.parametrize("method", fusion.METHODS)
def test_fusion_equals_the_oracle_for_any_chunk_size(method, chunk_entries, monkeypatch):
    monkeypatch.setattr(fusion, "_CHUNK_ENTRIES", chunk_entries)
    rng = np.random.default_rng(0)
    hits = [random_hits(rng, 25, depth) for depth in (12, 7, 10)]
    weights = [1.0, 0.5, 2.0]
    assert_equals_oracle(fuse(hits, method, weights, 15), oracle(hits, method, weights, 15))


def test_rrf_by_hand():
    dense = Hits(np.array([[7, 3]]), np.array([[9.0, 8.0]], np.float32))
    lexical = Hits(np.array([[3, NO_HIT]]), np.array([[1.0, -np.inf]], np.float32))
    fused = fuse([dense, lexical], "rrf", [1, 1], 3)
    assert fused.rows_QxK.tolist() == [[3, 7, NO_HIT]]
    np.testing.assert_allclose(fused.scores_QxK[0, :2], [1 / 62 + 1 / 61, 1 / 61], rtol=1e-6)


def test_a_row_missing_from_a_list_counts_as_the_lists_minimum():
    dense = Hits(np.array([[0, 1]]), np.array([[1.0, 0.0]], np.float32))
    lexical = Hits(np.array([[2, 1]]), np.array([[30.0, 10.0]], np.float32))
    fused = fuse([dense, lexical], "minmax", [0.6, 0.4], 3)
    assert fused.rows_QxK.tolist() == [[0, 2, 1]]
    np.testing.assert_allclose(fused.scores_QxK, [[0.6, 0.4, 0.0]])


def test_equal_fused_scores_are_ordered_by_row():
    first = Hits(np.array([[5, 9]]), np.ones((1, 2), np.float32))
    second = Hits(np.array([[9, 5]]), np.ones((1, 2), np.float32))
    for method in fusion.METHODS:
        assert fuse([first, second], method, [1, 1], 2).rows_QxK.tolist() == [[5, 9]]


@pytest.mark.parametrize("method", ["zscore", "minmax"])
def test_exact_dense_scores_replace_missing_ones(method, monkeypatch):
    monkeypatch.setattr(fusion, "_CHUNK_ENTRIES", 40)
    rng = np.random.default_rng(1)
    hits = [random_hits(rng, 12, 8), random_hits(rng, 12, 8)]
    vectors = [rng.standard_normal((30, 4)).astype(np.float32) for _ in hits]
    queries = [rng.standard_normal((12, 4)).astype(np.float32) for _ in hits]
    rescore = [dense_rescore(q, [v[:13], v[13:]]) for q, v in zip(queries, vectors, strict=True)]
    assert_equals_oracle(fuse(hits, method, [1, 2], 10, rescore), oracle(hits, method, [1, 2], 10, rescore))
    query_N, row_N = np.array([3, 0, 3]), np.array([29, 12, 13])
    np.testing.assert_allclose(rescore[0](query_N, row_N), (queries[0][query_N] * vectors[0][row_N]).sum(1), rtol=1e-5)


def test_concatenated_vectors_score_the_weighted_sum_of_cosines():
    rng = np.random.default_rng(0)
    queries, passages = ([rng.standard_normal((n, d)) * 9 for d in (5, 3)] for n in (4, 6))
    weights = [0.7, 0.3]
    scores = concat_vectors(queries, weights) @ concat_vectors(passages, weights).T

    def cosine(q, p):
        return (q / np.linalg.norm(q, axis=1, keepdims=True)) @ (p / np.linalg.norm(p, axis=1, keepdims=True)).T

    expected = sum(w * cosine(q, p) for w, q, p in zip(weights, queries, passages, strict=True))
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert np.isfinite(concat_vectors([np.zeros((1, 5)), np.ones((1, 3))], weights)).all()


def test_inverse_sigma_weights_widen_a_narrow_band_of_scores():
    scores = np.random.default_rng(0).standard_normal((10, 20))
    padded = np.concatenate([scores, np.full((10, 2), -np.inf)], axis=1)
    np.testing.assert_allclose(inverse_sigma_weights([padded, 0.25 * scores + 0.8]), [0.2, 0.8])
    with pytest.raises(UserError, match="system 1 .* same score"):
        inverse_sigma_weights([scores, np.ones((10, 20))])


def test_choose_weight_takes_the_one_closest_to_a_half_within_a_standard_error_of_the_best():
    dense = Hits(np.array([[0, 1]]), np.array([[1.0, 0.0]], np.float32))
    lexical = Hits(np.array([[1, 0]]), np.array([[1.0, 0.0]], np.float32))
    grid = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]

    def choose(mean, error=0.0):
        return choose_weight(dense, lexical, lambda fused: (float(mean(fused)), error), "minmax", grid)

    def dense_first(fused):
        return fused.rows_QxK[0, 0] == 0

    def top_score(fused):  # 1, .8, .6, .6, .8, 1 over the grid
        return fused.scores_QxK[0, 0]

    assert choose(dense_first) == 0.6
    assert choose(lambda fused: not dense_first(fused)) == 0.4
    assert choose(lambda fused: 0) == 0.4
    assert choose(top_score) == 0.0
    assert choose(top_score, error=0.25) == 0.2
    assert choose(top_score, error=0.45) == 0.4


def test_weights_and_methods_that_do_not_fit_are_refused():
    hits = random_hits(np.random.default_rng(0), 2, 3)
    with pytest.raises(UserError, match="2 systems are fused"):
        fuse([hits, hits], "rrf", [1], 3)
    with pytest.raises(UserError, match=">= 0"):
        fuse([hits, hits], "rrf", [1, -1], 3)
    with pytest.raises(UserError, match="rrf, zscore, minmax"):
        fuse([hits], "borda", [1], 3)
