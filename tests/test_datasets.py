"""What a data root holds is found by name, never by a list of known languages."""

import gzip
import json
import logging
from pathlib import Path

import pytest

from jdmdr import corpus, reading
from jdmdr.corpus import write_jsonl
from jdmdr.datasets import LanguageFiles, discover, find
from jdmdr.types import UserError

REPO = Path(__file__).parents[1]
SHARED = REPO.parent / "shared" / "data"


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def names(files, root):
    """A LanguageFiles with paths relative to the root."""

    def short(path):
        return str(path.relative_to(root))

    splits = ({split: short(path) for split, path in of.items()} for of in (files.topics, files.qrels))
    return [*map(short, files.corpus)], *splits, files.train and short(files.train)


def test_tinypedia_is_found_whole():
    root = REPO / "third_party" / "tinypedia"
    found = discover(root)
    assert list(found) == ["ar", "en", "es", "hi", "ja", "ko", "ru", "sw", "th", "zh"]
    splits = {split: f"en.{split}.tsv" for split in ("dev", "test", "train")}
    assert names(found["en"], root) == (
        ["corpus/en.jsonl"],
        {split: f"topics/{name}" for split, name in splits.items()},
        {split: f"qrels/{name}" for split, name in splits.items()},
        "train/en.jsonl",
    )


def test_any_language_code_is_found_gzipped_or_not_with_shards_in_natural_order(tmp_path):
    shards = [f"corpus/zh-hant/docs-{i}.jsonl.gz" for i in (2, 10, 0)]
    touch(tmp_path, *shards, "corpus/zh-hant/README.md", "corpus/zh-hant/.docs-1.jsonl.gz", "corpus/am.jsonl")
    touch(tmp_path, "corpus/_x1.jsonl.gz", "corpus/.am.jsonl", "corpus/empty/readme", "topics/zh-hant.test-a.tsv.gz")
    found = discover(tmp_path)
    assert list(found) == ["_x1", "am", "zh-hant"]
    assert names(found["zh-hant"], tmp_path)[:2] == (
        [f"corpus/zh-hant/docs-{i}.jsonl.gz" for i in (0, 2, 10)],
        {"test-a": "topics/zh-hant.test-a.tsv.gz"},
    )
    assert found["am"] == LanguageFiles([tmp_path / "corpus/am.jsonl"], {}, {}, None)


@pytest.mark.parametrize("home", ["", "corpus/"])
@pytest.mark.parametrize("judged", ["", "miracl-v1.0-zh-hant/"])
def test_the_published_names_of_miracl_are_found(tmp_path, home, judged):
    touch(tmp_path, *(f"{home}miracl-corpus-v1.0-zh-hant/docs-{i}.jsonl.gz" for i in range(11)))
    for kind in ("topics", "qrels"):
        for end in ("dev.tsv", "train.tsv.gz", "test-a.tsv", "testB.tsv"):
            touch(tmp_path, f"{judged}{kind}/{kind}.miracl-v1.0-zh-hant-{end}")
    (found,) = discover(tmp_path).items()
    corpus, topics, qrels, train = names(found[1], tmp_path)
    assert found[0] == "zh-hant" and train is None
    assert corpus == [f"{home}miracl-corpus-v1.0-zh-hant/docs-{i}.jsonl.gz" for i in range(11)]
    assert set(topics) == set(qrels) == {"dev", "train", "test-a", "testB"}
    assert topics["train"] == f"{judged}topics/topics.miracl-v1.0-zh-hant-train.tsv.gz"
    assert qrels["test-a"] == f"{judged}qrels/qrels.miracl-v1.0-zh-hant-test-a.tsv"


def test_langs_keeps_the_named_languages_sorted():
    assert list(discover(REPO / "third_party" / "tinypedia", " zh, ar,zh,")) == ["ar", "zh"]


def test_an_unknown_language_is_refused_with_those_there_are(tmp_path):
    touch(tmp_path, "corpus/am.jsonl", "corpus/ti.jsonl", "topics/en.dev.tsv")
    with pytest.raises(UserError, match="no files of xx; there are: am, en, ti"):
        discover(tmp_path, "xx,am,en")
    with pytest.raises(UserError, match="no corpus of en; there are: am"):
        discover(tmp_path, "am,en")


def test_a_language_without_a_corpus_is_left_out_with_a_warning(tmp_path, caplog):
    touch(tmp_path, "corpus/am.jsonl", "topics/en.dev.tsv", "topics/topics.miracl-v1.0-de-dev.tsv")
    with caplog.at_level(logging.WARNING):
        assert list(discover(tmp_path)) == ["am"]
    assert caplog.messages == [f"{tmp_path}: left out, for want of a corpus: de, en"]


