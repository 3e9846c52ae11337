import numpy as np
import pytest

from ais_jax.study import moments
from ais_jax.study.moments import Blocks


def measure(blocks):
    return {name: moments.interval(values) for name, values in moments.draws(blocks).items()}


def draw(rng, *, blocks=40, size=8, bias=0.5, noise=1.0, dim=6):
    """Blocks of gradients with E r = (1, 0, ...), E g = E r + (0, bias, 0, ...)."""
    target = np.zeros(dim)
    target[0] = 1
    shift = np.zeros(dim)
    shift[1] = bias
    r = target + rng.normal(size=(blocks, size, dim))
    # As with shared prompts and keys, much of the noise is common.
    g = r + shift + noise * rng.normal(size=r.shape)
    squares = (np.square(x).sum(axis=2).mean(axis=1) for x in (g, r))
    return Blocks(g.mean(axis=1), r.mean(axis=1), *squares)


def of_different_blocks(a, b):
    """Mean of <a_i, b_j> over i != j, in loops."""
    n = len(a)
    return np.mean([a[i] @ b[j] for i in range(n) for j in range(n) if i != j])


def test_estimates_are_those_of_loops_over_pairs_of_blocks():
    blocks = draw(np.random.default_rng(0), blocks=7)
    g, r = blocks.gradients, blocks.references
    rr = of_different_blocks(r, r)
    gg = of_different_blocks(g, g)
    bias2 = of_different_blocks(g - r, g - r)
    variance = blocks.squares.mean() - gg
    found = measure(blocks)
    assert found["bias2"].value == pytest.approx(bias2 / rr)
    assert found["variance"].value == pytest.approx(variance / rr)
    assert found["mse"].value == pytest.approx((bias2 + variance) / rr)
    assert found["cosine"].value == pytest.approx(of_different_blocks(g, r) / np.sqrt(gg * rr))
    along, length = of_different_blocks(g, r) / rr, blocks.squares.mean()
    wanted = along**2 * blocks.reference_squares.mean() / length
    assert found["efficiency"].value == pytest.approx(wanted)


def test_squared_bias_is_unbiased_and_its_interval_covers_it():
    """The square of the mean difference would be 0.25 + 6/320; without a bias it would not be 0."""
    for bias in (0.0, 0.5):
        found = [measure(draw(np.random.default_rng(seed), bias=bias)) for seed in range(150)]
        # Times |E r|^2, which is estimated, too, and is 1.
        values = np.array([x["bias2"].value for x in found])
        error = values.std() / np.sqrt(len(values))
        assert abs(values.mean() - bias**2) < 4 * error + 0.01 * bias**2
        covered = np.mean([x["bias2"].low <= bias**2 <= x["bias2"].high for x in found])
        assert covered > 0.88
    variances = np.array([x["variance"].value for x in found])
    assert variances.mean() == pytest.approx(12, rel=0.05)  # 6 entries of 1 + 1


def test_gradients_that_are_the_reference_have_no_bias_and_a_ratio_of_one():
    blocks = draw(np.random.default_rng(1))
    same = blocks._replace(gradients=blocks.references, squares=blocks.reference_squares)
    found = measure(same)
    assert found["bias2"] == (0, 0, 0)
    assert found["cosine"].value == pytest.approx(1)
    assert found["efficiency"] == pytest.approx((1, 1, 1))
    shorter = same._replace(gradients=same.gradients / 2, squares=same.squares / 4)
    assert measure(shorter)["efficiency"] == pytest.approx((1, 1, 1))


def test_a_target_that_is_not_told_from_zero_has_no_relative_error():
    rng = np.random.default_rng(0)
    r = rng.normal(size=(4, 1000))
    r -= r.mean(axis=0)  # products of different blocks are negative
    squares = np.square(r).sum(axis=1)
    found = measure(Blocks(r, r, squares, squares))
    assert np.isnan(found["bias2"].value) and np.isnan(found["variance"].value)


def test_best_mixture_is_the_minimum_of_the_error():
    rng = np.random.default_rng(3)
    blocks, size, dim = 50, 40, 5
    target = rng.normal(size=dim)
    r = target + rng.normal(size=(blocks, size, dim))
    g0 = r + 0.4 * rng.normal(size=dim)  # biased
    g1 = r + rng.normal(size=r.shape) * 0.8  # noisy

    def error(alpha):
        mixed = (1 - alpha) * g0 + alpha * g1
        return np.square(mixed - target).sum(axis=2).mean()

    grid = np.linspace(0, 1, 1001)
    wanted = grid[np.argmin([error(a) for a in grid])]
    parts = [
        Blocks(
            g.mean(axis=1),
            r.mean(axis=1),
            np.square(g).sum(axis=2).mean(axis=1),
            np.square(r).sum(axis=2).mean(axis=1),
        )
        for g in (g0, g1)
    ]
    cross = (g0 * g1).sum(axis=2).mean(axis=1)
    found = moments.best_mixture(*parts, cross)
    assert 0.05 < wanted < 0.95
    assert found.value == pytest.approx(wanted, abs=0.03)
    assert found.low < wanted < found.high


def test_best_mixture_stays_between_none_and_all():
    rng = np.random.default_rng(4)
    r = rng.normal(size=(20, 3)) + 5
    squares = np.square(r).sum(axis=1)
    exact = Blocks(r, r, squares, squares)
    away = Blocks(r + 3, r, np.square(r + 3).sum(axis=1), squares)
    cross = ((r + 3) * r).sum(axis=1)
    assert moments.best_mixture(away, exact, cross).value == pytest.approx(1)
    assert moments.best_mixture(exact, away, cross).value == pytest.approx(0, abs=1e-12)
