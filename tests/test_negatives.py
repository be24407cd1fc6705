import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from jdmdr import corpus, negatives, sources
from jdmdr.filters import rules_from_config
from jdmdr.mine import Mined
from jdmdr.retrievers import parse
from jdmdr.types import NO_HIT, UserError

RULES = {"near_duplicate": 0.9}


@pytest.fixture
def queries(library):
    return [q for q in library.training_queries(0.0, 0) if q.lang == 1]


def _mined(queries, rows_QxK):
    shape = rows_QxK.shape
    scores = np.where(rows_QxK == NO_HIT, -np.inf, np.linspace(1, 0.1, shape[1])).astype(np.float32)
    return Mined(rows_QxK, scores, {"warmup": (scores, np.full((len(queries), 1), 2, np.float32))})


def _select(library, queries, rows_QxK, count, pool="corpus", seed=0, sample="best", least=None):
    config = ConfigDict({"negatives": count, "pool": pool, "sample": sample, "least": least})
    found = negatives.select(
        _mined(queries, rows_QxK),
        parse("warmup"),
        queries,
        24,
        library.collections[1],
        config,
        rules_from_config(RULES),
        seed,
    )
    return found.negatives, found.counts


def test_best_candidates_come_first_with_their_mined_rank_and_score(library, queries):
    rows = np.stack([np.random.default_rng(i).permutation(24) for i in range(len(queries))])
    chosen, counts = _select(library, queries, rows, 5)
    for q, query in enumerate(queries):
        expected = [row for row in rows[q] if row + 24 not in query.positives][:5]
        assert chosen.rows_QxN[q].tolist() == expected
        assert [rows[q][rank - 1] for rank in chosen.rank_QxN[q]] == expected
    assert dict(counts["dropped"])["positive"] == len(queries) and counts["sources"]["random"] == 0
    assert counts["kept"] + len(queries) == counts["candidates"] == 24 * len(queries)


def test_a_uniform_sample_of_the_candidates_keeps_their_rank_and_score_best_first(library, queries):
    rows = np.stack([np.random.default_rng(i).permutation(24) for i in range(len(queries))])
    chosen, _ = _select(library, queries, rows, 5, sample="uniform")
    scores = np.linspace(1, 0.1, 24).astype(np.float32)
    beyond = 0
    for q, query in enumerate(queries):
        ranks = chosen.rank_QxN[q].tolist()
        assert ranks == sorted(set(ranks)) and rows[q][np.array(ranks) - 1].tolist() == chosen.rows_QxN[q].tolist()
        assert not set(chosen.rows_QxN[q] + 24) & set(query.positives)
        np.testing.assert_array_equal(chosen.score_QxN[q], scores[np.array(ranks) - 1])
        beyond += max(ranks) > 8
    assert beyond > 0


def test_short_queries_are_filled_with_judged_then_random_passages_never_a_positive_none_twice(library, queries):
    queries = [q._replace(judged=np.array([24, 25, 26])) for q in queries]
    chosen, counts = _select(library, queries, np.full((len(queries), 1), NO_HIT), 10)
    for q, query in enumerate(queries):
        rows = chosen.rows_QxN[q]
        sources = chosen.source_QxN[q]
        assert len(set(rows)) == 10 and not set(rows + 24) & set(query.positives)
        judged = set(query.judged - 24) - set(query.positives - 24)
        assert set(rows[sources == negatives.JUDGED]) == judged
        assert (np.diff(sources.astype(int)) >= 0).all()
        assert (chosen.rank_QxN[q] == 0).all() and np.isnan(chosen.score_QxN[q]).all()
    assert counts["sources"]["random"] == 10 * len(queries) - counts["sources"]["judged"]


def test_without_filling_a_query_keeps_what_it_has_and_too_few_keep_it_from_training(library, queries, tmp_path):
    rows = np.full((len(queries), 6), NO_HIT)
    for q in range(len(queries)):
        others = [row for row in range(24) if row + 24 not in queries[q].positives]
        rows[q, : q % 4] = others[: q % 4]
    chosen, counts = _select(library, [q._replace(judged=np.array([24, 25])) for q in queries], rows, 5, least=2)
    assert [(chosen.rows_QxN[q] != NO_HIT).sum() for q in range(len(queries))] == [q % 4 for q in range(len(queries))]
    assert counts["sources"] == {"retrieval": counts["kept"], "llm": 0, "judged": 0, "random": 0}
    directory = negatives.version_dir(tmp_path, 0)
    negatives.write(directory, "sw", [q.qid for q in queries], chosen)
    held_out = queries[0]._replace(held_out=True)
    left = sources.with_negatives([held_out, *queries[1:]], library, directory, 2)
    assert left == [held_out, *(query for q, query in enumerate(queries) if q and q % 4 >= 2)]
    with pytest.raises(UserError, match="mine.least is 4, and no training query"):
        sources.with_negatives(queries, library, directory, 4)


def test_more_negatives_than_passages_leaves_places_empty(library, queries):
    chosen, _ = _select(library, queries, np.full((len(queries), 1), NO_HIT), 30)
    assert ((chosen.rows_QxN != NO_HIT).sum(1) == 24 - np.array([len(q.positives) for q in queries])).all()


def test_a_pool_of_positives_fills_with_other_queries_positives_only(library, queries):
    queries = queries[:6]
    chosen, counts = _select(library, queries, np.full((6, 1), NO_HIT), 30, pool="positives")
    allowed = {int(row) - 24 for q in queries for row in q.positives}
    for q, query in enumerate(queries):
        rows = chosen.rows_QxN[q]
        assert set(rows[rows != NO_HIT]) == allowed - {int(row) - 24 for row in query.positives}


def test_random_fill_depends_on_the_seed_alone(library, queries):
    empty = np.full((len(queries), 1), NO_HIT)
    first, again, other = (_select(library, queries, empty, 5, seed=s)[0].rows_QxN for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_store_and_jsonl_export_give_back_what_was_selected(library, queries, tmp_path):
    rows = np.tile(np.arange(24), (len(queries), 1))
    chosen, _ = _select(library, queries, rows, 4)
    directory = negatives.version_dir(tmp_path, 0)
    negatives.write(directory, "sw", [q.qid for q in queries], chosen)
    qids, stored = negatives.read(directory, "sw")
    assert qids == [q.qid for q in queries]
    for ours, theirs in zip(chosen, stored, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert negatives.read(directory, "none")[0] == []
    corpus.write_jsonl(
        tmp_path / "rows.jsonl", negatives.training_rows(queries, "sw", 24, library.collections[1], chosen)
    )
    row = json.loads((tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert row["query"] == queries[0].text and row["lang"] == "sw"
    assert [p["docid"] for p in row["negative_passages"]] == library.collections[1].docids(chosen.rows_QxN[0])
    assert row["negative_passages"][0]["source"] == "retrieval" and row["negative_passages"][0]["text"]
