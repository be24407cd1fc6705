import functools

import numpy as np
import pytest

from jdmdr import encode, metrics, mine, retrievers
from jdmdr.corpus import passage_text
from jdmdr.index.bm25 import Bm25Searcher
from jdmdr.types import NO_HIT, UserError

LANG, INDEX, DEPTH = "sw", 1, 8


def settings(finished, **changes):
    keys = finished.config.mine.copy_and_resolve_references().unlock()
    keys.update({"depth": DEPTH, "index": "exact", "pool": "corpus", **changes})
    return keys


@pytest.fixture(scope="module")
def base(finished):
    return int(finished.library.bases[INDEX])


@pytest.fixture(scope="module")
def queries(finished, base):
    """The language's training queries; the second is given two positives more than it has."""
    found = [q for q in finished.training if q.lang == INDEX and not q.held_out]
    more = np.setdiff1d(base + np.arange(4), found[1].positives)[:2]
    found[1] = found[1]._replace(positives=np.concatenate([found[1].positives, more]))
    return found


@pytest.fixture(scope="module")
def rows(finished, queries):
    return np.array([q.row - len(finished.library.queries("en", "train")[0]) for q in queries])


@pytest.fixture(scope="module")
def vectors(finished):
    """(queries, passages) as the store holds them, float32."""
    directory = finished.directory / "embeddings-warmup" / LANG
    blocks = [np.concatenate(encode.shards(directory, name)) for name in ("queries.train", "passages")]
    return [block.astype(np.float32) for block in blocks]


def run(finished, queries, rows, base, out_dir, **changes):
    c = settings(finished, **changes)
    search = functools.partial(retrievers.dense, index=c.index, factory=c.factory, mesh=finished.mesh)
    ensemble = {spec.name: finished._member(spec, LANG, search) for spec in retrievers.parse(c.retrievers)}
    collection = finished.library.collections[INDEX]
    weights = [1.0] * len(ensemble)
    return mine.mine_language(queries, rows, base, ensemble, c, weights, collection, LANG, out_dir, None)


