from collections import Counter

import numpy as np
import pytest
from conftest import labels
from hypothesis import given, settings
from hypothesis import strategies as st

from jdmdr import planner as planning
from jdmdr.planner import Planner
from jdmdr.types import UserError

COUNTS = np.array([[40, 10, 3], [5, 0, 60], [0, 17, 20]])
LANG, TOPIC = labels(COUNTS)
B = 8


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.lists(st.integers(0, 12), min_size=3, max_size=3), min_size=1, max_size=4).filter(
        lambda counts: sum(map(sum, counts)) > 0
    ),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 9),
    policy=st.sampled_from(["stratified", "round_robin", "language_only", "topic_only", "random"]),
)
def test_every_query_is_used_once_per_pass_whatever_the_data(counts, batch_size, seed, policy):
    lang_n, topic_n = labels(counts)
    planner = Planner(lang_n, topic_n, batch_size, seed, policy)
    steps = planner.steps_before(6)
    seen = {}
    for step in range(steps):
        for index, visit in zip(*planner.plan(step)[2:], strict=True):
            seen.setdefault(int(index), []).append(int(visit))
    for index, visits in seen.items():
        # The last pass may be under way, and an epoch shuffles its batches: each visit occurs once, none is skipped.
        assert sorted(visits) == list(range(len(visits))), index
    groups = lang_n if planner.plan(0).lang != planning.MIXED else np.zeros_like(lang_n)
    for group in np.unique(groups):
        used = [len(seen.get(int(index), [])) for index in np.flatnonzero(groups == group)]
        assert max(used) - min(used) <= 1


def test_a_language_that_divides_evenly_is_used_exactly_once_per_epoch():
    lang_n, topic_n = labels([[8, 8], [20, 4]])
    planner = Planner(lang_n, topic_n, B, seed=0)
    for epoch in range(3):
        steps = range(planner.steps_before(epoch), planner.steps_before(epoch + 1))
        index = np.concatenate([planner.batch_indices(step) for step in steps])
        assert sorted(index) == list(range(40))


@pytest.mark.parametrize("policy", ["stratified", "round_robin", "uniform", "language_only"])
def test_batches_are_monolingual(policy):
    planner = Planner(LANG, TOPIC, B, seed=1, policy=policy)
    langs = []
    for step in range(planner.steps_before(3)):
        plan = planner.plan(step)
        assert set(LANG[plan.index_B]) == {plan.lang} and len(plan.index_B) == B
        langs.append(plan.lang)
    assert len(set(langs)) == 3


@pytest.mark.parametrize("policy", ["random", "topic_only"])
def test_ablation_policies_mix_languages(policy):
    planner = Planner(LANG, TOPIC, 32, seed=1, policy=policy)
    assert all(len(set(LANG[planner.batch_indices(step)])) > 1 for step in range(4))
    assert planner.plan(0).lang == planning.MIXED


def topic_spread(policy):
    """Largest distance, in queries, of a batch's topic counts from its language's mix."""
    planner = Planner(LANG, TOPIC, 16, seed=3, policy=policy)
    distance = 0
    for step in range(planner.steps_before(20)):
        plan = planner.plan(step)
        mix = COUNTS[plan.lang] / COUNTS[plan.lang].sum()
        distance = max(distance, np.abs(np.bincount(TOPIC[plan.index_B], minlength=3) - 16 * mix).max())
    return distance


def test_stratified_batches_carry_the_topic_mix_of_their_language():
    # A topic's items are evenly spaced, so a stretch of 16 misses its share by less than one item per topic and end.
    assert topic_spread("stratified") <= 4
    assert topic_spread("language_only") > 4


def test_round_robin_takes_topics_in_turn():
    lang_n, topic_n = labels([[30, 3, 4]])
    index = Planner(lang_n, topic_n, 9, seed=0, policy="round_robin")._pass(0, 0)
    assert topic_n[index].tolist() == [0, 1, 2] * 3 + [0, 2] + [0] * 26


