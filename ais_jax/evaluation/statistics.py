"""What several completions of each problem say, with standard errors. NumPy alone."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 1000
_MOST_SUBSETS = 1000


class Estimate(NamedTuple):
    """A mean over problems and its standard error."""

    value: float
    error: float


def estimate(right: np.ndarray, total: np.ndarray | None = None, seed: int = 0) -> Estimate:
    """The pooled share sum(right) / sum(total), with the bootstrap's standard error.

    Problems are drawn with replacement, 1000 times; the error is the standard deviation of what
    they give (Efron, Annals of Statistics 7, 1979).

    Args:
      right: [N] of each problem.
      total: [N] of each problem; None is 1, so that the share is a mean.
      seed: of the draws.

    Raises:
      ValueError: there is no problem.
    """
    right = np.asarray(right, np.float64)
    total = np.ones_like(right) if total is None else np.asarray(total, np.float64)
    if not right.size:
        raise ValueError("there is nothing to take a mean of")
    rng = np.random.default_rng(seed)
    shares = np.empty(_RESAMPLES)
    for i in range(_RESAMPLES):
        drawn = rng.integers(0, len(right), len(right))
        shares[i] = right[drawn].sum() / max(total[drawn].sum(), 1e-300)
    return Estimate(float(right.sum() / max(total.sum(), 1e-300)), float(shares.std()))


def pass_at(k: int, scores: np.ndarray) -> np.ndarray:
    """[N] float64: probability that one of `k` of a problem's samples is right.

    Unbiased, 1 - C(n - c, k) / C(n, k) of n samples with c right ones (Chen et al., arXiv
    2107.03374, eq. 1).

    Args:
      k: from 1 to n.
      scores: [N, n], 1 where a sample is right.

    Raises:
      ValueError: `k` is out of range.
    """
    samples = scores.shape[1]
    _check_k(k, samples)
    all_subsets = math.comb(samples, k)
    wrong = samples - np.count_nonzero(scores, axis=1)
    return np.array([1 - math.comb(int(w), k) / all_subsets for w in wrong])


def majority_at(
    k: int, scores: np.ndarray, answers: Sequence[Sequence[str | None]], seed: int = 0
) -> np.ndarray:
    """[N] float64: probability that the most frequent answer of `k` samples is right.

    Samples that are right vote together, in whatever form they give the answer, and others with
    those of the same text. Ties are broken by chance; samples without an answer do not vote, and if
    none votes the answer is wrong (Wang et al., arXiv 2203.11171). The mean is over all subsets of
    `k` samples, or over 1000 random ones if there are more.

    Args:
      k: from 1 to n.
      scores: [N, n], 1 where a sample is right.
      answers: n of each problem, the same text for the same answer.
      seed: of the subsets.

    Raises:
      ValueError: `k` is out of range.
    """
    _check_k(k, scores.shape[1])
    rng = np.random.default_rng(seed)
    return np.array(
        [_majority(k, row, given, rng) for row, given in zip(scores, answers, strict=True)]
    )


def _majority(k: int, scores: np.ndarray, answers: Sequence[str | None], rng) -> float:
    votes = [True if right else answer for right, answer in zip(scores, answers, strict=True)]
    subsets: Iterable[Sequence[int]]
    if math.comb(len(votes), k) <= _MOST_SUBSETS:
        subsets = itertools.combinations(range(len(votes)), k)
    else:
        subsets = (rng.choice(len(votes), k, replace=False) for _ in range(_MOST_SUBSETS))
    return float(np.mean([_vote([votes[i] for i in subset]) for subset in subsets]))


def _vote(votes: Sequence[bool | str | None]) -> float:
    """Probability that the winner is True, the right answer."""
    counts = Counter(vote for vote in votes if vote is not None)
    if not counts:
        return 0.0
    most = max(counts.values())
    winners = [vote for vote, n in counts.items() if n == most]
    return (True in winners) / len(winners)


def _check_k(k: int, samples: int) -> None:
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be from 1 to the {samples} samples of a problem")