@pytest.fixture(scope="module")
def mined(finished, queries, rows, base, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("mined")
    return run(finished, queries, rows, base, out_dir), out_dir


def ranking(scores_C, k):
    """Rows with a score above 0, best first, ties by lower row."""
    order = sorted(np.flatnonzero(scores_C > 0), key=lambda row: (-scores_C[row], row))
    return [int(row) for row in order[:k]]


def oracle(finished, vectors, queries, rows, base):
    """Reciprocal ranks of a brute-force search and of BM25, the positives taken out at the end."""
    collection = finished.library.collections[INDEX]
    texts = [passage_text(collection.passage(row)) for row in range(len(collection))]
    searcher = Bm25Searcher(texts)
    depth = DEPTH + max(len(q.positives) for q in queries)
    expected = []
    for query, row in zip(queries, rows, strict=True):
        dense_C = vectors[1] @ vectors[0][row]
        lexical = searcher.search([query.text], depth).rows_QxK[0]
        lists = [sorted(range(len(texts)), key=lambda r: (-dense_C[r], r))[:depth], lexical[lexical != NO_HIT].tolist()]
        fused = np.zeros(len(texts))
        for ranked in lists:
            for rank, found in enumerate(ranked, 1):
                fused[found] += 1 / (60 + rank)
        fused = fused.astype(np.float32)
        expected.append([r for r in ranking(fused, depth) if r + base not in query.positives][:DEPTH])
    return expected


def test_candidates_are_those_of_reciprocal_rank_fusion_by_hand(finished, vectors, queries, rows, base, mined):
    expected = oracle(finished, vectors, queries, rows, base)
    assert mined[0].rows_QxK.tolist() == expected


def test_no_positive_is_a_candidate_and_many_positives_cost_no_candidate(queries, base, mined):
    for query, found in zip(queries, mined[0].rows_QxK, strict=True):
        assert not set(found + base) & set(query.positives)
        assert (found != NO_HIT).all() and len(set(found)) == DEPTH
    assert len(queries[1].positives) >= 3


def test_pool_of_positives_keeps_what_is_a_positive_of_another_query(finished, queries, rows, base, mined, tmp_path):
    pool = {row - base for q in queries for row in q.positives}
    found = run(finished, queries, rows, base, tmp_path, pool="positives")
    for everything, candidates in zip(mined[0].rows_QxK, found.rows_QxK, strict=True):
        kept = [row for row in everything if row in pool]
        assert candidates[: len(kept)].tolist() == kept
        assert set(candidates[candidates != NO_HIT]) <= pool


def test_every_retrievers_scores_of_candidates_and_positives_are_kept(queries, rows, base, mined, vectors):
    found, out_dir = mined
    candidates_QxK, positives_QxM = found.by_retriever["warmup"]
    dense_QxK, lowest_Q = found.dense(retrievers.parse("bm25,warmup"))
    for q, (query, row) in enumerate(zip(queries, rows, strict=True)):
        dense_C = vectors[1] @ vectors[0][row]
        np.testing.assert_allclose(candidates_QxK[q], dense_C[found.rows_QxK[q]], atol=1e-6)
        known = len(query.positives)
        np.testing.assert_allclose(positives_QxM[q, :known], dense_C[query.positives - base], atol=1e-6)
        assert np.isnan(positives_QxM[q, known:]).all()
        assert lowest_Q[q] == positives_QxM[q, :known].min()
    np.testing.assert_array_equal(dense_QxK, candidates_QxK)


def test_bm25_knows_the_scores_of_what_it_listed_alone(finished, queries, mined):
    found, out_dir = mined
    run_ = metrics.read_run(out_dir / f"{LANG}.bm25.trec")
    collection = finished.library.collections[INDEX]
    unknown = 0
    for query, rows_K, scores_K in zip(queries, found.rows_QxK, found.by_retriever["bm25"][0], strict=True):
        for docid, score in zip(collection.docids(rows_K), scores_K.tolist(), strict=True):
            expected = run_.get(query.qid, {}).get(docid, np.nan)
            assert np.float32(expected) == score or (np.isnan(expected) and np.isnan(score))
            unknown += np.isnan(score)
    assert unknown


def test_without_a_dense_retriever_there_are_no_dense_scores(finished, queries, rows, base, tmp_path):
    found = run(finished, queries, rows, base, tmp_path, retrievers="bm25")
    dense_QxK, lowest_Q = found.dense(retrievers.parse("bm25"))
    assert np.isnan(dense_QxK).all() and np.isnan(lowest_Q).all()
    assert (found.scores_QxK[found.rows_QxK == NO_HIT] == -np.inf).all()


def test_faiss_and_exact_search_give_the_same_candidates(finished, queries, rows, base, mined, tmp_path):
    found = run(finished, queries, rows, base, tmp_path, index="faiss")
    np.testing.assert_array_equal(found.rows_QxK, mined[0].rows_QxK)
    np.testing.assert_array_equal(found.scores_QxK, mined[0].scores_QxK)


def test_unknown_index_is_refused(finished, queries, rows, base, tmp_path):
    with pytest.raises(UserError, match="mine.index is 'annoy': choose one of exact, faiss"):
        run(finished, queries, rows, base, tmp_path, index="annoy")


def test_depth_beyond_the_corpus_gives_every_passage_but_the_positives(finished, queries, rows, base, tmp_path):
    found = run(finished, queries, rows, base, tmp_path, depth=100)
    passages = len(finished.library.collections[INDEX])
    for query, candidates in zip(queries, found.rows_QxK, strict=True):
        present = candidates[candidates != NO_HIT]
        assert sorted([*present, *(query.positives - base)]) == list(range(passages))


def test_runs_and_arrays_on_disk_are_what_was_mined(finished, queries, mined):
    found, out_dir = mined
    stored = mine.read_mined(out_dir, LANG, ["warmup", "bm25"])
    for kept, returned in zip(stored[:2], found[:2], strict=True):
        np.testing.assert_array_equal(kept, returned)
    for name, returned in found.by_retriever.items():
        for kept, values in zip(stored.by_retriever[name], returned, strict=True):
            np.testing.assert_array_equal(kept, values)
    collection = finished.library.collections[INDEX]
    for name in ("warmup", "bm25", "ensemble"):
        assert set(metrics.read_run(out_dir / f"{LANG}.{name}.trec")) <= {q.qid for q in queries}
    ensemble = metrics.read_run(out_dir / f"{LANG}.ensemble.trec")
    for query, rows_K, scores_K in zip(queries, found.rows_QxK, found.scores_QxK, strict=True):
        hits = ensemble[query.qid]
        assert [np.float32(hits[docid]) for docid in collection.docids(rows_K)] == scores_K.tolist()
    assert (out_dir / f"{LANG}.qids.txt").read_text().split() == [q.qid for q in queries]


def test_held_out_queries_are_not_mined(finished):
    for index, lang in enumerate(finished.library.langs):
        names = (finished.directory / "mine" / f"{lang}.qids.txt").read_text().split()
        assert names == [q.qid for q in finished.training if q.lang == index and not q.held_out]
        assert any(q.held_out for q in finished.training if q.lang == index)


def test_no_training_query_is_told_in_a_sentence(finished, tmp_path):
    with pytest.raises(UserError, match="no language has a training query"):
        mine.mine(finished.library, [], None, settings(finished), tmp_path, None)
