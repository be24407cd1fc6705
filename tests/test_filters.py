import numpy as np
import pytest

from jdmdr import corpus, datasets
from jdmdr.corpus import write_jsonl
from jdmdr.filters import (
    EMPTY,
    KEPT,
    Candidates,
    Context,
    Filter,
    answers,
    apply_filters,
    audit,
    counts_table,
    cross_encoder_rules,
    rules_from_config,
)
from jdmdr.filters.rules import Column
from jdmdr.types import NO_HIT, UserError


def candidates_of(scores, positive_score, rows=None):
    scores_QxK = np.asarray(scores, np.float32)
    rows_QxK = np.arange(scores_QxK.size).reshape(scores_QxK.shape) if rows is None else np.asarray(rows)
    return Candidates(rows_QxK.astype(np.int64), scores_QxK, scores_QxK, np.asarray(positive_score, np.float32))


def context_of(queries, positive_rows=None, texts=None):
    return Context(positive_rows or [[] for _ in range(queries)], texts.__getitem__ if texts else str)


def kept_rows(candidates, config, context=None):
    kept, _, _ = apply_filters(candidates, rules_from_config(config), context or context_of(len(candidates.rows_QxK)))
    return [[row for row in rows_K if row != NO_HIT] for rows_K in kept.rows_QxK.tolist()]


@pytest.mark.parametrize(
    "config, expected",
    [
        ({}, [0, 1, 2, 3]),
        ({"skip": None, "max_score": None}, [0, 1, 2, 3]),
        ({"skip": 1}, [1, 2, 3]),
        ({"depth": 3}, [0, 1, 2]),
        ({"skip": 1, "depth": 2}, [1, 2]),
        ({"max_score": 0.6}, [2, 3]),
        ({"absolute_margin": 0.0}, [1, 2, 3]),
        ({"absolute_margin": 0.15}, [2, 3]),
        ({"relative_margin": 0.5}, [3]),
        ({"percent_of_positive": 0.5}, [3]),
    ],
)
def test_each_rule_keeps_what_its_definition_says(config, expected):
    assert kept_rows(candidates_of([[0.8, 0.7, 0.5, 0.25]], [0.8]), config) == [expected]


def test_skip_and_depth_split_the_ranks_left_after_the_positives():
    candidates = candidates_of([[9, 8, 7, 6, 5]], [9])
    assert kept_rows(candidates, {"skip": 1}, context_of(1, [[0]])) == [[2, 3, 4]]
    assert kept_rows(candidates, {"depth": 2}, context_of(1, [[0, 2]])) == [[1, 3]]


@pytest.mark.parametrize("config", [{"relative_margin": 0.05}, {"percent_of_positive": 0.95}])
def test_margins_point_down_for_negative_scores_too(config):
    assert kept_rows(candidates_of([[-0.49, -0.5, -0.52, -0.6]], [-0.5]), config) == [[3]]


@pytest.mark.parametrize("seed", range(20))
def test_no_positive_and_nothing_above_the_positive_survives_a_margin(seed):
    rng = np.random.default_rng(seed)
    queries, depth = 8, 12
    rows_QxK = np.stack([rng.permutation(20)[:depth] for _ in range(queries)])
    rows_QxK[rng.random((queries, depth)) < 0.1] = NO_HIT
    positives = [rng.permutation(20)[: rng.integers(1, 4)].tolist() for _ in range(queries)]
    candidates = candidates_of(rng.standard_normal((queries, depth)) * 3, rng.standard_normal(queries), rows_QxK)
    key = rng.choice(["absolute_margin", "relative_margin"])
    margin = rng.choice([0.0, 0.05, 0.5, 2.0])
    rules = rules_from_config({key: margin})
    kept, reasons_QxK, counts = apply_filters(candidates, rules, context_of(queries, positives))
    for q in range(queries):
        there = kept.rows_QxK[q] != NO_HIT
        assert not set(kept.rows_QxK[q]) & set(positives[q])
        assert (kept.threshold_scores_QxK[q][there] < kept.positive_score_Q[q]).all()
    assert sum(counts.values()) == (rows_QxK != NO_HIT).sum()
    assert counts["kept"] == (reasons_QxK == KEPT).sum() == (kept.rows_QxK != NO_HIT).sum()


def test_the_score_rules_read_the_threshold_scores_and_let_unknown_ones_pass():
    candidates = candidates_of([[3, 2, 1]], [0.5])._replace(threshold_scores_QxK=np.array([[0.4, 0.9, np.nan]]))
    assert kept_rows(candidates, {"relative_margin": 0.0}) == [[0, 2]]
    assert kept_rows(candidates, {"max_score": 0.5}) == [[0, 2]]
    assert kept_rows(candidates._replace(positive_score_Q=np.array([np.nan])), {"relative_margin": 0.0}) == [[0, 1, 2]]


