"""What a data root holds is found by name, never by a list of known languages."""

import gzip
import logging
from pathlib import Path

import pytest

from jdmdr.datasets import LanguageFiles, discover
from jdmdr.types import UserError

REPO = Path(__file__).parents[1]


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
    with pytest.raises(UserError, match="no corpus of en, xx; there are: am, ti"):
        discover(tmp_path, "xx,am,en")


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
