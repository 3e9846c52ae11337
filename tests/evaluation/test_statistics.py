"""Statistics of several samples against enumeration of every subset."""

import itertools
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ais_jax.evaluation.statistics import estimate, majority_at, pass_at

samples = st.integers(1, 7)
problem = samples.flatmap(
    lambda n: st.tuples(
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
        st.lists(st.sampled_from(["a", "b", "c", None]), min_size=n, max_size=n),
        st.integers(1, n),
    )
)


@given(problem)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(case):
    scores, _, k = case
    subsets = list(itertools.combinations(scores, k))
    share = Fraction(sum(any(subset) for subset in subsets), len(subsets))
    assert pass_at(k, np.array([scores]))[0] == pytest.approx(float(share), abs=1e-12)


@given(problem)
def test_majority_is_the_share_of_subsets_whose_winner_is_right(case):
    _, answers, k = case
    scores = [int(answer == "a") for answer in answers]  # one answer is right

    def chance(votes):
        counts = Counter(vote for vote in votes if vote is not None)
        winners = [x for x in counts if counts[x] == max(counts.values())]
        return Fraction(winners.count("a"), len(winners)) if winners else Fraction(0)

    subsets = list(itertools.combinations(answers, k))
    share = sum(map(chance, subsets), Fraction(0)) / len(subsets)
    assert majority_at(k, np.array([scores]), [answers])[0] == pytest.approx(float(share))


def test_pass_at_k_of_many_samples_is_exact():
    scores = np.zeros((1, 200), int)
    scores[0, :3] = 1
    wrong = Fraction(math.comb(197, 100), math.comb(200, 100))
    assert pass_at(100, scores)[0] == pytest.approx(float(1 - wrong), abs=1e-12)
    assert pass_at(1, scores)[0] == pytest.approx(3 / 200)


def test_majority_of_many_samples_is_drawn_and_repeats():
    rng = np.random.default_rng(0)
    answers = [rng.choice(["a", "b"], 40, p=[0.55, 0.45]).tolist()]
    scores = np.array([[int(a == "a") for a in answers[0]]])
    first, again = (majority_at(11, scores, answers, seed=1) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    right, total = scores.sum(), 40
    exact = sum(
        math.comb(right, i) * math.comb(total - right, 11 - i) for i in range(6, 12)
    ) / math.comb(total, 11)
    assert abs(first[0] - exact) < 4 * math.sqrt(exact * (1 - exact) / 1000)


def test_the_error_of_a_mean_is_that_of_the_binomial():
    right = np.repeat([0, 1], [300, 100])
    value, error = estimate(right)
    assert value == 0.25
    assert error == pytest.approx(math.sqrt(0.25 * 0.75 / 400), rel=0.1)
    assert estimate(right) == (value, error)
    assert estimate(right, seed=1).error != error


def test_a_pooled_share_weighs_problems_by_their_size():
    value, error = estimate(np.array([1, 9]), np.array([2, 18]))
    assert value == 0.5
    assert error == 0  # both have the same share
    assert estimate(np.array([0, 8]), np.array([2, 8])).value == 0.8


@pytest.mark.parametrize("k", [0, 3])
def test_more_samples_than_there_are_cannot_be_asked_of(k):
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to the 2 samples"):
        pass_at(k, np.ones((1, 2)))
    with pytest.raises(ValueError, match=f"k={k} must be from 1 to the 2 samples"):
        majority_at(k, np.ones((1, 2)), [["a", "a"]])


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="nothing"):
        estimate(np.array([]))