ORACLES = {
    "max_score": lambda score, positive, value: score < value,
    "absolute_margin": lambda score, positive, value: score < positive - value,
    "relative_margin": lambda score, positive, value: score < positive - value * abs(positive),
    "percent_of_positive": lambda score, positive, value: score < value * positive,
}


@pytest.mark.parametrize("rule", ORACLES)
def test_the_cross_encoders_rules_compare_its_own_scores(rule):
    random = np.random.default_rng(len(rule))
    scores_QxK, positive_Q = random.random((6, 9)), random.random(6)
    scores_QxK[random.random((6, 9)) < 0.2] = np.nan
    candidates = candidates_of(random.random((6, 9)), np.full(6, -1))  # all of them fail the retriever's own margins
    rows_QxK = np.where(random.random((6, 9)) < 0.1, NO_HIT, candidates.rows_QxK)
    candidates = candidates._replace(rows_QxK=rows_QxK)
    config = {"cross_encoder": {rule: 0.4, "max_score": 0.4 if rule == "max_score" else None}}
    rules = [*rules_from_config(config), *cross_encoder_rules(config, Column(scores_QxK, positive_Q))]
    assert [of.name for of in rules] == ["positive", f"cross_encoder.{rule}"]
    kept, reasons_QxK, counts = apply_filters(candidates, rules, context_of(6))
    for q in range(6):
        expected = [
            rows_QxK[q, k]
            for k in range(9)
            if rows_QxK[q, k] != NO_HIT
            and (np.isnan(scores_QxK[q, k]) or ORACLES[rule](scores_QxK[q, k], positive_Q[q], 0.4))
        ]
        assert kept.rows_QxK[q][kept.rows_QxK[q] != NO_HIT].tolist() == expected
    assert counts[f"cross_encoder.{rule}"] == (reasons_QxK == 1).sum() > 0


def test_a_drop_tells_the_scores_that_its_rule_compared(tmp_path):
    config = {"relative_margin": 0.5, "cross_encoder": {"absolute_margin": 0.25}}
    column = Column(np.array([[0.9, 0.9, 0.125]]), np.array([0.75]))
    rules = [*rules_from_config(config), *cross_encoder_rules(config, column)]
    candidates = candidates_of([[0.75, 0.25, 0.25]], [1.0])
    _, reasons_QxK, _ = apply_filters(candidates, rules, context_of(1))
    audit.write_drops(tmp_path / "drops.tsv", ["q"], candidates, reasons_QxK, rules, "d{}".format)
    assert (tmp_path / "drops.tsv").read_text().split("\n")[1:-1] == [
        "q\td0\trelative_margin\t0.75\t0.5", "q\td1\tcross_encoder.absolute_margin\t0.9\t0.5"
    ]  # fmt: skip


def test_survivors_move_to_the_front_and_every_drop_has_its_reason():
    candidates = candidates_of([[9, 8, 7, -np.inf], [6, 5, 4, 3]], [8.5, 10], [[10, 11, 12, NO_HIT], [13, 14, 15, 16]])
    rules = rules_from_config({"relative_margin": 0.0, "depth": 3})
    kept, reasons_QxK, counts = apply_filters(candidates, rules, context_of(2, [[11], []]))
    assert [rule.name for rule in rules] == ["positive", "depth", "relative_margin"]
    assert reasons_QxK.tolist() == [[2, 0, KEPT, EMPTY], [KEPT, KEPT, KEPT, 1]]
    assert kept.rows_QxK.tolist() == [[12, NO_HIT, NO_HIT, NO_HIT], [13, 14, 15, NO_HIT]]
    assert kept.scores_QxK.tolist() == [[7] + [-np.inf] * 3, [6, 5, 4, -np.inf]]
    assert counts == {"positive": 1, "depth": 1, "relative_margin": 1, "kept": 4}


def test_near_duplicates_of_any_positive_go_in_any_script():
    texts = [
        "The Nile is a river of Africa, and it is long.",  # positive
        "the nile is a RIVER of africa and it is long",
        "The Nile is a river of Africa, and it is very old.",
        "The Amazon rises in Peru.",
        "尼罗河是非洲的一条河流",  # positive
        "尼罗河 是非洲的一条河流。",
        "亚马逊河发源于秘鲁",
    ]
    candidates = candidates_of([np.zeros(5)], [1], [[1, 2, 3, 5, 6]])
    context = context_of(1, [[0, 4]], texts)
    assert kept_rows(candidates, {"near_duplicate": 1.0}, context) == [[2, 3, 5, 6]]
    assert kept_rows(candidates, {"near_duplicate": 0.5}, context) == [[3, 6]]


