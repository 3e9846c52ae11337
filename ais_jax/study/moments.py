"""Bias and variance of a gradient from blocks of batches, with bootstrap intervals. NumPy alone.

A batch gives a gradient g by the arm and, with the same prompts and sampling keys, a gradient r by
unquantized sampling. The target is E[r]. Squares of means are estimated from products of different
blocks, so that they are unbiased: the square of a noisy mean would be too large by its variance.

Letters in shapes: N blocks, P entries of a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

_RESAMPLES = 2000


class Blocks(NamedTuple):
    """Means over each block's batches."""

    gradients: np.ndarray  # [N, P] of g
    references: np.ndarray  # [N, P] of r
    squares: np.ndarray  # [N] of |g|^2
    reference_squares: np.ndarray  # [N] of |r|^2


class Interval(NamedTuple):
    """An estimate with the bounds that 95 % of its bootstrap lies between."""

    value: float
    low: float
    high: float


def draws(blocks: Blocks, seed: int = 0) -> dict[str, np.ndarray]:
    """What an arm's gradient is worth, each relative to |E r|^2.

        bias2     |E g - E r|^2
        variance  E|g - E g|^2, of one batch
        mse       their sum: E|g - E r|^2
        cosine    of E g and E r

    and, whatever the length of the gradients,

        efficiency  (<E g, E r>^2 / E|g|^2) / (|E r|^4 / E|r|^2)

    what the best step along one batch's gradient gains where the loss is equally curved in all
    directions, in units of what it gains with unquantized sampling. The mean squared error of a
    noisy batch rewards gradients that are merely short; this does not.

    Blocks are drawn with replacement, 2000 times (Efron, Annals of Statistics 7, 1979).

    Args:
      blocks: of one state.
      seed: of the draws; the same for all arms makes their resamples the same.

    Returns:
      Of each [1 + 2000] float64: the estimate, then that of every resample. NaN where there is no
      finite value, such as where E r is not told from 0.
    """
    return _estimates(blocks, _resamples(len(blocks.squares), seed))


def interval(values: np.ndarray) -> Interval:
    """The estimate and its bounds from `draws`, or from two arms' draws set against each other.

    All NaN where the estimate is, or where more than 2.5 % of the resamples are: which of them
    have a value would decide the bounds.
    """
    if not np.isfinite(values[0]) or np.isnan(values[1:]).mean() > 0.025:
        return Interval(np.nan, np.nan, np.nan)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return Interval(float(values[0]), float(low), float(high))


def _resamples(count: int, seed: int) -> np.ndarray:
    """[1 + draws, N] how often each block counts: first all once, then as the bootstrap draws."""
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return np.concatenate([np.ones((1, count)), draws]).astype(np.float64)


def _estimates(blocks: Blocks, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Each estimate under every row of block weights [D, N]."""
    g = np.asarray(blocks.gradients, np.float64)
    r = np.asarray(blocks.references, np.float64)
    products = {"gg": g @ g.T, "gr": g @ r.T, "rr": r @ r.T, "dd": (g - r) @ (g - r).T}
    mean = {name: _of_means(weights, product) for name, product in products.items()}
    second = weights @ blocks.squares / weights.sum(axis=1)
    unquantized = weights @ blocks.reference_squares / weights.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = np.where(mean["rr"] > 0, mean["rr"], np.nan)
        bias2 = mean["dd"] / scale
        variance = (second - mean["gg"]) / scale
        cosine = mean["gr"] / np.sqrt(np.where(mean["gg"] > 0, mean["gg"], np.nan) * scale)
        efficiency = np.square(mean["gr"] / scale) * unquantized / second
    return {
        "bias2": bias2,
        "variance": variance,
        "mse": bias2 + variance,
        "cosine": cosine,
        "efficiency": efficiency,
    }


def _of_means(weights: np.ndarray, product: np.ndarray) -> np.ndarray:
    """[D] estimates of <E a, E b> from the products [N, N] of block means, of different blocks."""
    total = np.einsum("di,ij,dj->d", weights, product, weights, optimize=True)
    own = np.square(weights) @ np.diag(product)
    pairs = np.square(weights.sum(axis=1)) - np.square(weights).sum(axis=1)
    return (total - own) / np.where(pairs == 0, np.nan, pairs)


def best_mixture(plain: Blocks, weighted: Blocks, cross: np.ndarray, seed: int = 0) -> Interval:
    """The constant alpha in [0, 1] of least mean squared error of (1 - alpha) g0 + alpha g1.

    With d = g1 - g0 the error is a parabola in alpha, least at -<E[(g0 - E r) d]> / E|d|^2.

    Args:
      plain: blocks of g0, alpha = 0.
      weighted: blocks of g1, alpha = 1.
      cross: [N] mean of <g0, g1> over each block's batches.
    """
    weights = _resamples(len(cross), seed)
    r = np.asarray(plain.references, np.float64)
    d = np.asarray(weighted.gradients, np.float64) - np.asarray(plain.gradients, np.float64)
    toward = _of_means(weights, r @ d.T)
    mean = weights / weights.sum(axis=1, keepdims=True)
    along = mean @ (cross - plain.squares)
    length = mean @ (weighted.squares - 2 * cross + plain.squares)
    with np.errstate(divide="ignore", invalid="ignore"):
        alpha = (toward - along) / np.where(length > 0, length, np.nan)
    return interval(np.clip(alpha, 0, 1))
