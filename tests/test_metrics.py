"""Intervals, tests and win rates: by hand and against scipy."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ddpo.metrics import bootstrap, paired_bootstrap, sign_flip_test, win_rate

X = np.array([0.1, 0.3, -0.2, 0.5, 0.4])


def test_bootstrap_against_scipy():
    values = np.random.default_rng(0).exponential(size=40)
    found = bootstrap(values, num_resamples=4000)
    other = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1))
    assert found.mean == pytest.approx(values.mean()) and found.p is None
    np.testing.assert_allclose([found.low, found.high], other.confidence_interval, rtol=0.03)
    assert bootstrap([2.0]).low == bootstrap([2.0]).high == 2
    assert bootstrap(values, num_resamples=300) == bootstrap(values, num_resamples=300)


def test_bootstrap_in_parts(monkeypatch):
    """Draws are made in parts where there are many; nothing changes."""
    whole = bootstrap(X, num_resamples=1000)
    monkeypatch.setattr("ddpo.metrics.CHUNK", 70)
    assert bootstrap(X, num_resamples=1000) == whole


def test_sign_flip_test_by_hand():
    """Of the 32 sign patterns, those whose mean is as far from 0."""
    extreme = [abs(np.dot(signs, X)) >= abs(X.sum()) - 1e-12 for signs in itertools.product([1, -1], repeat=5)]
    assert sign_flip_test(X) == pytest.approx(np.mean(extreme))
    assert sign_flip_test([1.0]) == 1 and sign_flip_test(np.zeros(4)) == 1
    assert sign_flip_test(np.ones(10)) == pytest.approx(2 / 2**10)
    many = np.random.default_rng(0).normal(0.3, 1, 60)  # too many for all patterns: near the t-test's
    assert sign_flip_test(many, num_resamples=3000) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.02)


def test_paired_bootstrap():
    found = paired_bootstrap(X, X + np.arange(1, 6))
    assert found.mean == pytest.approx(3) and 1 < found.low < 3 < found.high < 5
    assert found.p == pytest.approx(2 / 32)
    before = np.arange(20.0)
    balanced = paired_bootstrap(before, before + np.tile([1.0, -1.0], 10))
    assert balanced.mean == 0 and -0.6 < balanced.low < -0.3 and 0.3 < balanced.high < 0.6 and balanced.p == 1
    same = paired_bootstrap(X, X)
    assert (same.mean, same.low, same.high, same.p) == (0, 0, 0, 1)


@pytest.mark.parametrize("wrong", [[], [[1.0]], [np.nan], 3.0])
def test_wrong_values(wrong):
    with pytest.raises(ValueError, match="want finite values"):
        bootstrap(wrong)
    with pytest.raises(ValueError, match="want finite values"):
        sign_flip_test(wrong)


def test_unequal_pairs():
    with pytest.raises(ValueError, match=r"two equal \(R,\)"):
        paired_bootstrap([1.0], [1.0, 2.0])


def test_win_rate_of_single_answers():
    """Wilson's interval of 7 of 10, by its formula; ties (rows of neither) change nothing."""
    wins = np.array([1] * 7 + [0] * 5)
    losses = np.array([0] * 7 + [1] * 3 + [0] * 2)
    found, z = win_rate(wins, losses), stats.norm.ppf(0.975)
    middle, half = (0.7 + z**2 / 20) / (1 + z**2 / 10), z * np.sqrt(0.021 + z**2 / 400) / (1 + z**2 / 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, middle - half, middle + half))
    assert found.p == pytest.approx(2 * stats.binom.sf(6, 10, 0.5))


def test_win_rate_of_several_answers():
    """Answers to one prompt stand together: the interval is wider than were they independent."""
    wins = np.array([3, 3, 3, 3, 0, 0, 3, 3, 0, 0])
    found = win_rate(wins, 3 - wins)
    wilson = stats.binomtest(18, 30).proportion_ci(0.95, "wilson")
    assert found.mean == pytest.approx(0.6)
    assert found.high - found.low > 1.3 * (wilson.high - wilson.low)
    assert found.p == pytest.approx(stats.binomtest(6, 10).pvalue), "ten prompts, not thirty answers"
    with pytest.raises(ValueError, match="neither a win nor a loss"):
        win_rate([0, 0], [0, 0])
