"""Pairs are what the tokenizer makes of them, cut at the passage, and scored once whatever happens in between."""

import pathlib
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import transformers
from test_cross_encoder import GOLDENS, make_classifier

from jdmdr import pairs, parallel, progress
from jdmdr.encoders import load_cross_encoder
from jdmdr.types import UserError

LENGTH = 20
QUERIES = ["w5 w17 w3", "w9", "", " ".join(f"w{i}" for i in range(12)), " ".join(f"w{i}" for i in range(30))]
PASSAGES = ["w9 w4 w4", "", "w190", " ".join(f"w{i}" for i in range(60)), "w7 " * 9]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def directory(request, tmp_path_factory):
    return make_classifier(request.param, 1, tmp_path_factory.mktemp("model") / request.param)


def open_scorer(directory, **changes):
    section = SimpleNamespace(**{"name": str(directory), "label": "", "length": LENGTH, **changes})
    return pairs.Scorer(section, "float32", parallel.data_mesh())


@pytest.fixture(scope="module")
def scorer(directory):
    return open_scorer(directory)


def test_pairs_are_the_tokenizers_own_with_the_passage_cut(directory):
    found = pairs.PairTokenizer(str(directory), LENGTH)
    queries, passages = found.ids(QUERIES[:4]), found.ids(PASSAGES)
    query_N, passage_N = (np.ravel(x) for x in np.indices((len(queries), len(passages))))
    source = pairs.Pairs(found.template, queries, query_N, passages, passage_N, LENGTH, found.uses_segments)
    rows = np.arange(len(query_N))
    tokens, lengths = source.gather(rows, LENGTH), source.lengths(rows)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert found.uses_segments == (directory.name == "bert")
    for row in rows:
        pair = [QUERIES[query_N[row]]], [PASSAGES[passage_N[row]]]
        expected = theirs(*pair, truncation="only_second", max_length=LENGTH)
        count = lengths[row]
        assert tokens.ids_BxT[row, :count].tolist() == expected["input_ids"][0] and tokens.mask_BxT[row].sum() == count
        assert not tokens.ids_BxT[row, count:].any()
        if found.uses_segments:
            assert tokens.segments_BxT[row, :count].tolist() == expected["token_type_ids"][0]
    assert lengths.max() == LENGTH


def test_a_query_is_cut_where_it_leaves_no_room_and_that_is_told_once(scorer, capsys):
    found = scorer.queries(QUERIES)
    assert [len(ids) for ids in found[:4]] == [3, 1, 0, 12]
    longest = int(0.75 * (LENGTH - scorer.tokenizer.template.size))
    assert len(found[4]) == longest
    assert capsys.readouterr().err.count(f"1 of 5 queries are longer than {longest} tokens and are cut there") == 1


def test_scores_are_those_of_each_pair_alone(scorer, directory):
    encoder, params = load_cross_encoder(directory, "", "float32")
    queries = scorer.queries(QUERIES)
    query_N, passage_N = np.random.default_rng(0).integers(0, 5, (2, 30))
    found_N = scorer.score(queries, query_N, PASSAGES, passage_N)
    t = scorer.tokenizer
    source = pairs.Pairs(t.template, queries, query_N, t.ids(PASSAGES), passage_N, LENGTH, t.uses_segments)
    apply = jax.jit(encoder.apply)
    expected_N = [apply(params, source.gather(np.array([row]), LENGTH))[0] for row in range(30)]
    np.testing.assert_allclose(found_N, expected_N, atol=1e-5)


def score_all(scorer, path, stop_after=None):
    """Scores 100 pairs in pieces of 16; returns the scores and how many pairs each call scored."""
    query_N, passage_N = np.random.default_rng(1).integers(0, 5, (2, 100))
    scored = []

    def texts(rows):
        if len(scored) == stop_after:
            raise KeyboardInterrupt
        scored.append(len(rows))
        return [PASSAGES[row] for row in rows]

    with progress.bar(None, "test", "pairs") as bar:
        return pairs.score_all(scorer, QUERIES, query_N, passage_N, texts, path, bar), len(scored)


def test_a_second_call_scores_only_what_is_missing(scorer, tmp_path, monkeypatch):
    monkeypatch.setattr(scorer, "piece", 16)
    whole, pieces = score_all(scorer, tmp_path / "whole")
    assert pieces == 7 and whole.shape == (100,)
    path = tmp_path / "scores"
    with pytest.raises(KeyboardInterrupt):
        score_all(scorer, path, stop_after=3)
    with open(path, "ab") as file:  # killed while it wrote
        file.write(whole[48:53].tobytes() + b"x")
    again, pieces = score_all(scorer, path)
    assert pieces == 4
    np.testing.assert_array_equal(again, whole)
    again, pieces = score_all(scorer, path)
    assert pieces == 0
    np.testing.assert_array_equal(again, whole)


def test_what_cannot_work_is_told(directory, tmp_path):
    with pytest.raises(UserError, match="the length of a pair is 50 tokens, but .* has room for 3[24]; lower"):
        open_scorer(directory, length=50)
    with pytest.raises(UserError, match="the length of a pair is 4 tokens, [34] of them special ones; raise"):
        open_scorer(directory, length=4)
    family = directory.name
    (directory / "tokenizer.json").rename(tmp_path / "own.json")
    bare = pathlib.Path(GOLDENS / family / "tokenizer.json")
    try:
        (directory / "tokenizer.json").write_bytes(bare.read_bytes())  # with a template for one text alone
        with pytest.raises(UserError, match="puts no special token before a pair"):
            open_scorer(directory)
    finally:
        (tmp_path / "own.json").rename(directory / "tokenizer.json")