def test_uniform_gives_topics_equal_slots():
    planner = Planner(LANG, TOPIC, 9, seed=0, policy="uniform")
    for step in range(planner.steps_before(2)):
        plan = planner.plan(step)
        counts = Counter(TOPIC[plan.index_B].tolist())
        assert set(counts) == set(np.flatnonzero(COUNTS[plan.lang]))
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("policy", list(planning.POLICIES))
def test_a_batch_is_a_pure_function_of_seed_and_step(policy):
    planner = Planner(LANG, TOPIC, B, seed=1, policy=policy)
    in_order = [planner.batch_indices(step) for step in range(60)]
    for step in [59, 3, 40, 41, 0]:
        np.testing.assert_array_equal(Planner(LANG, TOPIC, B, 1, policy).batch_indices(step), in_order[step])
        np.testing.assert_array_equal(planner.batch_indices(step), in_order[step])
    other = [Planner(LANG, TOPIC, B, 2, policy).batch_indices(step) for step in range(60)]
    assert not np.array_equal(in_order, other)


def test_epochs_differ_in_order():
    lang_n, topic_n = labels([[16, 8]])
    planner = Planner(lang_n, topic_n, B, seed=0)
    assert not np.array_equal(planner.batch_indices(0), planner.batch_indices(3))


def test_languages_are_shuffled_over_the_epoch():
    planner = Planner(LANG, TOPIC, 4, seed=0)
    langs = [planner.plan(step).lang for step in range(planner.steps_before(1))]
    changes = sum(a != b for a, b in zip(langs, langs[1:], strict=False))
    assert changes > len(langs) / 3


@pytest.mark.parametrize("counts, batch_size", [([[3, 2], [1, 0]], 16), ([[1]], 5), ([[50, 7], [2, 1]], 8)])
def test_every_epoch_has_a_batch_and_small_languages_get_theirs_over_several(counts, batch_size):
    lang_n, topic_n = labels(counts)
    planner = Planner(lang_n, topic_n, batch_size, seed=0)
    starts = [planner.steps_before(epoch) for epoch in range(60)]
    assert starts[0] == 0 and np.all(np.diff(starts) >= 1)
    assert {planner.plan(step).lang for step in range(starts[-1])} == set(lang_n.tolist())
    for epoch in range(59):
        assert {planner.epoch_of(step) for step in range(starts[epoch], starts[epoch + 1])} == {epoch}


def test_a_step_far_away_is_found_without_replay():
    planner = Planner(LANG, TOPIC, B, seed=0)
    step = 10**9
    epoch = planner.epoch_of(step)
    assert planner.steps_before(epoch) <= step < planner.steps_before(epoch + 1)
    assert len(planner.batch_indices(step)) == B


@pytest.mark.parametrize(
    "policy, lang_temp", [("stratified", 1.0), ("stratified", 0.5), ("uniform", 1.0), ("random", 1.0)]
)
def test_realised_shares_approach_the_expected_ones(policy, lang_temp):
    planner = Planner(LANG, TOPIC, B, seed=0, policy=policy, lang_temp=lang_temp)
    expected, realised = planner.expected_shares(), planner.realised_shares(0, planner.steps_before(30))
    for aim, share in zip(expected, realised, strict=True):
        assert aim.sum() == pytest.approx(1) and share.sum() == pytest.approx(1)
        np.testing.assert_allclose(share, aim, atol=0.02)


def test_lang_temp_flattens_language_shares():
    sizes = COUNTS.sum(1)
    shares = Planner(LANG, TOPIC, B, seed=0, lang_temp=0.5).expected_shares().lang_L
    np.testing.assert_allclose(shares, sizes**0.5 / (sizes**0.5).sum(), atol=0.01)
    np.testing.assert_allclose(Planner(LANG, TOPIC, B, seed=0).expected_shares().lang_L, sizes / sizes.sum())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "sorted"}, "batches.policy is 'sorted'"),
        ({"policy": "random", "lang_temp": 0.5}, "batches.lang_temp"),
    ],
)
def test_impossible_plans_are_refused_by_key(options, message):
    with pytest.raises(UserError, match=message):
        Planner(LANG, TOPIC, B, seed=0, **options)


def test_no_queries_are_refused():
    with pytest.raises(UserError, match="no training query"):
        Planner(LANG[:0], TOPIC[:0], B, seed=0)
