"""Named splits: what is searched for which queries, and which judgments count there."""

from pathlib import Path

import numpy as np
import pytest

from jdmdr import corpus, datasets
from jdmdr.library import Library
from jdmdr.splits import Split, Target, members, parse, resolve
from jdmdr.types import UserError

XQUAD_R = Path(__file__).parents[2] / "shared" / "data" / "xquad-r"


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture
def make(tmp_path):
    """A library of `{lang: docids}` with topics {lang: {name: qids}} and qrels {lang: {name: lines}}, and its files."""

    def run(docids, topics, qrels):
        for lang in docids:
            write(
                tmp_path / "in/corpus" / f"{lang}.jsonl",
                [f'{{"docid": "{d}", "text": "{d} text"}}' for d in docids[lang]],
            )
            for name, qids in topics.get(lang, {}).items():
                write(tmp_path / "in/topics" / f"{lang}.{name}.tsv", [f"{qid}\twhat?" for qid in qids])
            for name, lines in qrels.get(lang, {}).items():
                write(tmp_path / "in/qrels" / f"{lang}.{name}.tsv", lines)
        files = datasets.discover(tmp_path / "in")
        reports = {lang: corpus.write_passages(lang, files[lang], tmp_path / "out" / lang) for lang in files}
        library = Library(tmp_path / "out")
        for lang in files:
            corpus.write_queries(lang, files[lang], tmp_path / "out" / lang, reports[lang], library.others(lang))
        return library, files

    return run


@pytest.fixture
def parallel(make):
    """A docid means the same passage in every language, as in tinypedia."""
    docids = {"en": ["a", "b", "c"], "sw": ["a", "b"], "th": ["a", "d"]}
    topics = {lang: {"test": ["q1", "q2"]} for lang in docids}
    qrels = {"en": {"test": ["q1 0 a 1", "q2 0 c 1"]}, "sw": {"test": ["q1 0 a 1", "q1 0 z 1"]},
             "th": {"test": ["q1 0 a 1", "q1 0 d 0"]}}  # fmt: skip
    return make(docids, topics, qrels)


@pytest.fixture
def unique(make):
    """Every docid names one passage, and judgments are across languages, as in XQuAD-R."""
    docids = {"en": ["en-a", "en-b"], "sw": ["sw-a"], "th": ["th-a", "th-b"]}
    topics = {lang: {"test": ["q1", "q2"], "clean": ["q2"]} for lang in docids}
    every = [f"q{n} 0 {lang}-a 1" for n in (1, 2) for lang in docids]
    qrels = {lang: {"test": every, "mono": [f"q1 0 {lang}-a 1", f"q2 0 {lang}-a 1"]} for lang in docids}
    return make(docids, topics, qrels)


def test_a_split_names_topics_qrels_and_corpus():
    assert parse("clean=clean:test:pool, mono=test:mono:own,dev") == [
        Split("clean", "clean", "test", "pool"), Split("mono", "test", "mono", "own"), Split("dev", "dev", "dev", "own")
    ]  # fmt: skip
    assert parse("") == []


@pytest.mark.parametrize("text, says", [
    ("clean=clean:test", "'clean=clean:test' is no split; write NAME=TOPICS:QRELS:CORPUS"),
    ("a.b=c:d:own", "no split"),
    ("dev,dev=test:test:pool", "'dev' stands twice"),
])  # fmt: skip
def test_a_badly_written_split_is_told(text, says):
    with pytest.raises(UserError, match=says):
        parse(text)


def test_without_names_every_split_with_topics_and_qrels_is_taken(unique):
    assert resolve("", unique[1]) == [Split("test", "test", "test", "own")]


def test_one_file_with_the_queries_of_all_splits_has_those_that_are_judged(unique):
    files = {"en": unique[1]["en"]._replace(topics={}, queries="queries.jsonl")}
    assert resolve("", files) == [Split("mono", "mono", "mono", "own"), Split("test", "test", "test", "own")]
    assert resolve("x=test:mono:pool", files) == [Split("x", "test", "mono", "pool")]


@pytest.mark.parametrize("text, says", [
    ("x=tset:test:own", "x names the topics 'tset'; there are: clean, test"),
    ("x=test:clean:own", "the qrels 'clean'; there are: mono, none, test"),
    ("x=test:test:fr", "the corpus 'fr'; there are: en, own, parallel, pool, sw, th"),
    ("dev", "the topics 'dev'"),
])  # fmt: skip
def test_a_name_that_no_file_has_is_told(unique, text, says):
    with pytest.raises(UserError, match=says):
        resolve(text, unique[1])


