import runpy

import pytest
from conftest import REPO

from jdmdr.check import check_config
from jdmdr.types import UserError


def recipe(name="quickstart", argument="smoke"):
    return runpy.run_path(REPO / "configs" / f"{name}.py")["get_config"](argument)


@pytest.mark.parametrize(
    "name, argument", [("quickstart", ""), ("quickstart", "smoke"), ("dmdr", "mdpr"), ("dmdr", "smoke")]
)
def test_recipes_pass(name, argument):
    check_config(recipe(name, argument))


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", -1),
        ("name", "a/b"),
        ("name", "hybrid"),
        ("data.valid_share", 1.5),
        ("mine.fusion", "foo"),
        ("mine.index", "annoy"),
        ("mine.retrievers", "colbert"),
        ("mine.pool", "all"),
        ("filters.near_duplicate", 2.0),
        ("topics.scope", "batch"),
        ("topics.clusters", 0),
        ("train.policy", "foo"),
        ("train.decay", "cosine"),
        ("train.batch_size", 0),
        ("train.cloze_share", 1.0),
        ("train.objective.mode", "foo"),
        ("warmup.objective.temperature", 0.0),
        ("warmup.objective.dimension_weights", (1.0,)),
        ("train.trainable", "(query"),
        ("train.lora.target", "*"),
        ("train.lora.rank", -1),
        ("train.lora.dropout", 1.0),
        ("encoder.towers", "three"),
        ("encoder.projection", -1),
        ("encode.dimensions", -1),
        ("encode.dtype", "float8"),
        ("evaluate.hybrid", "foo"),
    ],
)
def test_a_value_that_no_stage_could_use_is_told_with_its_key(key, value):
    config = recipe()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError) as error:
        check_config(config)
    assert str(error.value).startswith(key) and "\n" not in str(error.value)


def test_a_learned_temperature_starts_between_its_bounds():
    config = recipe()
    config.train.objective.learn_temperature, config.train.objective.min_temperature = True, 0.5
    with pytest.raises(UserError, match="train.objective.temperature is 0.1; a learned one starts between"):
        check_config(config)


def test_score_rules_need_an_encoder_among_the_retrievers():
    config = recipe()
    config.mine.retrievers = "bm25"
    with pytest.raises(UserError, match="filters.percent_of_positive compares the scores of an encoder"):
        check_config(config)
