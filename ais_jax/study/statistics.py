"""Means over seeds, paired differences, and what they allow to be said. NumPy and SciPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_COLLAPSE = 0.5  # of the best reward over as many steps


class Mean(NamedTuple):
    """Over seeds."""

    value: float
    error: float  # standard error, NaN of one seed
    seeds: int


class Difference(NamedTuple):
    """Mean over the seeds that two arms share, with a 95 % interval by Student's t."""

    value: float
    half_width: float  # NaN of fewer than two seeds
    seeds: int


def mean(values: Sequence[float]) -> Mean:
    """Of the seeds' values."""
    if not values:
        return Mean(math.nan, math.nan, 0)
    error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if values[1:] else math.nan
    return Mean(float(np.mean(values)), error, len(values))


def paired(differences: Sequence[float]) -> Difference:
    """The mean of paired differences and the half-width of its 95 % interval."""
    count = len(differences)
    if not count:
        return Difference(math.nan, math.nan, 0)
    if count == 1:
        return Difference(float(differences[0]), math.nan, 1)
    error = np.std(differences, ddof=1) / math.sqrt(count)
    quantile = stats.t.ppf(0.975, count - 1)
    return Difference(float(np.mean(differences)), float(quantile * error), count)


def verdict(difference: Difference, limit: float) -> str:
    """In words: undecided where the interval is wider than `limit` on either side."""
    value, half, _ = difference
    if not half <= limit:
        if abs(value) > half:
            return f"undecided, interval {'above' if value > 0 else 'below'} 0"
        return "undecided"
    if abs(value) <= half:
        return "no difference seen"
    return "better" if value > 0 else "worse"


def has_collapsed(rewards: Sequence[float | None], window: int) -> bool:
    """Whether the last `window` rewards are less than half of the best `window` in a row."""
    values = np.array([0.0 if x is None else x for x in rewards])
    means = np.convolve(values, np.full(window, 1 / window), "valid")
    return bool(means.max() > 0 and means[-1] < _COLLAPSE * means.max())
