import numpy as np
import pytest

from jdmdr.language_bias import average, language_bias

LANGUAGES = {name: name[:2] for name in ("en1", "en2", "en3", "sw1", "sw2", "th1", "th2")}
MEMBERS = ["en", "sw", "th"]


def bias(qrels, *rankings, own="en", depth=6):
    runs = {
        qid: {name: float(-place) for place, name in enumerate(found)}
        for qid, found in zip(qrels, rankings, strict=True)
    }
    return language_bias(qrels, runs, LANGUAGES, own, MEMBERS, depth)


def test_the_figures_equal_those_worked_by_hand():
    qrels = {"q1": {"en1": 1, "sw1": 1, "th1": 1, "en2": 0}, "q2": {"en1": 1, "sw1": 1}}
    found = bias(qrels, ["en1", "sw1", "en2", "th1"], ["en3", "en2", "sw1"])
    assert found["shares"] == pytest.approx({"en": (2 / 4 + 2 / 3) / 2, "sw": (1 / 4 + 1 / 3) / 2, "th": 1 / 8})
    assert found["expected"] == pytest.approx({"en": (1 / 3 + 1 / 2) / 2, "sw": (1 / 3 + 1 / 2) / 2, "th": 1 / 6})
    assert found["own_excess"] == pytest.approx(found["shares"]["en"] - found["expected"]["en"])
    assert found["own_rank"] == np.median([1, 7]) and found["other_rank"] == np.median([2, 3])
    # q1: sw1 is above en2, th1 is not; q2: sw1 is below en3
    assert found["aligned"] == pytest.approx((1 / 2 + 0) / 2)


def test_a_ranking_by_meaning_alone_is_aligned_and_one_by_language_is_not():
    qrels = {"q": {"en1": 1, "sw1": 1, "th1": 1}}
    assert bias(qrels, ["th1", "en1", "sw1", "en2"])["aligned"] == 1
    assert bias(qrels, ["en1", "en2", "en3", "sw1", "th1"])["aligned"] == 0


def test_what_is_not_found_is_not_aligned_even_where_nothing_wrong_is_found_either():
    assert bias({"q": {"en1": 1, "sw1": 1, "th1": 1}}, ["en1", "sw1"])["aligned"] == 1 / 2


def test_queries_without_a_relevant_passage_of_a_kind_are_left_out_of_its_figure():
    found = bias({"q1": {"en1": 1}, "q2": {"sw1": 0}}, ["en1"], ["sw1"])
    assert found["other_rank"] is None and found["aligned"] is None
    assert found["own_rank"] == 1 and found["expected"] == {"en": 1, "sw": 0, "th": 0}
    nothing = bias({"q": {"en1": 1}}, [])
    assert nothing["shares"] == {} and nothing["own_excess"] is None and nothing["own_rank"] == 7


def test_the_average_is_over_the_languages_that_have_a_figure():
    found = {"en": bias({"q": {"en1": 1, "sw1": 1}}, ["en1", "sw1"]), "sw": bias({"q": {"sw1": 1}}, ["sw1"], own="sw")}
    assert average(found) == {"own_excess": 0.0, "own_rank": 1.0, "other_rank": 2.0, "aligned": 1.0}
    assert average({"sw": found["sw"]})["aligned"] is None
