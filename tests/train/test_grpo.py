"""Advantages against NumPy float64."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ais_jax.train.grpo import (
    completion_lengths,
    group_advantages,
    informative_groups,
    overlong_penalty,
)


def oracle(rewards, size, kind):
    out = []
    for group in np.asarray(rewards, np.float64).reshape(-1, size):
        if group.max() == group.min():
            out += [0.0] * size
        elif kind == "std":
            out += list((group - group.mean()) / (group.std(ddof=1) + 1e-6))
        elif kind == "mean":
            out += list(group - group.mean())
        else:
            out += [r - (group.sum() - r) / (size - 1) for r in group]
    return np.array(out)


REWARDS = hnp.arrays(np.float32, (12,), elements=st.floats(-5, 5, width=16))


@pytest.mark.smoke
@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
@given(REWARDS)
def test_advantages_equal_the_oracle(kind, rewards):
    result = jax.jit(group_advantages, static_argnums=(1, 2))(rewards, 4, kind)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, oracle(rewards, 4, kind), rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6])
def test_a_group_without_variance_gets_exactly_nothing(kind, value):
    rewards = np.full(6, value, np.float32)
    np.testing.assert_array_equal(group_advantages(rewards, 3, kind), 0)


def test_groups_are_consecutive_rows_and_independent():
    a = np.array([0, 1, 0, 0], np.float32)
    b = np.array([5, 5, 9, 5], np.float32)
    both = group_advantages(np.concatenate([a, b]), 4)
    np.testing.assert_allclose(both[:4], group_advantages(a, 4))
    np.testing.assert_allclose(both[4:], group_advantages(b, 4))
    np.testing.assert_array_equal(
        informative_groups(np.array([1, 1, 0, 1, 2, 2]), 2), [False, True, False]
    )


def test_bad_input():
    with pytest.raises(ValueError, match="groups of 4"):
        group_advantages(np.zeros(6, np.float32), 4)
    with pytest.raises(ValueError, match="'mad'"):
        group_advantages(np.zeros(6, np.float32), 3, "mad")


def test_a_completion_is_as_long_as_its_first_end_token_says():
    tokens = np.array([[5, 6, 1, 0], [5, 1, 7, 1], [5, 6, 7, 8], [1, 0, 0, 0], [2, 5, 5, 5]])
    mask = np.array([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]], bool)
    np.testing.assert_array_equal(completion_lengths(tokens, mask, (1,)), [3, 2, 4, 1, 2])
    np.testing.assert_array_equal(completion_lengths(tokens, mask, (1, 2)), [3, 2, 4, 1, 1])


def test_long_completions_are_penalized_in_a_line():
    """DAPO's example: 20,480 tokens with a buffer of 4,096 (arXiv 2503.14476)."""
    lengths = np.array([1, 16384, 16385, 18432, 20479, 20480])
    expected = [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1]
    found = overlong_penalty(lengths, 20480, 4096)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert found.dtype == np.float32
