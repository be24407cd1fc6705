import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from jdmdr import index
from jdmdr.index import SEARCHERS, ExactSearcher, FaissSearcher, exact
from jdmdr.index.bm25 import Bm25Searcher, tokenize_words
from jdmdr.metrics import evaluate_run
from jdmdr.types import NO_HIT, UserError

TINYPEDIA = Path(__file__).parents[1] / "third_party" / "tinypedia"


def one_device_mesh():
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def integer_vectors(seed, *shape):
    """Vectors whose inner products are exact in float32, with many ties."""
    return np.random.default_rng(seed).integers(-2, 3, shape).astype(np.float32)


def oracle(queries_QxD, collection_CxD, k):
    scores_QxC = queries_QxD @ collection_CxD.T
    order = np.lexsort((np.broadcast_to(np.arange(len(collection_CxD)), scores_QxC.shape), -scores_QxC), axis=1)[:, :k]
    return order, np.take_along_axis(scores_QxC, order, 1)


def dense_searcher(name, blocks):
    if name == "exact":  # small blocks, so that there are several
        return ExactSearcher(blocks, one_device_mesh(), block_rows=64, query_rows=8)
    return index.dense_searcher(name, blocks, one_device_mesh())


@pytest.fixture(scope="module")
def collection():
    vectors_CxD = integer_vectors(0, 157, 6)
    shards = np.split(vectors_CxD.astype(np.float16), [70, 70, 71, 150])  # one of them empty
    return vectors_CxD, shards


@pytest.mark.parametrize("name", ["exact", "faiss"])
def test_dense_searchers_give_the_oracles_ranking_ties_by_row(name, collection):
    vectors_CxD, shards = collection
    queries_QxD = np.concatenate([integer_vectors(1, 20, 6), np.zeros((1, 6), np.float32)])
    hits = dense_searcher(name, shards).search(queries_QxD, 500)  # more than the 157 rows there are
    rows, scores = oracle(queries_QxD, vectors_CxD, 157)
    np.testing.assert_array_equal(hits.rows_QxK, rows)
    np.testing.assert_array_equal(hits.scores_QxK, scores)
    assert hits.rows_QxK.dtype == np.int64 and hits.scores_QxK.dtype == np.float32


@pytest.mark.parametrize("k", [1, 10, 100])
def test_exact_search_breaks_ties_at_the_cut_by_row(collection, k):
    vectors_CxD, shards = collection
    queries_QxD = integer_vectors(2, 20, 6)
    hits = dense_searcher("exact", shards).search(queries_QxD, k)
    np.testing.assert_array_equal(hits.rows_QxK, oracle(queries_QxD, vectors_CxD, k)[0])


def test_exact_search_agrees_with_faiss_on_real_valued_vectors():
    rng = np.random.default_rng(0)
    vectors_CxD, queries_QxD = rng.standard_normal((300, 16), np.float32), rng.standard_normal((20, 16), np.float32)
    ours, theirs = (dense_searcher(name, [vectors_CxD]).search(queries_QxD, 10) for name in ("exact", "faiss"))
    np.testing.assert_array_equal(ours.rows_QxK, theirs.rows_QxK)
    np.testing.assert_allclose(ours.scores_QxK, theirs.scores_QxK, rtol=1e-5, atol=1e-5)


def test_exact_search_on_eight_devices_equals_one(tmp_path):
    script = """
import sys, jax, numpy as np
from jdmdr.index import ExactSearcher
assert jax.device_count() == 8
mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
data = np.load(sys.argv[1])
hits = ExactSearcher([data['a'], data['b']], mesh, block_rows=100, query_rows=8).search(data['q'], 30)
np.savez(sys.argv[2], **hits._asdict())
"""
    a, b, queries_QxD = integer_vectors(3, 130, 6), integer_vectors(4, 171, 6), integer_vectors(5, 19, 6)
    np.savez(tmp_path / "in.npz", a=a, b=b, q=queries_QxD)
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", script, tmp_path / "in.npz", tmp_path / "out.npz"], check=True, env=env)
    eight = np.load(tmp_path / "out.npz")
    one = dense_searcher("exact", [a, b]).search(queries_QxD, 30)
    np.testing.assert_array_equal(eight["rows_QxK"], one.rows_QxK)
    np.testing.assert_array_equal(eight["scores_QxK"], one.scores_QxK)


def test_exact_search_never_holds_queries_times_collection():
    chunks, chunk, k, block = 64, 8, 5, 64
    best = (np.zeros((chunks, chunk, k), np.float32), np.zeros((chunks, chunk, k), np.int32))
    lowered = exact._merge_block.lower(
        best, np.zeros((chunks, chunk, 4), np.float32), np.zeros((block, 4), np.float16), 0, 10_000, one_device_mesh()
    )
    all_scores = chunks * chunk * block * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes < all_scores / 2


