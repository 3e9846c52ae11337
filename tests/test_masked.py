"""The masked statistics against NumPy on the valid entries alone."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ais_jax import masked

SHAPE = (3, 4)
JUNK = [np.nan, np.inf, -np.inf, 3e38, 5.0]
values = hnp.arrays(np.float32, SHAPE, elements=st.floats(-8, 8, width=32, allow_subnormal=False))
masks = hnp.arrays(bool, SHAPE)
quick = settings(max_examples=40, deadline=None, derandomize=True)
jit_quantile = jax.jit(masked.quantile)


def close(got, want, atol=1e-5):
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


@pytest.mark.smoke
@quick
@given(x=values, mask=masks, junk=st.sampled_from(JUNK), q=st.floats(0, 1, width=32))
def test_values(x, mask, junk, q):
    kept, dirty = x[mask].astype(np.float64), jnp.asarray(np.where(mask, x, np.float32(junk)))
    some = kept if kept.size else np.zeros(1)
    rounding = 12 * np.finfo(np.float32).eps * np.abs(some).sum()
    close(masked.sum(dirty, mask), kept.sum(), rounding)
    close(masked.mean(dirty, mask), some.mean(), rounding)
    close(masked.max(dirty, mask), some.max(), 0)
    close(jit_quantile(dirty, mask, q), np.quantile(some, q))
    assert masked.count(mask) == mask.sum()
    np.testing.assert_array_equal(masked.select(dirty, mask), np.where(mask, x, 0))


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1)])
def test_axes(axis, keepdims):
    x = jnp.linspace(-2, 5, 12).reshape(SHAPE)
    mask = jnp.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]], bool)
    total = np.where(mask, x, 0).sum(axis, keepdims=keepdims)
    n = np.maximum(mask.sum(axis, keepdims=keepdims), 1)
    close(masked.sum(x, mask, axis, keepdims), total)
    close(masked.mean(x, mask, axis, keepdims), total / n)
    np.testing.assert_array_equal(masked.count(mask, axis), mask.sum(axis))


def test_a_mask_per_row_counts_every_entry_of_it():
    x = jnp.arange(12, dtype=jnp.float32).reshape(SHAPE)
    rows = jnp.array([[True], [False], [True]])
    assert masked.sum(x, rows) == 6 + 38
    assert masked.mean(x, rows) == 44 / 8
    np.testing.assert_array_equal(masked.mean(x, rows, axis=1), [1.5, 0, 9.5])


@pytest.mark.smoke
@pytest.mark.parametrize("statistic", [masked.sum, masked.mean, masked.max])
@pytest.mark.parametrize("junk", JUNK)
def test_gradient_at_masked_entries_is_0(statistic, junk):
    mask = np.array([[True, False], [True, True]])
    x = jnp.asarray(np.where(mask, [[1.0, 0], [2.0, 5.0]], junk), jnp.float32)
    want = {
        masked.sum: [[1, 0], [1, 1]],
        masked.mean: [[1 / 3, 0], [1 / 3, 1 / 3]],
        masked.max: [[0, 0], [0, 1]],
    }[statistic]
    close(jax.grad(statistic)(x, mask), want, 1e-7)


def test_gradient_through_an_unsafe_function_of_masked_entries():
    """`select` before the function keeps NaN out of the gradient; after it is too late."""
    mask, x = jnp.array([True, False]), jnp.array([4.0, 0.0])

    def before(x):
        return masked.sum(1 / jnp.sqrt(jnp.where(mask, x, 1)), mask)

    def after(x):
        return masked.sum(1 / jnp.sqrt(x), mask)

    close(jax.grad(before)(x), [-1 / 16, 0], 1e-7)
    assert np.isnan(jax.grad(after)(x)[1])


@pytest.mark.parametrize(
    "statistic", [masked.sum, masked.mean, masked.max, functools.partial(masked.quantile, q=0.5)]
)
def test_empty_and_nan(statistic):
    x, nothing = jnp.full(SHAPE, jnp.nan), np.zeros(SHAPE, bool)
    assert statistic(x, nothing) == 0
    assert not np.any(jax.grad(statistic)(x, nothing))
    assert np.isnan(statistic(x, ~nothing))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_dtype_is_kept(dtype):
    with jax.enable_x64(True):
        x, mask = jnp.ones(SHAPE, dtype), jnp.ones(SHAPE, bool)
        for result in (
            masked.select(x, mask),
            masked.sum(x, mask),
            masked.mean(x, mask),
            masked.max(x, mask),
            masked.quantile(x, mask, 0.3),
            masked.count(mask, dtype=dtype),
        ):
            assert result.dtype == dtype
        assert masked.count(mask).dtype == jnp.float32