@pytest.mark.parametrize("make", [
    lambda root: root,
    lambda root: touch(root, "topics/en.dev.tsv", "corpus/README.md"),
    lambda root: touch(root, "file") / "file",
    lambda root: root / "missing",
])  # fmt: skip
def test_a_root_without_a_corpus_is_refused_with_the_layout_expected(tmp_path, make):
    with pytest.raises(UserError, match=r"corpus/LANG\.jsonl"):
        discover(make(tmp_path))


@pytest.mark.parametrize("twice", [
    ("corpus/en.jsonl", "corpus/en.jsonl.gz"),
    ("corpus/en.jsonl", "corpus/en/0.jsonl"),
    ("corpus/en/0.jsonl", "miracl-corpus-v1.0-en/docs-0.jsonl.gz"),
    ("topics/en.dev.tsv", "topics/topics.miracl-v1.0-en-dev.tsv"),
    ("qrels/qrels.miracl-v1.0-en-dev.tsv", "miracl-v1.0-en/qrels/qrels.miracl-v1.0-en-dev.tsv"),
])  # fmt: skip
def test_a_file_that_is_there_twice_is_refused_with_both_names(tmp_path, twice):
    touch(tmp_path, *twice)
    with pytest.raises(UserError, match="twice") as error:
        discover(tmp_path)
    assert all(str(tmp_path / name) in str(error.value) for name in twice)


def test_the_contents_do_not_matter_to_discovery(tmp_path):
    touch(tmp_path, "corpus/en.jsonl")
    (tmp_path / "corpus/en.jsonl").write_bytes(gzip.compress(b"anything"))
    assert list(discover(tmp_path)) == ["en"]


# ----------------------------------------------------------------------------------------- the published forms of others


def splits_of(root):
    return {split: [(root / kind / f"en.{split}.tsv").read_text("utf-8") for kind in ("topics", "qrels")]
            for split in ("train", "dev", "test")}  # fmt: skip


def rewritten(out, form):
    """The English part of tinypedia, without its training rows, as another collection publishes its files."""
    source = REPO / "third_party" / "tinypedia"
    passages = [json.loads(line) for line in (source / "corpus" / "en.jsonl").read_text("utf-8").split("\n") if line]
    out.mkdir(parents=True)
    if form == "beir":
        (out / "qrels").mkdir()
        write_jsonl(out / "corpus.jsonl", ({"_id": p["docid"], "title": p["title"], "text": p["text"], "metadata": {}}
                                           for p in passages))  # fmt: skip
        topics = [line.split("\t") for texts, _ in splits_of(source).values() for line in texts.splitlines()]
        write_jsonl(out / "queries.jsonl", ({"_id": qid, "text": text, "metadata": {}} for qid, text in topics))
        for split, (_, qrels) in splits_of(source).items():
            rows = (line.split() for line in qrels.splitlines())
            table = "".join(f"{qid}\t{docid}\t{rel}\n" for qid, _, docid, rel in rows)
            (out / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + table)
        return
    tar = form == "tar"
    for folder in ("collection", "ir-format-data"):
        (out / folder).mkdir()
    rows = ({"id": p["docid"], "contents": f"{p['title']}\n\n{p['text']}"} for p in passages) if tar else passages
    write_jsonl(out / "rows", rows)
    packed = gzip.compress((out / "rows").read_bytes())
    (out / ("collection/docs.jsonl.gz" if tar else "corpus.jsonl.gz")).write_bytes(packed)
    (out / "rows").unlink()
    every = ["".join(texts) for texts in zip(*splits_of(source).values(), strict=True)]
    for split, (topics, qrels) in {**splits_of(source), "": every}.items():
        end = f".{split}".removesuffix(".")
        names = (f"topic{end}.tsv", f"qrels{end}.txt") if tar else (f"topics{end}.txt", f"qrels{end}.txt")
        for name, text in zip(names, (topics, qrels), strict=True):
            (out / ("" if tar else "ir-format-data") / name).write_text(text, "utf-8")
    (out / "folds.json").write_text("{}")
    (out / "train.jsonl.gz").write_bytes(gzip.compress(b'{"query_id": "1", "negative_passages": []}\n'))


def ingested(root, out, langs=""):
    for lang, files in discover(root, langs).items():
        corpus.ingest(lang, files, out / lang)
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*")) if path.is_file()}


@pytest.fixture(scope="module")
def english(tmp_path_factory):
    root = tmp_path_factory.mktemp("plain")
    for kind in ("corpus", "topics", "qrels"):
        (root / kind).symlink_to(REPO / "third_party" / "tinypedia" / kind)
    return ingested(root, root / "out", "en")


