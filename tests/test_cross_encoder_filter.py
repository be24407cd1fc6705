"""The cross-encoder as a stage of the recipe: its scores are made once, and its margins change the negatives alone."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_cross_encoder import make_classifier

from jdmdr import check, mine, negatives, pairs, pipeline
from jdmdr.corpus import passage_text
from jdmdr.filters import cross_encoder
from jdmdr.types import NO_HIT, UserError

LENGTH, DEPTH = 34, 5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_classifier("bert", 1, tmp_path_factory.mktemp("model") / "bert")


@pytest.fixture(scope="module")
def scorer(model, finished):
    return pairs.Scorer(SimpleNamespace(name=str(model), label="", length=LENGTH), "float32", finished.mesh)


def score(finished, scorer, out_dir):
    return cross_encoder.score(finished.library, finished.training, finished.directory / "mine", scorer, DEPTH, out_dir)


def test_scores_are_those_of_the_first_candidates_and_of_every_positive(finished, scorer, tmp_path):
    counts = score(finished, scorer, tmp_path)
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {*finished.library.langs}
    one = np.zeros(1, int)
    for index, lang in enumerate(finished.library.langs):
        queries = [q for q in finished.training if q.lang == index and not q.held_out]
        mined, collection = mine.read_mined(finished.directory / "mine", lang, []), finished.library.collections[index]
        candidates_QxK, positives_QxM = cross_encoder.read(tmp_path, lang)
        assert candidates_QxK.shape == mined.rows_QxK.shape and np.isnan(candidates_QxK[:, DEPTH:]).all()
        assert counts["pairs"][lang] == np.isfinite(candidates_QxK).sum() + np.isfinite(positives_QxM).sum()
        for q in (0, len(queries) - 1):
            positives = queries[q].positives - finished.library.bases[index]
            rows = [*mined.rows_QxK[q, :DEPTH], *positives]
            found = [*candidates_QxK[q, :DEPTH], *positives_QxM[q, : len(positives)]]
            for row, probability in zip(rows, found, strict=True):
                if row != NO_HIT:
                    text = passage_text(collection.passage(row))
                    odds = scorer.score(scorer.queries([queries[q].text]), one, [text], one)[0]
                    assert probability == pytest.approx(1 / (1 + np.exp(-odds)), abs=1e-5)
            assert np.isnan(positives_QxM[q, len(positives) :]).all()


def test_a_language_that_is_done_is_not_scored_again(finished, scorer, tmp_path, monkeypatch):
    score(finished, scorer, tmp_path)
    (tmp_path / "sw.positive_scores.npy").rename(tmp_path / "kept.npy")
    scored, real = [], pairs.score_all
    monkeypatch.setattr(pairs, "score_all", lambda *args: scored.append(args[-1].desc.split()[1]) or real(*args))
    score(finished, scorer, tmp_path)
    assert scored == ["sw"]
    np.testing.assert_array_equal(*(np.load(tmp_path / name) for name in ("sw.positive_scores.npy", "kept.npy")))


def test_another_margin_redoes_the_negatives_alone(finished, model, tmp_path, capsys):
    workdir = shutil.copytree(finished.directory, tmp_path / "workdir")
    config = finished.config.copy_and_resolve_references()
    with config.unlocked():
        config.cross_encoder.update({"name": str(model), "length": LENGTH, "depth": DEPTH})
    pipeline.run(config, workdir, "negatives")
    lines = capsys.readouterr().err.splitlines()
    assert "mine: up to date" in lines and "cross_encoder" in lines
    everything = json.loads((workdir / "negatives" / "scores.json").read_text())
    assert set(everything["table"]) == {"warmup", "bm25", "cross_encoder"}
    assert everything["cross_encoder"]["in_force"] is None

    with config.unlocked(), config.ignore_type():
        config.filters.cross_encoder.absolute_margin = 0.0
    pipeline.run(config, workdir, "negatives")
    lines = capsys.readouterr().err.splitlines()
    assert "cross_encoder: up to date" in lines
    assert any("filters.cross_encoder.absolute_margin was None, now 0.0" in line for line in lines)
    for lang in finished.library.langs:
        candidates_QxK, positives_QxM = cross_encoder.read(workdir / "cross_encoder", lang)
        lowest_Q = np.nanmin(positives_QxM, axis=1)
        qids, chosen = negatives.read(negatives.version_dir(workdir / "negatives", 0), lang)
        for q in range(len(qids)):
            ranks = chosen.rank_QxN[q][chosen.source_QxN[q] == negatives.RETRIEVAL]
            scores = candidates_QxK[q, ranks[ranks > 0] - 1]
            assert not (scores >= lowest_Q[q]).any()
        drops = [
            line.split("\t")
            for line in (workdir / "negatives" / "dropped" / f"{lang}.tsv").read_text().splitlines()[1:]
        ]
        ours = [drop for drop in drops if drop[2] == "cross_encoder.absolute_margin"]
        assert ours and all(float(score) >= float(threshold) for *_, score, threshold in ours)
    table = json.loads((workdir / "negatives" / "scores.json").read_text())
    assert table["cross_encoder"]["in_force"]["rule"] == "absolute_margin"


def test_a_rule_without_a_cross_encoder_is_refused(finished):
    config = finished.config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.filters.cross_encoder.max_score = 0.5
    with pytest.raises(UserError, match="filters.cross_encoder.max_score compares .* name one with cross_encoder.name"):
        check.check_config(config)
