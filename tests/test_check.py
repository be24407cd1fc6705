import runpy

import pytest
from conftest import REPO

from jdmdr.check import check_config
from jdmdr.types import UserError


def recipe(name="quickstart", argument="smoke"):
    return runpy.run_path(REPO / "configs" / f"{name}.py")["get_config"](argument)


@pytest.mark.parametrize(
    "name, argument",
    [
        ("quickstart", ""),
        ("quickstart", "smoke"),
        ("dmdr", "mdpr"),
        ("dmdr", "smoke"),
        ("star", "star"),
        ("star", "inbatch"),
        ("star", "random"),
        ("star", "transformer"),
        ("star", "msmarco"),
        ("adore", ""),
        ("adore", "after"),
        ("adore", "transformer"),
        ("adore", "msmarco"),
        ("llm_tune", "smoke"),
    ],
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
        ("encoder.attention_dropout", 1.0),
        ("mine.fusion", "foo"),
        ("mine.index", "annoy"),
        ("mine.retrievers", "colbert"),
        ("mine.pool", "all"),
        ("filters.near_duplicate", 2.0),
        ("topics.scope", "batch"),
        ("topics.clusters", 0),
        ("judge.sampling", ()),
        ("judge.sampling", ((0.4, 2.0),)),
        ("judge.unjudged", "maybe"),
        ("judge.keep_below", 1.5),
        ("judge.queries", 0),
        ("llm.concurrency", 0),
        ("llm.max_calls", -1),
        ("llm.max_cost", 1.0),
        ("llm.timeout", 0.0),
        ("llm.extra_body", "[1]"),
        ("llm.extra_body", "{x"),
        ("expand.rounds", -1),
        ("expand.depths", ()),
        ("expand.depths", (40, 40)),
        ("expand.top_p", 0.0),
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
        ("encoder.projection_norm", True),
        ("encoder.passage_name", "x"),
        ("tokenizer.as_in", "2.8.0"),
        ("tokenizer.as_in", "2.9"),
        ("train.query_length", 65),
        ("warmup.passage_length", 0),
        ("encoder.projection", -1),
        ("encode.dimensions", -1),
        ("encode.dtype", "float8"),
        ("evaluate.hybrid", "foo"),
        ("tune.dtype", "float16"),
        ("tune.pattern", "(summar"),
        ("tune.rank", 0),
        ("tune.steps", 0),
        ("tune.warmup_share", 1.0),
        ("evaluate.measures", "msmarco_mrr@10,recall@1000"),
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


@pytest.mark.parametrize(
    "url, model, told",
    [
        ("http://localhost:8000/v1", "", "llm.model is empty"),
        ("localhost:8000/v1", "m", "llm.base_url is 'localhost:8000/v1'"),
        ("http://localhost:99999/v1", "m", "llm.base_url is"),
        ("http://me:secret@host/v1", "m", "llm.base_url holds a name or password"),
    ],
)
def test_a_servers_address_is_checked_before_any_work_and_a_password_in_it_is_not_repeated(url, model, told):
    config = recipe()
    config.llm.base_url, config.llm.model = url, model
    with pytest.raises(UserError, match=told) as raised:
        check_config(config)
    assert "secret" not in str(raised.value)


def test_new_queries_need_a_retriever_that_can_search_for_them():
    config = recipe()
    config.llm.base_url, config.llm.model = "http://localhost:8000/v1", "m"
    config.mine.retrievers, config.filters.percent_of_positive = "run:a.trec", None
    with pytest.raises(UserError, match="no retriever of mine.retrievers can search for a new query"):
        check_config(config)
