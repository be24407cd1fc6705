import numpy as np

from jdmdr.corpus import article
from jdmdr.library import _held_out


def test_global_rows_name_language_and_passage(library):
    assert library.langs == ["en", "sw"] and library.bases.tolist() == [0, 24, 48]
    lang, row = library.locate(np.array([0, 23, 24, 47]))
    assert lang.tolist() == [0, 0, 1, 1] and row.tolist() == [0, 23, 0, 23]


def test_training_queries_know_their_passages_and_their_row(library):
    training = library.training_queries(0.0, seed=0)
    assert len(training) == sum(len(library.queries(lang, "train")[0]) for lang in library.langs)
    for place, query in enumerate(training):
        assert query.row == place and not query.held_out
        lang, row = library.locate(query.positives)
        assert set(lang) == {query.lang}
        # in tinypedia, query a-p-k belongs to passage a#p
        a, p, _ = query.qid.split("-")
        assert library.collections[query.lang].docid(int(row[0])) == f"{a}#{p}"


def test_held_out_articles_are_the_same_in_every_language_and_never_trained_on(library):
    training = library.training_queries(0.3, seed=1)
    articles = {(q.lang, q.qid.split("-")[0]): q.held_out for q in training}
    for (_, name), held_out in articles.items():
        assert articles[0, name] == articles[1, name] == held_out
    share = np.mean([q.held_out for q in training])
    assert 0.2 < share < 0.45
    other = library.training_queries(0.3, seed=2)
    assert [q.held_out for q in other] != [q.held_out for q in training]


def test_at_least_one_article_is_held_out_and_never_all():
    assert len(_held_out(["a", "b", "a"], 0.01, 0)) == 1
    assert len(_held_out(["a", "b"], 1.0, 0)) == 1
    assert _held_out(["a"], 0.5, 0) == set() == _held_out([], 0.5, 0) == _held_out(["a", "b"], 0.0, 0)
    assert article("x#1") == "x"


def test_judged_splits_leave_out_train(library):
    assert library.judged_splits() == ["dev", "test"]
