"""Means over seeds, paired differences, and what they allow to be said. NumPy and SciPy alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

_COLLAPSE = 0.5  # of the best reward over as many steps
_FEWEST = 3  # seeds that say something


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
    p: float = math.nan  # two-sided, of no difference


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
    value, error = float(np.mean(differences)), np.std(differences, ddof=1) / math.sqrt(count)
    half = float(stats.t.ppf(0.975, count - 1) * error)
    if error == 0:
        return Difference(value, half, count, float(value == 0))
    return Difference(value, half, count, float(2 * stats.t.sf(abs(value) / error, count - 1)))


def holm(ps: Sequence[float]) -> list[float]:
    """P-values for all of a family at once (Holm, Scand. J. Statist. 6, 1979); NaN is no member."""
    members = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    found, largest = [math.nan] * len(ps), 0.0
    for rank, (p, i) in enumerate(members):
        largest = max(largest, min(1.0, (len(members) - rank) * p))
        found[i] = largest
    return found


def verdict(difference: Difference, limit: float) -> str:
    """In words: undecided where the interval is wider than `limit` on either side, or seeds few."""
    value, half, seeds, _ = difference
    if seeds < _FEWEST:
        return "undecided"
    if not half <= limit:
        if abs(value) > half:
            return f"undecided, interval {'above' if value > 0 else 'below'} 0"
        return "undecided"
    if abs(value) <= half:
        return "no difference seen"
    return "better" if value > 0 else "worse"


def has_collapsed(rewards: Sequence[float | None]) -> bool:
    """Whether the last rewards are less than half of the best that as many steps in a row had.

    They are those of the last twentieth of the steps, at least ten: of fewer, noise would decide.
    """
    values = np.array([0.0 if x is None else x for x in rewards])
    window = min(max(math.ceil(len(values) / 20), 10), len(values))
    means = np.convolve(values, np.full(window, 1 / window), "valid")
    return bool(means.max() > 0 and means[-1] < _COLLAPSE * means.max())
