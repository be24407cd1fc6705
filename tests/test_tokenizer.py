import json
import pathlib
import runpy
import subprocess
import sys
import time

import numpy as np
import pytest

from jdmdr import tokenizer
from jdmdr.tokenizer import Tokenizer, TokenStore
from jdmdr.types import UserError

GOLDENS = pathlib.Path(__file__).parent / "goldens"
TEXTS = [
    "The Nile is a river of Africa.",
    "Mto Nile ni mto wa Afrika.",
    "ナイル川はアフリカの川である。",
    "नील नदी अफ्रीका में है।",
] * 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train_unigram(iter(TEXTS), 200, path)
    return path


def test_trained_vocabulary_is_the_same_in_every_process(directory, tmp_path):
    code = f"from jdmdr import tokenizer, types; import pathlib; tokenizer.train_unigram({TEXTS!r}, 200, pathlib.Path({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "tokenizer.json").read_bytes() == (directory / "tokenizer.json").read_bytes()


def test_transformers_reads_the_trained_tokenizer_and_gives_the_same_ids(directory):
    import transformers

    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS[:4]:
        assert theirs(text)["input_ids"] == Tokenizer(directory, 64).encode([text])[0].tolist()


def test_text_survives_a_round_trip_lower_cased(directory):
    ids = Tokenizer(directory, 64).encode(["The Nile"])[0]
    import tokenizers

    assert tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json")).decode(ids.tolist()) == "the nile"


def test_words_keep_their_combining_marks_and_lose_their_punctuation(directory):
    plain = Tokenizer(directory, 64)
    assert np.array_equal(plain.encode(["नील, नदी!"])[0], plain.encode(["नील नदी"])[0])
    assert len(plain.encode(["?! ..."])[0]) == 0


def test_prompt_stands_before_every_text_and_length_is_cut(directory):
    plain = Tokenizer(directory, 64)
    prompted = Tokenizer(directory, 64, "river ")
    assert np.array_equal(prompted.encode(["africa"])[0], plain.encode(["river africa"])[0])
    assert len(Tokenizer(directory, 3).encode(["the nile is a river"])[0]) == 3


def test_a_word_of_a_million_characters_takes_bounded_time(directory):
    start = time.time()
    Tokenizer(directory, 64).encode(["x" * 1_000_000, "ab " * 400_000])
    assert time.time() - start < 5


@pytest.mark.parametrize("vocab_size", [200, 70_000])
def test_store_gives_back_what_was_written_by_global_row(directory, tmp_path, vocab_size):
    maker = Tokenizer(directory, 64)
    maker.vocab_size = vocab_size
    texts = {"a": TEXTS[:3], "b": [], "c": ["", *TEXTS[3:5]]}
    for lang, of_lang in texts.items():
        assert not tokenizer.has_tokens(tmp_path, lang)
        tokenizer.write_tokens(maker, of_lang, tmp_path, lang)
    store = TokenStore(tmp_path, list(texts), vocab_size)
    flat = maker.encode([text for of_lang in texts.values() for text in of_lang])
    assert len(store) == 6 and store.bases.tolist() == [0, 3, 3, 6]
    rows = np.array([5, 0, 3])
    assert store.lengths(rows).tolist() == [len(flat[row]) for row in rows]
    block = store.gather(rows, 9)
    for i, row in enumerate(rows):
        kept = min(9, len(flat[row]))
        assert block.ids_BxT[i, :kept].tolist() == flat[row][:9].tolist()
        assert block.mask_BxT[i].tolist() == [1] * kept + [0] * (9 - kept)


def test_document_frequency_counts_texts_not_tokens(directory, tmp_path):
    maker = Tokenizer(directory, 64)
    texts = ["the the nile", "the river", "nile"]
    tokenizer.write_tokens(maker, texts, tmp_path, "en")
    expected = np.zeros(maker.vocab_size, np.int64)
    for ids in maker.encode(texts):
        expected[np.unique(ids)] += 1
    assert np.array_equal(
        TokenStore(tmp_path, ["en"], maker.vocab_size).document_frequency(maker.vocab_size)[0], expected
    )


def test_too_little_text_is_told_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no tokenizer can be trained"):
        tokenizer.train_unigram([""], 100, tmp_path)


def test_unknown_pretrained_tokenizer_is_told_in_one_sentence(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="no tokenizer can be loaded"):
        tokenizer.copy_pretrained(str(tmp_path), tmp_path / "out")


def test_corrupt_tokenizer_file_is_told_by_name(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer.json: not a readable tokenizer"):
        Tokenizer(tmp_path, 8)


# ------------------------------------------------------------------------------------------- tokenizers of old libraries

OLD = GOLDENS / "roberta-bpe"  # made by make.py there, with the libraries themselves
TEXTS_OF_OLD, MAX_LENGTH_OF_OLD = (runpy.run_path(OLD / "make.py")[name] for name in ("TEXTS", "MAX_LENGTH"))


@pytest.mark.parametrize("version", tokenizer.AS_IN)
def test_roberta_gives_the_ids_that_the_named_transformers_gave(version, tmp_path):
    import transformers

    tokenizer.copy_pretrained(str(OLD), tmp_path, version)
    expected = json.loads((OLD / "ids.json").read_text())[version]
    found = [ids.tolist() for ids in Tokenizer(tmp_path, MAX_LENGTH_OF_OLD).encode(TEXTS_OF_OLD)]
    fails = [text for text, ids in zip(TEXTS_OF_OLD, expected, strict=True) if ids is None]
    assert fails == ([""] if version == "2.8.0" else [])  # which gets its two special tokens here
    assert found == [[0, 2] if ids is None else ids for ids in expected]
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(TEXTS_OF_OLD, truncation=True, max_length=MAX_LENGTH_OF_OLD)["input_ids"] == found
    tokenizer.copy_pretrained(str(tmp_path), tmp_path / "again", version)
    assert [ids.tolist() for ids in Tokenizer(tmp_path / "again", MAX_LENGTH_OF_OLD).encode(TEXTS_OF_OLD)] == found


def test_todays_roberta_differs_from_both_and_they_from_each_other(tmp_path):
    ids = {}
    for version in ("", *tokenizer.AS_IN):
        tokenizer.copy_pretrained(str(OLD), tmp_path / f"v{version}", version)
        ids[version] = Tokenizer(tmp_path / f"v{version}", 16).encode(["Hello World"])[0].tolist()
    assert len({tuple(of) for of in ids.values()}) == 3


def test_another_kind_of_tokenizer_is_not_made_old(tmp_path):
    with pytest.raises(UserError, match="tokenizer.as_in is for RoBERTa"):
        tokenizer.copy_pretrained(str(GOLDENS / "bert"), tmp_path, "2.8.0")


@pytest.mark.parametrize("version", ["2.8.0", None])
def test_a_cut_at_load_time_is_the_tokenizers_own_cut(directory, tmp_path, version):
    if version:  # a token behind every text
        tokenizer.copy_pretrained(str(OLD), tmp_path / "words", version)
    home = tmp_path / "words" if version else directory
    texts = [*TEXTS_OF_OLD, *TEXTS]
    tokenizer.write_tokens(Tokenizer(home, 16), texts, tmp_path, "en")
    store = TokenStore(tmp_path, ["en"], Tokenizer(home, 16).vocab_size)
    for width in (3, 7, 16):
        block = store.gather(np.arange(len(texts)), width)
        for row, ids in enumerate(Tokenizer(home, width).encode(texts)):
            assert block.ids_BxT[row][block.mask_BxT[row] == 1].tolist() == ids.tolist()
