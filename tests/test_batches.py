from collections import Counter

import numpy as np
import pytest
from conftest import Source, labels
from hypothesis import given, settings
from hypothesis import strategies as st

from jdmdr import batches
from jdmdr.batches import Ragged, TrainingSet
from jdmdr.planner import Planner
from jdmdr.types import UserError
from jdmdr.weights import make_weights

COUNTS = np.array([[40, 10, 3], [5, 0, 60], [0, 17, 20]])
LANG, TOPIC = labels(COUNTS)
B = 8


def training_set(passages=400, seed=0):
    rng = np.random.default_rng(seed)
    positives = [rng.choice(50, rng.integers(1, 4), replace=False) for _ in LANG]
    negatives = [50 + rng.choice(passages - 50, rng.integers(2, 9), replace=False) for _ in LANG]
    return TrainingSet(
        lang_n=LANG,
        topic_n=TOPIC,
        positives=Ragged.of(positives),
        negatives=Ragged.of(negatives),
        passage_topic=rng.integers(0, 3, passages),
        queries=Source(rng.integers(1, 20, len(LANG))),
        passages=Source(rng.integers(1, 60, passages)),
    )


SHAPES = dict(chunk_rows=4, devices=1, query_max_length=24, passage_max_length=64, max_profiles=2, sample=8)


def maker(data, passages_per_query=4, planner=None, **options):
    planner = planner or Planner(data.lang_n, data.topic_n, B, seed=5)
    common = dict(passages_per_query=passages_per_query, seed=5)
    shapes = batches.plan_shapes([(data, planner)], batch_size=B, **common, **SHAPES)
    weights = make_weights(data.lang_n, data.topic_n, 3, 3, **options)
    return lambda step: batches.make_batch(data, planner, step, shapes=shapes, weights=weights, **common)


# --- passages of a query ---------------------------------------------------------------------------------------------


def test_positives_take_turns_and_all_negatives_are_seen_in_turn():
    positives, negatives = Ragged.of([[1, 2, 3]]), Ragged.of([range(100, 130)])
    rows = np.concatenate([batches.choose_passages(np.array([0]), e, positives, negatives, 8, 0) for e in range(30)])
    assert sorted(rows[:3, 0]) == [1, 2, 3] and np.array_equal(rows[:27, 0], rows[3:, 0])
    assert set(Counter(rows[:, 1:].ravel().tolist()).values()) == {7}, "30 epochs x 7 = 7 turns of 30"
    assert all(len(set(row[1:])) == 7 for row in rows)
    assert len(set(rows[:4, 1:].ravel())) == 28


def test_short_lists_are_drawn_from_with_replacement():
    positives, negatives = Ragged.of([[1]]), Ragged.of([[7, 8]])
    rows = [batches.choose_passages(np.array([0]), e, positives, negatives, 6, 0)[0, 1:] for e in range(20)]
    assert {tuple(row) for row in map(set, rows)} >= {(8, 7)} and set(np.ravel(rows)) == {7, 8}
    assert len({tuple(row) for row in rows}) > 5


def test_a_choice_depends_on_its_query_alone():
    data = training_set()
    index, epoch = np.array([5, 9, 30]), np.array([0, 3, 1])
    together = batches.choose_passages(index, epoch, data.positives, data.negatives, 5, 1)
    for i in range(3):
        alone = batches.choose_passages(index[i : i + 1], int(epoch[i]), data.positives, data.negatives, 5, 1)
        np.testing.assert_array_equal(together[i], alone[0])
        assert together[i, 0] in data.positives.values[slice(*data.positives.offsets[index[i] : index[i] + 2])]
        assert set(together[i, 1:]) <= set(
            data.negatives.values[slice(*data.negatives.offsets[index[i] : index[i] + 2])]
        )


def test_queries_without_negatives_need_one_passage_per_query():
    data = training_set()
    data = data._replace(negatives=Ragged.of([[60, 61], [], []] + [[62]] * (len(LANG) - 3)))
    batches.check_training_set(data, passages_per_query=1)
    with pytest.raises(UserError, match=r"2 of \d+ training queries have no negative passage \(the first is number 1,"):
        batches.check_training_set(data, passages_per_query=2)
    assert batches.choose_passages(np.array([1]), 0, data.positives, data.negatives, 1, 0).shape == (1, 1)


def test_a_query_without_positive_is_refused():
    data = training_set()
    data = data._replace(positives=Ragged.of([[0]] * (len(LANG) - 1) + [[]]))
    with pytest.raises(UserError, match="1 of .* no positive passage"):
        batches.check_training_set(data, 1)


# --- the batch -------------------------------------------------------------------------------------------------------


def test_batch_columns_agree_with_the_plan():
    data = training_set()
    planner = Planner(LANG, TOPIC, B, seed=5)
    for step in range(6):
        batch, figures = maker(data, planner=planner)(step)
        plan = planner.plan(step)
        np.testing.assert_array_equal(batch["query_index_B"], plan.index_B)
        assert figures["lang"] == plan.lang and 0 <= figures["padding_share"] < 1
        ids = batch["passage_ids_N"].tolist()
        weights = make_weights(LANG, TOPIC, 3, 3)
        for i, query in enumerate(plan.index_B):
            known = data.positives.values[slice(*data.positives.offsets[query : query + 2])].tolist()
            assert batch["target_B"][i] == i * 4 and ids[i * 4] in known
            listed = set(batch["positive_ids_BxM"][i].tolist()) - {-1}
            assert listed == set(known) & set(ids)
            np.testing.assert_allclose(
                batch["query_weight_B"][i], weights.alpha_L[plan.lang] + weights.beta_LxC[plan.lang, TOPIC[query]]
            )
        for j, row in enumerate(ids):
            assert batch["first_N"][j] == (row not in ids[:j])
            beta = weights.beta_LxC[plan.lang, data.passage_topic[row]]
            np.testing.assert_allclose(batch["weight_N"][j], weights.alpha_L[plan.lang] + beta)


