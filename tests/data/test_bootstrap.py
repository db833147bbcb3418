"""Bootstrap intervals: of the right size, the same for the same seed, and of the same rows for every column."""

import numpy as np

from lib.data.bootstrap import RESAMPLES, bootstrap_interval


def test_it_is_the_interval_of_the_normal_distribution():
    """For the mean of many values: the mean and 1.96 standard errors to both sides, within what RESAMPLES samples tell."""
    values = np.random.default_rng(1).normal(5, 2, 2000)
    low, high = bootstrap_interval(lambda rows: values[rows].mean(), len(values))
    error = values.std() / np.sqrt(len(values))
    np.testing.assert_allclose([low, high], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.3 * error)


def test_a_statistic_may_have_several_values():
    """Each has the interval that it has alone, since one seed draws one series of samples."""
    values = np.random.default_rng(2).random((50, 3))
    together = bootstrap_interval(lambda rows: values[rows].mean(axis=0), 50, seed=4)
    alone = [bootstrap_interval(lambda rows, c=c: values[rows, c].mean(), 50, seed=4) for c in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-12)


def test_the_samples_are_the_published_draws():
    """All of numpy's generator with that seed, one sample after another: intervals that were computed before stay."""
    values = np.random.default_rng(3).random(31)
    draws = np.random.default_rng(0).integers(0, 31, (RESAMPLES, 31))
    expected = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    np.testing.assert_array_equal(bootstrap_interval(lambda rows: values[rows].mean(), 31), expected)
