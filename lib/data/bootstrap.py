"""Bootstrap intervals of a statistic of some rows (queries): its spread over other choices of the rows."""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000  # with so many the ends of an interval differ by about 2 % of its width from seed to seed
ENDS = 0.025, 0.975  # of a 95 % interval, by the percentile method


def bootstrap_interval(statistic: Callable[[np.ndarray], ArrayLike], count: int, seed: int = 0) -> np.ndarray:
    """95 % interval of a statistic, float64 [..., 2]: its quantiles over RESAMPLES samples of the rows, with replacement.

    statistic: a function of the numbers of the drawn rows, int64 [count]; returns one or several values, [...], such as means.
    The same seed draws the same rows.
    """
    random = np.random.default_rng(seed)
    values = np.stack([statistic(random.integers(count, size=count)) for _ in range(RESAMPLES)])
    return np.quantile(values, ENDS, axis=0).T
