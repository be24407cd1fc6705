import json
import os
import shutil

import numpy as np
import pytest

from jdmdr import embeddings, workdir
from jdmdr.types import UserError

LANGS = ["en", "sw"]


@pytest.fixture
def taking(finished, tmp_path):
    """take(source) into an empty directory, as a working directory with the same corpus and encoder would."""

    def take(source, **changes):
        made_by = {**workdir.counts_of(finished.directory, "embeddings")["passages"], **changes}
        collections = finished.library.collections
        embeddings.take(source, finished.directory, LANGS, collections, made_by, tmp_path / "out")
        return tmp_path / "out"

    return take


@pytest.fixture
def theirs(finished, tmp_path):
    """A copy of what of a working directory is read here."""
    for stage in ("corpus", "embeddings"):
        shutil.copytree(finished.directory / stage, tmp_path / "theirs" / stage)
    return tmp_path / "theirs"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def external(directory, finished, width=5):
    directory.mkdir()
    rng = np.random.default_rng(0)
    for lang, collection in zip(LANGS, finished.library.collections, strict=True):
        docids = collection.docids(np.arange(len(collection)))
        np.save(directory / f"{lang}.passages.npy", rng.normal(size=(len(docids), width)).astype(np.float32)[::-1])
        (directory / f"{lang}.passages.txt").write_text("".join(f"{docid}\n" for docid in docids[::-1]))
    return directory


def test_vectors_of_the_same_encoder_and_passages_are_linked(taking, theirs):
    out = taking(theirs)
    for lang in LANGS:
        assert os.path.samefile(out / lang / "passages-00000.npy", theirs / "embeddings" / lang / "passages-00000.npy")


@pytest.mark.parametrize(
    "key, value",
    [("parameters_sha256", "0" * 64), ("passage_prompt", "passage: "), ("passage_length", 7), ("pooling", "cls"),
     ("normalize", False), ("width", 3)],
)  # fmt: skip
def test_vectors_of_another_encoder_are_refused_by_what_differs(taking, theirs, key, value):
    with pytest.raises(UserError, match=f"made by another encoder .{key} is .* start from that workdir's export"):
        taking(theirs, **{key: value})


def test_vectors_of_other_passages_are_refused_by_language(taking, theirs):
    edit(theirs / "corpus" / "manifest.json", lambda m: m["files"].update({"sw/passages.jsonl": [1, "other"]}))
    with pytest.raises(UserError, match="the passages of sw in .* are not those of data.root"):
        taking(theirs)


def test_vectors_of_other_fields_or_without_a_corpus_are_refused(taking, theirs):
    edit(theirs / "corpus" / "manifest.json", lambda m: m["settings"].update(fields="text"))
    with pytest.raises(UserError, match="data.fields was 'text' in .* and is 'title,text' here"):
        taking(theirs)
    shutil.rmtree(theirs / "corpus")
    with pytest.raises(UserError, match="whose they are is unknown"):
        taking(theirs)


def test_half_written_embeddings_are_no_embeddings(taking, theirs):
    (theirs / "embeddings" / "manifest.json").unlink()
    with pytest.raises(UserError, match="en.passages.npy does not exist"):
        taking(theirs)


def test_vectors_computed_elsewhere_are_put_in_the_order_of_the_collection(taking, finished, tmp_path):
    source = external(tmp_path / "vectors", finished)
    out = taking(source, width=5)
    for lang in LANGS:
        np.testing.assert_array_equal(
            np.load(out / lang / "passages-00000.npy"), np.load(source / f"{lang}.passages.npy")[::-1]
        )


def test_vectors_of_another_width_and_missing_docids_are_refused(taking, finished, tmp_path):
    source = external(tmp_path / "vectors", finished)
    with pytest.raises(
        UserError, match="en.passages.npy is 5 wide, but the queries' embeddings are 64; set encoder.proj"
    ):
        taking(source)
    lines = (source / "en.passages.txt").read_text().splitlines()
    (source / "en.passages.txt").write_text("\n".join(["stranger", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match="lacks the docid"):
        taking(source, width=5)
    with pytest.raises(UserError, match="encode.passages is .*nowhere, which is no directory"):
        taking(tmp_path / "nowhere")