def test_tokens_of_a_batch_are_those_of_its_rows():
    data = training_set()
    batch, _ = maker(data)(3)
    for side, rows in [("queries", batch["query_index_B"]), ("passages", batch["passage_ids_N"])]:
        block = batch[side]
        sequences = [part for row, ends in zip(block.ids_RxT, block.lengths_RxS.cumsum(1), strict=True)
                     for part in np.split(row, ends)[: block.lengths_RxS.shape[1] - 1]]  # fmt: skip
        for row, place in zip(rows, batch[side].order_N, strict=True):
            length = getattr(data, side).lengths(np.array([row]))[0]
            assert sequences[place].tolist() == [row] * length


def test_passages_inherit_the_topic_of_their_query_when_they_have_none():
    batch, _ = maker(training_set()._replace(passage_topic=None))(0)
    np.testing.assert_allclose(batch["weight_N"], np.repeat(batch["query_weight_B"], 4))


def test_batch_scope_weighs_by_the_topics_of_the_batch():
    data = training_set()._replace(passage_topic=None)
    batch, figures = maker(data, topic_scope="batch")(0)
    counts = np.bincount(TOPIC[batch["query_index_B"]], minlength=3)
    rarest, commonest = (batch["query_weight_B"][TOPIC[batch["query_index_B"]] == topic] for topic in
                         (np.where(counts, counts, 99).argmin(), counts.argmax()))  # fmt: skip
    assert rarest.min() >= commonest.max()


def test_batch_shapes_are_among_the_announced_ones():
    data = training_set()
    planner = Planner(LANG, TOPIC, B, seed=5)
    shapes = batches.plan_shapes([(data, planner)], batch_size=B, passages_per_query=4, seed=5, **SHAPES)
    make = maker(data, planner=planner)
    seen = set()
    for step in range(planner.steps_before(4)):
        batch, _ = make(step)
        seen.add(
            tuple(
                (batch[side].ids_RxT.shape[1], *sorted(set(batch[side].widths), reverse=True))
                for side in ("queries", "passages")
            )
        )
        assert batch["positive_ids_BxM"].shape == (B, shapes.positives_width)
    announced = {tuple((of[0], *sorted(set(of[1:]), reverse=True)) for of in profile) for profile in shapes.profiles}
    assert seen <= announced and len(shapes.profiles) <= 3


def test_more_known_positives_than_fit_still_list_those_in_the_batch():
    data = training_set()
    many = [[j % 50 for j in range(i, i + 45)] for i in range(len(LANG))]
    batch, _ = maker(data._replace(positives=Ragged.of(many)), passages_per_query=1)(0)
    assert batch["positive_ids_BxM"].shape[1] == batches.MAX_KNOWN_POSITIVES
    for i in range(B):
        in_batch = set(many[batch["query_index_B"][i]]) & set(batch["passage_ids_N"].tolist())
        assert set(batch["positive_ids_BxM"][i].tolist()) - {-1} == in_batch


# --- sources and iteration -------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 5))
def test_two_sources_keep_their_shares_at_every_step(share, seed):
    taken = [0, 0]
    for step in range(200):
        source, number = batches.interleave(step, [share, 1 - share], seed)
        assert number == taken[source]
        taken[source] += 1
        assert abs(taken[0] - share * (step + 1)) <= 1 + 1e-9


def test_three_sources_count_their_own_steps_and_keep_their_shares():
    taken = [0, 0, 0]
    for step in range(1000):
        source, number = batches.interleave(step, [5, 3, 2], seed=1)
        assert number == taken[source]
        taken[source] += 1
    np.testing.assert_allclose(taken, [500, 300, 200], atol=2)


def test_a_single_source_gets_every_step():
    assert [batches.interleave(step, [1.0], 0) for step in range(3)] == [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize("threads", [0, 2])
def test_iterator_gives_the_same_batches_for_any_thread_count_start_and_seek(threads):
    make = maker(training_set())
    expected = [make(step) for step in range(8)]

    def check(iterator, first):
        for (batch, figures), (wanted, wanted_figures) in zip(iterator, expected[first:], strict=True):
            assert figures == wanted_figures
            np.testing.assert_array_equal(batch["passage_ids_N"], wanted["passage_ids_N"])
            np.testing.assert_array_equal(batch["passages"].ids_RxT, wanted["passages"].ids_RxT)

    check(batches.batch_iterator(make, 0, 8, threads), 0)
    check(batches.batch_iterator(make, 5, 8, threads), 5)
    iterator = batches.batch_iterator(make, 0, 8, threads)
    next(iterator), next(iterator)
    state = iterator.get_state()
    assert state == {"next_index": 2}
    other = batches.batch_iterator(make, 7, 8, threads)
    other.set_state(state)
    check(other, 2)


def test_errors_of_the_maker_arrive_as_they_are():
    def make(step):
        raise UserError("nothing to read")

    with pytest.raises(UserError, match="nothing to read"):
        next(batches.batch_iterator(make, 0, 3))
