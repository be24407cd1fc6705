import numpy as np
import pytest

from jdmdr import encode, metrics, mine
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
    retrievers = {
        name: finished._retriever(name, LANG, "train", c.index, c.factory) for name in c.retrievers.split(",")
    }
    collection = finished.library.collections[INDEX]
    return mine.mine_language(queries, rows, base, retrievers, c, collection, LANG, out_dir)


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


def test_dense_scores_and_the_lowest_positive_are_inner_products(queries, rows, base, mined, vectors):
    for q, (query, row) in enumerate(zip(queries, rows, strict=True)):
        dense_C = vectors[1] @ vectors[0][row]
        np.testing.assert_allclose(mined[0].dense_scores_QxK[q], dense_C[mined[0].rows_QxK[q]], atol=1e-6)
        assert mined[0].positive_score_Q[q] == pytest.approx(dense_C[query.positives - base].min(), abs=1e-6)


def test_without_a_dense_retriever_there_are_no_dense_scores(finished, queries, rows, base, tmp_path):
    found = run(finished, queries, rows, base, tmp_path, retrievers="bm25")
    assert np.isnan(found.dense_scores_QxK).all() and np.isnan(found.positive_score_Q).all()
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
    for stored, returned in zip(mine.read_mined(out_dir, LANG), found, strict=True):
        np.testing.assert_array_equal(stored, returned)
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
        mine.mine(finished.library, [], None, settings(finished), tmp_path)