@pytest.mark.parametrize("form, home", [
    ("beir", ""),
    ("beir", "en"),
    ("tar", "mrtydi-v1.1-english"),
    ("tar", "mrtydi-v1.0-english"),
    ("hub", "mrtydi-v1.1-english"),
    ("hub", "mr-tydi/mrtydi-v1.1-english"),
])  # fmt: skip
def test_beir_and_mr_tydi_are_read_to_the_same_nouns_as_the_plain_layout(tmp_path, english, form, home):
    rewritten(tmp_path / "data" / home, form)
    found = ingested(tmp_path / "data", tmp_path / "out")
    assert found.keys() == english.keys() and len(found) == 12
    for name, content in english.items():
        assert found[name] == content, name


def test_a_directory_of_mr_tydi_is_a_root_by_itself_under_any_spelling(tmp_path, monkeypatch, english):
    rewritten(tmp_path / "mrtydi-v1.1-english", "tar")
    monkeypatch.chdir(tmp_path / "mrtydi-v1.1-english")
    assert ingested(Path("."), tmp_path / "out") == english


def test_the_hub_repositories_of_mr_tydi_and_miracl_may_lie_side_by_side(tmp_path):
    touch(tmp_path, "mr-tydi/mrtydi-v1.1-thai/ir-format-data/topics.dev.txt", "mr-tydi/mrtydi-v1.1-thai/train.jsonl.gz")
    touch(tmp_path, "mr-tydi/mrtydi-v1.1-klingon/ir-format-data/topics.dev.txt")
    touch(tmp_path, "mr-tydi-corpus/mrtydi-v1.1-thai/corpus.jsonl.gz")
    touch(tmp_path, "miracl/miracl-v1.0-yo/topics/topics.miracl-v1.0-yo-dev.tsv")
    touch(tmp_path, "miracl-corpus/miracl-corpus-v1.0-yo/docs-0.jsonl.gz")
    assert {lang: (len(files.corpus), [*files.topics], files.train) for lang, files in discover(tmp_path).items()} == {
        "th": (1, ["dev"], None),
        "yo": (1, ["dev"], None),
    }


def test_a_beir_data_set_takes_the_language_that_langs_names_and_says_when_it_is_guessed(tmp_path, caplog):
    touch(tmp_path, "corpus.jsonl", "queries.jsonl", "qrels/test.tsv", "sw/corpus.jsonl.gz", "sw/queries.jsonl")
    with caplog.at_level(logging.WARNING):
        assert list(discover(tmp_path, "ar")) == ["ar"] and not caplog.messages
        assert list(discover(tmp_path)) == ["en", "sw"]
    assert "nothing tells its language, which is taken for en; data.langs=CODE names it" in caplog.text
    assert names(discover(tmp_path)["en"], tmp_path) == (["corpus.jsonl"], {}, {"test": "qrels/test.tsv"}, None)
    assert discover(tmp_path)["sw"].queries == tmp_path / "sw" / "queries.jsonl"


# Zhang et al., TACL 2023: train queries and judgments, dev queries and judgments.
MIRACL = """
    ar 3495 25382 2896 29197   bn 1631 16754 411 4206   en 2863 29416 799 8350    es 2162 21531 648 6443
    fa 2107 21844 632 6571     fi 2897 20350 1271 12008 fr 1143 11426 343 3429    hi 1169 11668 350 3494
    id 4071 41358 960 9668     ja 3477 34387 860 8354   ko 868 12767 213 3057     ru 4683 33921 1252 13100
    sw 1901 9359 482 5092      te 3452 18608 828 1606   th 2972 21293 733 7573    zh 1312 13113 393 3928
    de 0 0 305 3144            yo 0 0 119 1188
"""


@pytest.mark.skipif(not (SHARED / "miracl-dev").is_dir(), reason="needs the MIRACL topics and qrels")
def test_the_topics_and_qrels_of_all_18_languages_of_miracl_have_the_published_sizes():
    words = MIRACL.split()
    published = {words[i]: tuple(map(int, words[i + 1 : i + 5])) for i in range(0, len(words), 5)}

    def sizes(files, split):
        if split not in files.topics:
            return 0, 0
        judged, conflicts = reading.qrels(files.qrels[split])
        assert not conflicts and judged.keys() <= {query.qid for query in reading.topics(files.topics[split])}
        return len(reading.topics(files.topics[split])), sum(map(len, judged.values()))

    found = {lang: sizes(f, "train") + sizes(f, "dev") for lang, f in find(SHARED / "miracl-dev").items()}
    assert found == published and len(found) == 18
    assert [sum(found[lang][i] for lang in found if lang not in ("de", "yo")) for i in range(4)] == [
        40_203,
        343_177,
        13_071,
        126_076,
    ]
    with pytest.raises(UserError, match="no corpus, only topics and qrels of ar, bn, .*, zh; expected"):
        discover(SHARED / "miracl-dev")
