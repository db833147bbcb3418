"""Bootstrap intervals of means over some rows (queries): their spread over other choices of the rows."""

import numpy as np

RESAMPLES = 1000  # with so many the ends of an interval differ by about 2 % of its width from seed to seed
ENDS = 0.025, 0.975  # of a 95 % interval, by the percentile method


def bootstrap_intervals(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """95 % intervals of the columns' means, float64 [columns, 2]. values: [rows, columns].

    They are quantiles of the means over RESAMPLES samples of the rows, with replacement. The same seed draws the same rows.
    """
    random, count = np.random.default_rng(seed), len(values)
    samples = (np.bincount(random.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    means = np.stack([times @ values / count for times in samples])
    return np.quantile(means, ENDS, axis=0).T