def test_each_corpus_is_searched_by_the_languages_it_is_meant_for(unique):
    library, _ = unique
    assert members(library, "sw", "own") == ["sw"]
    assert members(library, "sw", "pool") == members(library, "sw", "parallel") == ["en", "sw", "th"]
    assert members(library, "sw", "en") == ["en"] and members(library, "en", "en") == []


def qrels_of(library, lang, text):
    return Target(library, lang, parse(text)[0]).qrels


def test_topics_restrict_the_qrels_and_the_corpus_tells_which_judgments_count(unique):
    library, _ = unique
    everywhere = {"en-a": 1, "sw-a": 1, "th-a": 1}
    assert qrels_of(library, "sw", "x=clean:test:pool") == {"q2": everywhere}
    assert qrels_of(library, "sw", "x=test:test:pool") == {"q1": everywhere, "q2": everywhere}
    assert qrels_of(library, "sw", "x=test:test:own") == {"q1": {"sw-a": 1}, "q2": {"sw-a": 1}}
    assert qrels_of(library, "sw", "x=test:test:en") == {"q1": {"en-a": 1}, "q2": {"en-a": 1}}
    assert qrels_of(library, "sw", "x=test:mono:pool") == {"q1": {"sw-a": 1}, "q2": {"sw-a": 1}}
    assert qrels_of(library, "sw", "x=test:mono:en") == {}  # nothing of it is searched


def test_shared_docids_name_the_own_language_or_all_as_the_corpus_says(parallel):
    library, _ = parallel
    assert qrels_of(library, "sw", "x=test:test:own") == {"q1": {"a": 1, "z": 1}}  # z is in no corpus: not retrieved
    assert qrels_of(library, "sw", "x=test:test:en") == {"q1": {"a": 1, "z": 1}}
    assert qrels_of(library, "sw", "x=test:test:pool") == {"q1": {"sw:a": 1, "sw:z": 1}}
    assert qrels_of(library, "sw", "x=test:test:parallel") == {"q1": {"en:a": 1, "sw:a": 1, "th:a": 1, "sw:z": 1}}
    assert qrels_of(library, "th", "x=test:test:parallel") == {"q1": {"en:a": 1, "sw:a": 1, "th:a": 1, "th:d": 0}}


@pytest.mark.parametrize("kind", ["parallel", "unique"])
def test_rows_of_a_pool_are_named_in_order_and_their_languages_known(kind, request):
    library, _ = request.getfixturevalue(kind)
    target = Target(library, "sw", Split("x", "test", "test", "pool"))
    names = target.docids(np.arange(len(target)))
    docids = [
        (lang, d) for lang, c in zip(library.langs, library.collections, strict=True) for d in c.docids(range(len(c)))
    ]
    assert names == [f"{lang}:{d}" if kind == "parallel" else d for lang, d in docids]
    order = np.random.default_rng(0).permutation(len(target))
    assert target.docids(order) == [names[i] for i in order]
    assert target.languages(names) == [lang for lang, _ in docids]
    if kind == "unique":
        assert target.languages(["nowhere"]) == [""]


@pytest.mark.skipif(not XQUAD_R.is_dir(), reason="needs XQuAD-R")
def test_xquad_r_is_a_pool_of_its_languages(tmp_path):
    """1,190 questions and 655 clean ones (its README), relevant once in every language."""
    files = datasets.discover(XQUAD_R, "en,es")
    assert "all" not in datasets.discover(XQUAD_R)
    reports = {lang: corpus.write_passages(lang, files[lang], tmp_path / lang, ("text", "context")) for lang in files}
    library = Library(tmp_path)
    for lang in files:
        corpus.write_queries(lang, files[lang], tmp_path / lang, reports[lang], library.others(lang))
    for text, queries in (("x=clean:test:pool", 655), ("x=test:mono:own", 1190), ("x=test:test:en", 1190)):
        qrels = qrels_of(library, "es", text)
        assert len(qrels) == queries
        held = [sum(docid[:2] in ("en", "es") for docid in judged) for judged in qrels.values()]
        assert set(held) == ({2} if "pool" in text else {1})
    assert library.collections[0].passage(0).text.count("The Panthers defense gave up") == 2  # sentence and paragraph
