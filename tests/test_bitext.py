"""Bi-text accuracy counts nearest neighbours whose text is the translation's, in both directions."""

import json

import numpy as np
import pytest

from jdmdr import bitext
from jdmdr.types import UserError

SIDES = (["uno", "dos", "tres", "one more"], ["one", "two", "three", "one"])
VECTORS = {"uno": [1, 0, 0], "dos": [0, 2, 0], "tres": [0, 1, 0.1], "one more": [3, 0, 0],
           "one": [5, 0, 0], "two": [0, 1, 0], "three": [0, 0, 1]}  # fmt: skip


def embed(texts):
    return np.array([VECTORS[text] for text in texts], np.float32)


def search(q_QxD, p_CxD):
    return (q_QxD @ p_CxD.T).argmax(axis=1)


def test_accuracy_is_by_cosine_and_by_text_in_both_directions():
    # -> tres finds "two"; <- "three" finds tres, and the second "one" finds "uno", which is not its translation
    assert bitext.accuracy(SIDES, embed, search) == (3 / 4, 3 / 4)


def test_averages_are_over_files(tmp_path):
    lines = ["\t".join(pair) for pair in zip(*SIDES, strict=True)]
    (tmp_path / "xx-en.test.tsv").write_text("\n".join(lines))
    (tmp_path / "yy-en.test.tsv").write_text("\n".join(lines[:2]) + "\n")
    found = bitext.evaluate(bitext.find(tmp_path, "test"), embed, search)
    assert found["yy-en"] == {"pairs": 2, "there": 1.0, "back": 1.0}
    assert found["avg"] == {"pairs": 6, "there": 0.875, "back": 0.875}


def test_files_are_found_by_split_and_put_together_without_one(tmp_path):
    for name in ("sw-en.test.tsv", "sw-en.train.tsv.gz", "th-en.test.tsv", "README.md", "odd.tsv"):
        (tmp_path / name).write_text("")
    names = {name: [p.name for p in paths] for name, paths in bitext.find(tmp_path, "test").items()}
    assert names == {"sw-en": ["sw-en.test.tsv"], "th-en": ["th-en.test.tsv"]}
    assert len(bitext.find(tmp_path, "")["sw-en"]) == 2
    assert list(bitext.find(tmp_path / "odd.tsv", "test")) == ["odd"]
    with pytest.raises(UserError, match=r"NAME.dev.tsv; its splits are: test, train"):
        bitext.find(tmp_path, "dev")
    with pytest.raises(UserError, match="no such file or directory"):
        bitext.find(tmp_path / "nope", "test")


@pytest.mark.parametrize("text, says", [
    ("a\tb\nc\n", "line 2: 1 sentences"), ("a\tb\tc\n", "line 1: 3 sentences"), ("a\t \n", "line 1: 1 sentences"),
    ("", "holds no pair"),
])  # fmt: skip
def test_a_line_that_is_no_pair_is_told(tmp_path, text, says):
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(UserError, match=says):
        bitext.read([tmp_path / "x.tsv"])


def test_the_trained_encoder_and_its_export_find_a_sentence_itself(finished, command, tmp_path):
    for stage in ("tokenizer", "train"):
        (tmp_path / "work").mkdir(exist_ok=True)
        (tmp_path / "work" / stage).symlink_to(finished.directory / stage)
    texts = finished.library.queries("en", "test")[1][:20]
    (tmp_path / "en-en.test.tsv").write_text("".join(f"{text}\t{text}\n" for text in texts), encoding="utf-8")
    flags = ("--config", "configs/quickstart.py:smoke", "--workdir", tmp_path / "work", f"--data={tmp_path}")
    result = command("jdmdr.bitext", *flags)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "work" / "bitext.json").read_text())
    assert found["accuracy"]["en-en"] == {"pairs": 20, "there": 1.0, "back": 1.0} and found["encoder"] == "train"
    again = command("jdmdr.bitext", *flags, f"--encoder={finished.directory / 'export'}")
    assert again.returncode == 0 and again.stdout == result.stdout, again.stderr
    assert not list((tmp_path / "work").glob(".bitext*"))
    with pytest.raises(UserError, match="holds no finished warmup run"):
        bitext.open_encoder(finished.config, tmp_path / "work", "warmup", tmp_path)