def test_a_candidate_that_holds_an_answer_goes_token_by_token(tmp_path):
    passages = [
        ("0", "Rome", "The Ne\u0301ron lived, in rome."), ("1", "", "Romeo, not the city."), ("2", "Rome", "No answer here."),
        ("3", "", "It had 1,000 legions."), ("4", "", "It had 1 000 legions."), ("5", "", "U.S.A. and USA"),
    ]  # fmt: skip
    write_jsonl(tmp_path / "c.jsonl", ({"docid": d, "title": title, "text": text} for d, title, text in passages))
    corpus.ingest("en", datasets.LanguageFiles([tmp_path / "c.jsonl"], {}, {}, None), tmp_path / "en")
    rows = [
        {"qid": "a", "answers": ["Rome", "n\u00e9ron"]}, {"qid": "b", "answers": ["1,000"]}, {"qid": "c", "answers": ["U.S.A.", " "]},
        {"qid": "e", "answers": []},
    ]  # fmt: skip
    write_jsonl(tmp_path / "en.jsonl", rows)
    collection = corpus.Collection(tmp_path / "en")
    rules = answers.rules(str(tmp_path / "{lang}.jsonl"), "en", ["a", "b", "c", "d", "e"], collection)
    candidates = candidates_of(np.zeros((5, 6)), np.zeros(5), np.tile(np.arange(6), (5, 1)))
    kept, _, counts = apply_filters(candidates, rules, context_of(5))
    left = [[row for row in rows_K if row != NO_HIT] for rows_K in kept.rows_QxK.tolist()]
    assert left == [[1, 2, 3, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4], [*range(6)], [*range(6)]]
    assert counts == {"answers": 3, "kept": 27}
    assert (
        answers.rules("", "en", ["a"], collection)
        == answers.rules(str(tmp_path / "{lang}.jsonl"), "sw", ["a"], collection)
        == []
    )
    with pytest.raises(UserError, match="has no training query of en .its first is 'a', ours 'x'"):
        answers.rules(str(tmp_path / "{lang}.jsonl"), "en", ["x"], collection)
    with pytest.raises(UserError, match="filters.answers: .* does not exist"):
        answers.files(str(tmp_path / "{lang}.jsonl"), ["sw"])


def test_texts_of_dropped_candidates_are_not_read():
    read = []
    context = Context([[0]], lambda row: read.append(row) or f"text {row}")
    kept_rows(candidates_of([[3, 2, 1]], [3], [[0, 1, NO_HIT]]), {"near_duplicate": 0.9}, context)
    assert sorted(read) == [0, 1]


def test_any_named_function_is_a_filter():
    odd = Filter("odd", lambda candidates, context: candidates.rows_QxK % 2 == 1)
    kept, _, counts = apply_filters(candidates_of([[3, 2, 1]], [3]), [odd], context_of(1))
    assert kept.rows_QxK.tolist() == [[1, NO_HIT, NO_HIT]] and counts == {"odd": 2, "kept": 1}


@pytest.mark.parametrize(
    "config, key",
    [
        ({"margin": 0.1}, "filters.margin"),
        ({"relative_margin": -0.1}, "filters.relative_margin is -0.1"),
        ({"percent_of_positive": 95}, "filters.percent_of_positive is 95"),
        ({"skip": -1}, "filters.skip"),
        ({"cross_encoder": {"depth": 1}}, "filters.cross_encoder.depth is no filter rule"),
        ({"cross_encoder": {"percent_of_positive": 95}}, "filters.cross_encoder.percent_of_positive is 95"),
        ({"cross_encoder": {"max_score": True}}, "filters.cross_encoder.max_score is True"),
        ({"depth": 0}, "filters.depth"),
        ({"near_duplicate": True}, "filters.near_duplicate is True"),
        ({"max_score": "0.6"}, "filters.max_score is '0.6'"),
    ],
)
def test_a_wrong_rule_is_named_with_its_value(config, key):
    with pytest.raises(UserError, match=key):
        rules_from_config(config)


def test_rules_come_from_a_config_dict_too():
    config_dict = pytest.importorskip("ml_collections").ConfigDict({"max_score": 0.6, "depth": None})
    assert [rule.name for rule in rules_from_config(config_dict)] == ["positive", "max_score"]


def test_the_table_shows_every_count_and_share():
    lines = counts_table({"positive": 10, "relative_margin": 1480, "kept": 510}).splitlines()
    assert [line.split() for line in lines] == [
        ["candidates", "2,000"],
        ["positive", "10", "0.5%"],
        ["relative_margin", "1,480", "74.0%"],
        ["kept", "510", "25.5%"],
    ]