def test_a_search_compiles_once_for_all_blocks_and_chunks(collection):
    _, shards = collection
    searcher = ExactSearcher(shards, one_device_mesh(), block_rows=16, query_rows=4)
    searcher.search(integer_vectors(6, 12, 6), 3)
    compiled = exact._merge_block._cache_size()
    searcher.search(integer_vectors(7, 12, 6), 3)
    assert exact._merge_block._cache_size() == compiled


def test_rows_beyond_two_to_the_24_stay_exact():
    first = 2**30 + 1  # not a float32 integer
    best = (np.full((1, 1, 1), -np.inf, np.float32), np.full((1, 1, 1), NO_HIT, np.int32))
    _, rows = exact._merge_block(
        best,
        np.ones((1, 1, 1), np.float32),
        np.array([[1.0], [3.0], [2.0]], np.float32),
        first,
        2**31 - 1,
        one_device_mesh(),
    )
    assert rows.item() == first + 1


@pytest.mark.parametrize("name", ["exact", "faiss"])
def test_no_queries_give_no_hits(name, collection):
    assert dense_searcher(name, collection[1]).search(np.zeros((0, 6), np.float32), 7).rows_QxK.shape == (0, 7)


@pytest.mark.parametrize("name", ["exact", "faiss"])
def test_vectors_that_are_not_finite_are_refused(name, collection):
    with pytest.raises(UserError, match="query vector 1 holds NaN"):
        dense_searcher(name, collection[1]).search(np.array([[0.0] * 6, [np.nan] * 6]), 3)
    vectors_CxD = integer_vectors(0, 20, 6)
    vectors_CxD[11] = np.nan
    with pytest.raises(UserError, match="NaN or infinity"):
        dense_searcher(name, [vectors_CxD]).search(integer_vectors(1, 3, 6), 3)


@pytest.mark.parametrize("name", ["exact", "faiss"])
def test_input_that_does_not_fit_is_one_sentence(name, collection):
    with pytest.raises(UserError, match="width 6"):
        dense_searcher(name, collection[1]).search(np.zeros((2, 5)), 3)
    with pytest.raises(UserError, match="different widths"):
        dense_searcher(name, [np.zeros((2, 5)), np.zeros((2, 6))])
    with pytest.raises(UserError, match="no passages"):
        dense_searcher(name, [np.zeros((0, 5))])
    with pytest.raises(UserError, match="at least one hit"):
        dense_searcher(name, collection[1]).search(np.zeros((2, 6)), 0)


def test_unknown_searchers_and_factory_strings_are_named():
    with pytest.raises(UserError, match=", ".join(SEARCHERS)):
        index.dense_searcher("annoy", [], one_device_mesh())
    with pytest.raises(UserError, match="'Nonsense'"):
        FaissSearcher([np.zeros((2, 4), np.float32)], "Nonsense")
    with pytest.raises(UserError, match="'warp=9'"):
        FaissSearcher([np.zeros((2, 4), np.float32)], "Flat", "warp=9")


def test_a_missing_faiss_points_to_exact_search(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="index=exact"):
        FaissSearcher([np.zeros((2, 4), np.float32)])


def test_a_trained_faiss_index_finds_the_same_hits_when_it_probes_every_list():
    vectors_CxD = np.random.default_rng(0).standard_normal((400, 8)).astype(np.float32)
    queries_QxD = vectors_CxD[:10] + 0.01
    hits = FaissSearcher(np.split(vectors_CxD, 4), "IVF4,Flat", "nprobe=4").search(queries_QxD, 5)
    np.testing.assert_array_equal(hits.rows_QxK, oracle(queries_QxD, vectors_CxD, 5)[0])
    few = FaissSearcher(np.split(vectors_CxD, 4), "IVF4,Flat").search(queries_QxD, 400)
    assert (few.rows_QxK == NO_HIT).any()
    np.testing.assert_array_equal(few.rows_QxK == NO_HIT, np.isneginf(few.scores_QxK))


# ---------------------------------------------------------------- BM25


def bm25_oracle(texts, query, k1=0.9, b=0.4):
    bags = [Counter(tokenize_words(text)) for text in texts]
    lengths = [sum(bag.values()) for bag in bags]
    mean = sum(lengths) / len(lengths)
    scores = np.zeros(len(texts))
    for word in tokenize_words(query):
        df = sum(word in bag for bag in bags)
        idf = math.log(1 + (len(texts) - df + 0.5) / (df + 0.5))
        for i, bag in enumerate(bags):
            if bag[word]:
                scores[i] += idf * bag[word] / (bag[word] + k1 * (1 - b + b * lengths[i] / mean))
    return scores


def test_bm25_scores_follow_lucenes_formula():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefgh"), rng.integers(0, 12))) for _ in range(40)]
    queries = ["a b", "c c d", "e unknown h"]
    hits = Bm25Searcher(texts).search(queries, 40)
    for rows_K, scores_K, query in zip(*hits, queries, strict=True):
        expected_C = bm25_oracle(texts, query)
        found = rows_K != NO_HIT
        np.testing.assert_allclose(scores_K[found], expected_C[rows_K[found]], rtol=1e-5)
        assert set(rows_K[found]) == set(np.flatnonzero(expected_C))
        assert (np.diff(scores_K[found]) <= 0).all()


