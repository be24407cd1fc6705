import itertools

import numpy as np
import pytest
from scipy import stats

from jdmdr.significance import Comparison, compare, corrected, holm


def systems(seed=0, sizes=(("en", 60), ("sw", 25)), gap=0.05):
    rng = np.random.default_rng(seed)
    a = {lang: rng.uniform(size=n) for lang, n in sizes}
    return a, {lang: values - gap + rng.normal(0, 0.15, len(values)) for lang, values in a.items()}


def weighted(a, b):
    """The macro average's difference as one sum: each query's share of it."""
    return np.concatenate([(a[lang] - b[lang]) / len(a[lang]) / len(a) for lang in a])


def test_the_randomisation_test_agrees_with_scipys_for_a_language_and_for_the_average():
    a, b = systems()
    found = compare(a, b, seed=1)
    for shares, name in ((weighted(a, b), "avg"), (weighted({"en": a["en"]}, b), "en")):
        oracle = stats.permutation_test((shares,), np.sum, permutation_type="samples", n_resamples=9999, rng=2)
        assert found[name].difference == pytest.approx(shares.sum())
        assert found[name].p == pytest.approx(oracle.pvalue, abs=4 * np.sqrt(oracle.pvalue / 9999))


def test_the_randomisation_test_agrees_with_all_sign_patterns():
    values = np.array([0.5, 0.25, -0.125, 0.5, 0.0, 1.0, -0.25])
    sums = [np.dot(signs, values) for signs in itertools.product((-1, 1), repeat=len(values))]
    exact = np.mean(np.abs(sums) >= values.sum())
    assert compare({"en": values}, {"en": np.zeros(7)}, seed=0)["en"].p == pytest.approx(exact, abs=0.015)


def test_the_bootstrap_agrees_with_scipys_and_its_interval_holds_the_difference():
    a, b = systems()
    found = compare(a, b, seed=1)["en"]
    values = a["en"] - b["en"]
    oracle = stats.bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=3)
    assert (found.low, found.high) == pytest.approx(oracle.confidence_interval, abs=0.004)
    assert found.low < found.difference < found.high
    p = np.mean(np.abs(oracle.bootstrap_distribution - values.mean()) >= abs(values.mean()))
    assert found.p_bootstrap == pytest.approx(p, abs=0.01)


def test_the_t_test_is_scipys_in_a_language_and_welchs_over_languages():
    a, b = systems()
    found = compare(a, b, seed=1)
    assert found["sw"].p_t == pytest.approx(stats.ttest_rel(a["sw"], b["sw"]).pvalue)
    # with two strata the mean of the means is a difference of means once one of them is negated
    differences = [a[lang] - b[lang] for lang in a]
    welch = stats.ttest_ind(differences[0], -differences[1], equal_var=False)
    assert found["avg"].p_t == pytest.approx(welch.pvalue)


def test_equal_systems_never_differ_and_far_apart_ones_always_do():
    a, _ = systems()
    same = compare(a, a, seed=0)["avg"]
    assert (same.difference, same.low, same.high, same.p, same.p_bootstrap, same.p_t) == (0, 0, 0, 1, 1, 1)
    far = compare(a, {lang: values - 1 for lang, values in a.items()}, seed=0, samples=999)["avg"]
    assert far.p == pytest.approx(1 / 1000) and far.p_bootstrap == pytest.approx(1 / 1000)


def test_p_below_alpha_is_as_rare_as_alpha_where_nothing_differs():
    found = [compare(*systems(seed, gap=0.0), seed=seed, samples=300)["avg"] for seed in range(300)]
    for p in ([c.p for c in found], [c.p_bootstrap for c in found], [c.p_t for c in found]):
        assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.11
    assert 0.90 < np.mean([c.low <= 0 <= c.high for c in found]) < 0.99


def test_a_languages_figures_depend_on_no_other_language_and_on_no_order():
    a, b = systems()
    both = compare(a, b, seed=1)
    assert compare(dict(reversed(a.items())), b, seed=1) == both
    assert compare({"sw": a["sw"]}, {"sw": b["sw"]}, seed=1)["sw"] == both["sw"]
    assert compare(a, b, seed=2)["sw"] != both["sw"]


def test_one_query_has_no_t_test():
    found = compare({"en": np.ones(1), "sw": np.zeros(2)}, {"en": np.zeros(1), "sw": np.ones(2)}, seed=0)
    assert found["en"].p_t is None and found["avg"].p_t is None and found["sw"].p_t == 0


def test_holm_equals_the_rule_worked_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03, 0.005])) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).tolist() == []


def test_averages_and_languages_are_corrected_as_two_families():
    def made(p):
        return Comparison(0.1, 0.0, 0.2, p, p, p, 10)

    found = corrected({"x": {"en": made(0.01), "avg": made(0.02)}, "y": {"en": made(0.2), "avg": made(0.03)}})
    assert found["x"]["en"].p_corrected == pytest.approx(0.02) and found["y"]["en"].p_corrected == pytest.approx(0.2)
    assert found["x"]["avg"].p_corrected == found["y"]["avg"].p_corrected == pytest.approx(0.04)


def test_values_of_other_queries_are_refused():
    for b in ({"en": np.zeros(3)}, {"sw": np.zeros(2)}, {}):
        with pytest.raises(ValueError, match="the same queries"):
            compare({"en": np.zeros(2)}, b, seed=0)
