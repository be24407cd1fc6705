import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdmdr import batches
from jdmdr.batches import Planner, Ragged, TrainingSet
from jdmdr.types import Passage, Tokens, UserError
from jdmdr.weights import make_weights

TINYPEDIA = Path(__file__).parents[1] / "third_party/tinypedia"


def labels(counts_LxC, seed=0):
    """Labels with this many queries per language and topic, in random order."""
    counts = np.asarray(counts_LxC)
    lang, topic = np.nonzero(counts)
    order = np.random.default_rng(seed).permutation(counts.sum())
    repeats = counts[lang, topic]
    return np.repeat(lang, repeats)[order].astype(np.int32), np.repeat(topic, repeats)[order].astype(np.int32)


COUNTS = np.array([[40, 10, 3], [5, 0, 60], [0, 17, 20]])
LANG, TOPIC = labels(COUNTS)
B = 8


class Source:
    def __init__(self, lengths):
        self._lengths = np.asarray(lengths, np.int32)

    def lengths(self, rows):
        return self._lengths[rows]

    def gather(self, rows, width):
        mask = (np.arange(width) < self._lengths[rows][:, None]).astype(np.int32)
        return Tokens(np.asarray(rows, np.int32)[:, None] * mask, mask)


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


# --- who is in a batch -----------------------------------------------------------------------------------------------


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
    groups = lang_n if planner.plan(0).lang != batches.MIXED else np.zeros_like(lang_n)
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
    assert planner.plan(0).lang == batches.MIXED


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


@pytest.mark.parametrize("policy", list(batches.POLICIES))
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
        sequences = [
            row[mask > 0] for ids, m in zip(*batch[side][:2], strict=True) for row, mask in zip(ids, m, strict=True)
        ]
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
        seen.add(tuple(tuple(ids.shape[1] for ids in batch[side].ids) for side in ("queries", "passages")))
        assert batch["positive_ids_BxM"].shape == (B, shapes.positives_width)
    assert seen <= set(map(tuple, shapes.profiles)) and len(shapes.profiles) <= 3


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
            for ids, wanted_ids in zip(batch["passages"].ids, wanted["passages"].ids, strict=True):
                np.testing.assert_array_equal(ids, wanted_ids)

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


# --- inverse cloze ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("It flows 3.5 km. Does it end? In a delta!", ["It flows 3.5 km.", "Does it end?", "In a delta!"]),
        ("尼罗河位于非洲东北部。它的两大支流汇合！真的不知道吗？", ["尼罗河位于非洲东北部。", "它的两大支流汇合！"]),
        ("नील एक नदी है। वह उत्तर बहती है।", ["नील एक नदी है।", "वह उत्तर बहती है।"]),
        ("یہ ایک دریا ہے۔ کیا یہ لمبا ہے؟", ["یہ ایک دریا ہے۔", "کیا یہ لمبا ہے؟"]),
        ("แม่น้ำไนล์เป็นแม่น้ำ ไหลขึ้นไปทางทิศเหนือ", ["แม่น้ำไนล์เป็นแม่น้ำ", "ไหลขึ้นไปทางทิศเหนือ"]),
        ("first line of it\nsecond line of it", ["first line of it", "second line of it"]),
        ("One sentence only, without a mark", []),
    ],
)  # fmt: skip
def test_a_sentence_of_each_script_becomes_a_query(text, sentences):
    found = set()
    for seed in range(20):
        queries, rows = batches.inverse_cloze([(4, Passage("d", "", text))], seed)
        assert len(queries) == len(rows) <= 1
        found |= set(queries)
    # Pieces too short to stand for their passage never do.
    assert found == set(sentences)


def test_titles_are_queries_and_rows_are_kept():
    passages = [
        (10, Passage("a", "Nile", "")),
        (11, Passage("b", "", "")),
        (12, Passage("c", "Oslo", "It is cold. It is dark.")),
    ]
    queries, rows = batches.inverse_cloze(passages, seed=0)
    assert queries[:2] == ["Nile", "Oslo"] and queries[2] in ("It is cold.", "It is dark.")
    assert rows.tolist() == [10, 12, 12]


@pytest.mark.parametrize("lang", ["ar", "en", "hi", "ja", "ko", "sw", "th", "zh"])
def test_most_real_passages_give_a_title_and_a_sentence(lang):
    with open(TINYPEDIA / "corpus" / f"{lang}.jsonl", encoding="utf-8") as lines:
        passages = [(row, Passage(**json.loads(line))) for row, line in enumerate(lines)]
    queries, rows = batches.inverse_cloze(passages, seed=0)
    assert len(queries) > 1.8 * len(passages)
    texts = {row: f"{passage.title}\n{passage.text}" for row, passage in passages}
    assert all(query in texts[row] for query, row in zip(queries, rows.tolist(), strict=True))
    sentences = [query for query, row in zip(queries, rows.tolist(), strict=True) if query != passages[row][1].title]
    assert max(map(len, sentences)) < max(len(passage.text) for _, passage in passages)