def test_bm25_breaks_ties_by_row_and_at_the_cut_too():
    hits = Bm25Searcher(["a", "b", "a", "a a", "a", "a"]).search(["a"], 3)
    assert hits.rows_QxK.tolist() == [[3, 0, 2]]


def test_bm25_leaves_places_empty_where_no_word_is_shared():
    searcher = Bm25Searcher(["river lake", "", "lake"])
    hits = searcher.search(["lake", "", "?!", "mountain"], 9)
    assert hits.rows_QxK.tolist() == [[2, 0, NO_HIT]] + [[NO_HIT] * 3] * 3
    assert np.isneginf(hits.scores_QxK[1:]).all()


@pytest.mark.parametrize("texts", [["only one"], ["", "  "]])
def test_bm25_takes_one_passage_and_passages_without_words(texts, recwarn):
    hits = Bm25Searcher(texts).search(["one", ""], 5)
    assert hits.rows_QxK.shape == (2, len(texts))
    assert (hits.rows_QxK[0, 0] == 0) == (texts == ["only one"])
    assert not recwarn.list


def test_bm25_refuses_a_collection_without_passages():
    with pytest.raises(UserError, match="no passages"):
        Bm25Searcher([])


def test_a_saved_bm25_index_has_the_same_bytes_and_finds_the_same(tmp_path):
    texts = ["ナイル川 river", "Amazon river", "ป่าฝน"]
    for name in "ab":
        Bm25Searcher(iter(texts), k1=1.2, b=0.75).save(tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files and all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    queries = ["river ナイル", "ป่า"]
    loaded = Bm25Searcher.load(tmp_path / "a").search(queries, 3)
    fresh = Bm25Searcher(texts, 1.2, 0.75).search(queries, 3)
    np.testing.assert_array_equal(loaded.rows_QxK, fresh.rows_QxK)
    np.testing.assert_array_equal(loaded.scores_QxK, fresh.scores_QxK)
    with pytest.raises(UserError, match="no BM25 index"):
        Bm25Searcher.load(tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ("The Nile, 6,600 km!", ["the", "nile", "6", "600", "km"]),
        ("snake_case", ["snake", "case"]),
        ("ﬁn x² ＡＢＣ", ["fin", "x2", "abc"]),
        ("cafe\u0301", ["café"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("বাংলা ১২৩", ["বাংলা", "১২৩"]),
        ("ক\u200dষ soft\u00adhyphen", ["কষ", "softhyphen"]),
        ("東京タワー", ["東京", "京タ", "タワ", "ワー"]),
        ("A型 水", ["a", "型", "水"]),
        ("ไทย", ["ไท", "ทย"]),
        ("ខ្មែរ", ["ខ្", "្ម", "មែ", "ែរ"]),
        ("한국어 위키", ["한국어", "위키"]),
        ("❤\ufe0f", []),
        ("", []),
    ],
)
def test_words_of_every_script(text, words):
    assert tokenize_words(text) == words


@pytest.mark.parametrize(
    "text", ["x" * 100_000, "ก" * 100_000, "क्" * 50_000, "a\u0301" * 50_000, "a" + "\u0301\u0327" * 50_000]
)
def test_a_word_of_100_000_characters_takes_linear_time(text):
    tokenize_words("é")  # builds the character classes
    start = time.perf_counter()
    tokenize_words(text)
    assert time.perf_counter() - start < 1.5  # quadratic normalisation takes 8 s


def tinypedia_lines(*parts):
    return TINYPEDIA.joinpath(*parts).read_text(encoding="utf-8").splitlines()


def test_bm25_reaches_the_published_ndcg_on_tinypedia():
    figures = {"en": 0.678, "hi": 0.681, "th": 0.691, "sw": 0.724}
    for lang, expected in figures.items():
        passages = [json.loads(line) for line in tinypedia_lines("corpus", f"{lang}.jsonl")]
        topics = [line.split("\t") for line in tinypedia_lines("topics", f"{lang}.dev.tsv")]
        qrels = {}
        for line in tinypedia_lines("qrels", f"{lang}.dev.tsv"):
            qid, _, docid, relevance = line.split()
            qrels.setdefault(qid, {})[docid] = int(relevance)
        hits = Bm25Searcher(f"{p['title']} {p['text']}" for p in passages).search([text for _, text in topics], 100)
        run = {
            qid: {passages[row]["docid"]: score for row, score in zip(rows_K, scores_K, strict=True) if row != NO_HIT}
            for (qid, _), rows_K, scores_K in zip(topics, *hits, strict=True)
        }
        values = evaluate_run(qrels, run, ["ndcg@10"])["ndcg@10"]
        assert np.mean(list(values.values())) == pytest.approx(expected, abs=0.005)
