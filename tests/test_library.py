import numpy as np

from jdmdr import corpus
from jdmdr.corpus import article
from jdmdr.datasets import LanguageFiles
from jdmdr.library import Library, _held_out


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


def test_the_query_sets_are_those_of_all_languages(library):
    assert library.topics() == ["dev", "test", "train"]


def test_docids_are_unique_where_no_language_has_anothers(library, tmp_path):
    assert not library.docids_are_unique and library.others("en") == []
    for i, lang in enumerate(("aa", "bb", "cc")):
        rows = [{"docid": f"{lang}{n}", "text": "t"} for n in range(3 + i)]
        corpus.write_jsonl(tmp_path / "in" / f"{lang}.jsonl", rows)
        corpus.ingest(
            lang, LanguageFiles([tmp_path / "in" / f"{lang}.jsonl"], {}, {}, None), tmp_path / "unique" / lang
        )
    unique = Library(tmp_path / "unique")
    assert unique.docids_are_unique and [len(c) for c in unique.others("bb")] == [3, 5]
