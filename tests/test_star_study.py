"""The chain STAR, ADORE on STAR, as the recipes of configs/ run it, on a few articles."""

import json
import os

import jax
import numpy as np
import pytest

from configs import adore, star_study
from jdmdr import ablate, models, pipeline
from jdmdr.types import NO_HIT, UserError


def small(config, root):
    with config.unlocked():
        config.data.root, config.data.langs, config.tokenizer.vocab_size = str(root), "", 600
    return config


@pytest.fixture(scope="module")
def study(finished, tmp_path_factory):
    """The directory of the study with the rows Rand-Neg, STAR and ADORE on STAR."""
    config = small(star_study.get_config("smoke"), finished.config.data.root)
    with config.unlocked():
        config.ablation.rows = tuple(
            row for row in config.ablation.rows if row[1] in ("Rand-Neg", "STAR", "ADORE on STAR")
        )
        config.ablation.reference = "Rand-Neg"
    directory = tmp_path_factory.mktemp("study")
    ablate.ablate(config, directory, None)
    return directory


def test_adore_trains_the_queries_tower_of_the_encoder_that_star_ended_with(study):
    before, after = study / "cells" / "star-0", study / "cells" / "adore-on-star-0"
    _, theirs = models.load(before / "train")
    config, params = models.load(after / "train")
    assert config.untied
    jax.tree.map(np.testing.assert_array_equal, params["passage"], models.load(after / "warmup")[1]["passage"])
    assert not np.array_equal(params["query"]["embedding"], params["passage"]["embedding"])
    weighted = theirs["embedding"] * jax.nn.softplus(theirs["weight"])[:, None]
    ours = params["passage"]["embedding"] * jax.nn.softplus(params["passage"]["weight"])[:, None]
    np.testing.assert_allclose(ours, weighted, rtol=1e-4, atol=1e-6)


def test_passages_are_encoded_once_and_nothing_is_mined(study):
    cell = study / "cells" / "adore-on-star-0"
    for lang in ("en", "sw"):
        first, last = (cell / stage / lang / "passages-00000.npy" for stage in ("embeddings-warmup", "embeddings"))
        assert os.path.samefile(first, last)
    assert not (cell / "mine").exists() and not (cell / "negatives").exists()


def test_adore_is_compared_with_the_row_that_it_starts_from(study):
    for by_measure in json.loads((study / "ablation.json").read_text()).values():
        assert set(by_measure) == {"ndcg@10", "mrr@10", "recall@100"}
        for lines in by_measure.values():
            random, hard, after = lines
            assert "difference" not in random
            assert hard["difference"] == pytest.approx(hard["mean"] - random["mean"], abs=2e-6)
            assert after["difference"] == pytest.approx(after["mean"] - hard["mean"], abs=2e-6)


def test_vectors_are_taken_over_from_another_run_and_report_and_card_say_what_was_searched(study, finished):
    config = small(adore.get_config("smoke"), finished.config.data.root)
    with config.unlocked():
        config.warmup.epochs, config.warmup.steps = 0.0, None
        config.encoder.name = str(study / "cells" / "star-0" / "export")
    cell = study / "cells" / "adore-on-star-0"
    config.encode.passages = str(cell)
    pipeline.run(config, study / "after", "report")
    taken = "embeddings-warmup/en/passages-00000.npy"
    assert os.path.samefile(study / "after" / taken, cell / taken)
    card = (study / "after" / "export" / "README.md").read_text()
    assert "the top 10 that a query retrieves in each step" in card and "adore, mrr cut at 10" in card
    assert "## Negatives" not in (study / "after" / "report" / "report.md").read_text()
    assert 'id="negatives"' not in (study / "after" / "report" / "report.html").read_text()


def test_random_negatives_are_random_and_no_positives(study, finished):
    random, hard = (study / "cells" / name / "mine" for name in ("rand-neg-0", "star-0"))
    rows_QxK = np.load(random / "en.rows_QxK.npy")
    assert not np.array_equal(rows_QxK, np.load(hard / "en.rows_QxK.npy"))
    positives = {q.qid: set(q.positives.tolist()) for q in finished.training if q.lang == 0}
    for qid, rows in zip((random / "en.qids.txt").read_text().split(), rows_QxK.tolist(), strict=True):
        found = [row for row in rows if row != NO_HIT]
        assert len(set(found)) == len(found) > 0 and not positives[qid] & set(found)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"metric_cut": None},
            "train.objective.metric_cut is None; adore needs it, as a rule the number in .*top_k .10.",
        ),
        ({"metric_cut": 5000}, "objective.metric_cut is 5000, but the smallest collection that is searched has"),
        ({"dimensions": (8,)}, "train.objective.dimensions: adore searches whole vectors"),
    ],
)
def test_a_search_that_cannot_train_is_refused_by_key(study, finished, change, sentence):
    config = small(adore.get_config("smoke"), finished.config.data.root)
    with config.unlocked():
        config.train.objective.update(change)
    with pytest.raises(UserError, match=sentence):
        pipeline.run(config, study / "wrong", "train")


@pytest.mark.parametrize(
    "key, value, sentence",
    [
        ("encoder.towers", "", "here one tower embeds both sides; set encoder.towers to 'untied'"),
        ("train.trainable", "", "leaves the passages' tower as it is; train the queries' alone: trainable '.query/'"),
        (
            "train.passages_per_query",
            8,
            "passages_per_query is 8; for the objective adore it is 0: it finds its passages",
        ),
    ],
)
def test_a_passage_tower_that_would_train_is_refused(study, finished, key, value, sentence):
    config = small(adore.get_config("smoke"), finished.config.data.root)
    with config.unlocked():
        section, last = key.split(".")
        config[section][last] = value
    with pytest.raises(UserError, match=sentence):
        pipeline.run(config, study / f"wrong-{last}", "train")
