import numpy as np
import pytest

from jdmdr.types import UserError
from jdmdr.weights import beta_of_batch, make_weights

# MIRACL train queries by language, and the language weights they give with a = 0.45, gamma_a = 0.5.
TRAIN_QUERIES = dict(
    ar=3495, bn=1631, en=2863, es=2162, fa=2107, fi=2897, fr=1143, hi=1169,
    id=4071, ja=3477, ko=868, ru=4683, sw=1901, te=3452, th=2972, zh=1312,
)  # fmt: skip
ALPHA = dict(
    ru=0.339, id=0.363, ar=0.392, ja=0.393, te=0.394, th=0.425, fi=0.430, en=0.433,
    es=0.498, fa=0.505, sw=0.531, bn=0.574, zh=0.640, hi=0.678, fr=0.685, ko=0.786,
)  # fmt: skip


def labels(counts_LxC):
    counts = np.asarray(counts_LxC)
    lang, topic = np.nonzero(counts)
    return np.repeat(lang, counts[lang, topic]), np.repeat(topic, counts[lang, topic])


def weights(counts_LxC, **options):
    lang_n, topic_n = labels(counts_LxC)
    return make_weights(lang_n, topic_n, *np.shape(counts_LxC), **options)


def test_miracl_language_weights_are_those_of_the_method():
    table = weights(np.array(list(TRAIN_QUERIES.values()))[:, None])
    for lang, value in zip(TRAIN_QUERIES, table.alpha_L, strict=True):
        assert value == pytest.approx(ALPHA[lang], abs=6e-4), lang


COUNTS = np.array([[30, 10, 60], [5, 5, 10]])


def test_means_under_the_data_are_a_and_b():
    table = weights(COUNTS, a=0.45, b=0.40)
    assert COUNTS.sum(1) / COUNTS.sum() @ table.alpha_L == pytest.approx(0.45, rel=1e-6)
    smoothed = (COUNTS + 1) / (COUNTS + 1).sum(1, keepdims=True)
    np.testing.assert_allclose((smoothed * table.beta_LxC).sum(1), 0.40, rtol=1e-6)


def test_topic_weights_equal_the_formula_written_out():
    table = weights(COUNTS, b=0.4, gamma_b=0.7)
    for lang in range(2):
        shares = [(count + 1) / (COUNTS[lang].sum() + 3) for count in COUNTS[lang]]
        norm = sum(share * share**-0.7 for share in shares)
        np.testing.assert_allclose(table.beta_LxC[lang], [0.4 * share**-0.7 / norm for share in shares], rtol=1e-6)


def test_gamma_zero_gives_the_constants():
    table = weights(COUNTS, a=0.55, b=0.2, gamma_a=0, gamma_b=0)
    np.testing.assert_allclose(table.alpha_L, 0.55)
    np.testing.assert_allclose(table.beta_LxC, 0.2)


def test_sign_chooses_between_the_rare_and_the_majority():
    rare, majority = weights(COUNTS), weights(COUNTS, sign=1)
    assert rare.alpha_L[0] < rare.alpha_L[1] and majority.alpha_L[0] > majority.alpha_L[1]
    assert np.all(np.argsort(rare.beta_LxC[0]) == np.argsort(-majority.beta_LxC[0]))


def test_weights_are_clipped_to_a_quarter_and_four_times_the_mean():
    table = weights([[100_000, 1], [1, 0], [0, 0]], a=0.4, gamma_a=1.0, b=0.4, gamma_b=1.0)
    assert table.alpha_L[1] == pytest.approx(1.6)
    assert table.alpha_L[2] == pytest.approx(1.6), "a language without queries is as rare as can be"
    assert table.beta_LxC[0].min() >= 0.1 - 1e-7 and table.beta_LxC[0].max() <= 1.6 + 1e-7


def test_dataset_scope_counts_all_languages_together():
    table = weights(COUNTS, topic_scope="dataset")
    np.testing.assert_array_equal(table.beta_LxC[0], table.beta_LxC[1])
    np.testing.assert_allclose(table.beta_LxC[0], weights(COUNTS.sum(0, keepdims=True)).beta_LxC[0])


def test_batch_scope_recounts_each_batch():
    table = weights(COUNTS, topic_scope="batch")
    topic_B = np.array([0, 0, 0, 1])
    expected = weights(np.bincount(topic_B, minlength=3)[None]).beta_LxC[0]
    np.testing.assert_allclose(beta_of_batch(table, topic_B), [expected, expected])


def test_other_scopes_do_not_depend_on_the_batch():
    table = weights(COUNTS)
    np.testing.assert_array_equal(beta_of_batch(table, np.array([2, 2])), table.beta_LxC)


@pytest.mark.parametrize("option", [{"topic_scope": "languages"}, {"sign": 0}])
def test_unknown_choices_are_refused_by_name(option):
    with pytest.raises(UserError, match=f"weights.{next(iter(option))}"):
        weights(COUNTS, **option)
