"""Properties that the correction must hold for any batch, however extreme."""

import functools
import math

import jax
import numpy as np
import pytest
from ais_oracle import (
    LEVELS,
    Batch,
    batches,
    close,
    entries,
    expected,
    library,
    near_kink,
    random_batch,
    tolerance,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ais_jax import (
    AISConfig,
    ais_loss,
    diagnose,
    importance_weights,
)

FULL = np.ones((4, 5), bool)

by_level = pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)
quick = settings(max_examples=15, deadline=None, derandomize=True)


def all_finite(tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


# 1. The two ends, and the line between them.


def plain_grpo(batch: Batch, factors: np.ndarray):
    """Loss and gradient of clipped GRPO over a token mean, each token times a factor."""
    old, logps = batch.old.astype(np.float64), batch.logps.astype(np.float64)
    ratio = np.exp(logps - old)
    clipped = np.clip(ratio, 0.8, 1.2)
    n = max(batch.mask.sum(), 1)
    objective = np.minimum(ratio * batch.advantages, clipped * batch.advantages)
    slope = np.where(objective < ratio * batch.advantages, 0, ratio * batch.advantages)
    return tuple(-np.where(batch.mask, factors * x, 0) / n for x in (objective, slope))


@pytest.mark.smoke
@quick
@given(batch=batches(), other=batches())
def test_alpha_0_is_plain_grpo(batch, other):
    assume(not near_kink(batch, AISConfig()))
    result, grad = library(batch, coefficient=0.0)
    objective, slope = plain_grpo(batch, np.ones(batch.mask.shape))
    close(result.loss, objective.sum(), 1e-5)
    close(grad, slope, 1e-6)
    assert (result.weights == 1).all()
    without, same_grad = library(batch._replace(rollout_logps=other.rollout_logps), coefficient=0.0)
    assert without.loss == result.loss
    np.testing.assert_array_equal(grad, same_grad)


@pytest.mark.smoke
@quick
@given(batch=batches())
def test_alpha_1_is_truncated_importance_sampling(batch):
    assume(not near_kink(batch, AISConfig()))
    result, grad = library(batch, coefficient=1.0)
    delta = np.clip(batch.old.astype(np.float64) - batch.rollout_logps, -20, 20)
    objective, slope = plain_grpo(batch, np.minimum(np.exp(delta), 2))
    close(result.loss, objective.sum(), 1e-5)
    close(grad, slope, 1e-5)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [(AISConfig(), np.float32), *((config, np.float64) for config in LEVELS.values())],
)
@quick
@given(batch=batches(), alpha=st.floats(0, 1, width=32))
def test_gradient_is_linear_in_alpha(config, dtype, batch, alpha):
    (none, g0), (full, g1), (part, g) = (
        library(batch, config, dtype, coefficient=a) for a in (0.0, 1.0, alpha)
    )
    tol = 1e-6 if dtype == np.float32 else 1e-14
    close(g, (1 - alpha) * g0 + alpha * g1, 4 * tol)
    close(part.loss, (1 - alpha) * none.loss + alpha * full.loss, 16 * tol)


# 2. No mismatch, no correction.


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@by_level
@quick
@given(batch=batches())
def test_without_mismatch_nothing_is_corrected(config, dtype, batch):
    batch = batch._replace(rollout_logps=batch.old)
    result, grad = library(batch, config, dtype)
    seen = result.diagnostics
    got = (seen.severity, seen.reliability, seen.amplification, seen.cv, result.coefficient)
    assert got == (0, 1, 1, 0, 0)
    assert (result.weights == 1).all()
    assert all_finite((result, grad))
    assert seen.kl_k1 == seen.kl_k3 == seen.skew == 0


def test_without_mismatch_the_cap_is_irrelevant():
    batch = random_batch(0)
    batch = batch._replace(rollout_logps=batch.old)
    for alpha in (0.0, 1.0):
        runs = [library(batch, AISConfig(cap=cap), coefficient=alpha) for cap in (1.0, 2.0, None)]
        for result, grad in runs[1:]:
            assert result.loss == runs[0][0].loss
            np.testing.assert_array_equal(grad, runs[0][1])


def test_a_severity_scale_near_0_gives_no_nan_without_mismatch():
    """The square of 1e-25 is 0 in float32."""
    batch = random_batch(0)
    batch = batch._replace(rollout_logps=batch.old)
    for config in (AISConfig(), AISConfig(coefficient="shrinkage")):
        result, _ = library(batch, config, severity_scale=1e-25)
        assert result.coefficient == 0


# 4. Identities of the diagnostics.


@functools.partial(jax.jit, static_argnames="config")
def diagnose_scaled(old, rollout, advantages, mask, scale, config):
    importance = importance_weights(old, rollout, mask, config)
    return diagnose(importance._replace(weights=importance.weights * scale), advantages)


@by_level
@quick
@given(batch=batches(), exponent=st.floats(-10, 10, width=32))
def test_identities_of_the_diagnostics(config, batch, exponent):
    arrays = (batch.old, batch.rollout_logps, batch.advantages, batch.mask)
    seen = diagnose_scaled(*arrays, np.float32(1), config)
    n = len(entries(batch, config))
    eps = np.finfo(np.float32).eps
    close(float(seen.reliability) * (1 + float(seen.cv) ** 2), 1, 4 * eps)
    assert (1 - 8 * eps) / max(n, 1) <= seen.reliability <= 1
    scaled = diagnose_scaled(*arrays, np.exp(exponent, dtype=np.float32), config)
    close(scaled.reliability, seen.reliability, 16 * eps)
    close(scaled.cv, seen.cv, 16 * eps * max(1, float(seen.cv)))
    close(scaled.amplification, seen.amplification, 16 * eps * float(seen.amplification))
    assert seen.kl_k3 >= -2 * eps


# 5. Pads, order and empty parts.


@by_level
@quick
@given(
    batch=batches(),
    junk=st.lists(st.sampled_from([math.nan, math.inf, -math.inf, -1e30, 7.0]), min_size=4),
    order=st.permutations(range(4)),
)
def test_pads_and_order_change_nothing(config, batch, junk, order):
    want, want_grad = library(batch, config, np.float64)
    pads = ~batch.mask
    dirty = batch._replace(
        **{
            name: np.where(pads, x, getattr(batch, name))
            for name, x in zip(Batch._fields[:4], junk, strict=False)
        }
    )
    result, grad = library(dirty, config, np.float64)
    assert result.coefficient == want.coefficient and result.loss == want.loss
    np.testing.assert_array_equal(grad, want_grad)
    assert all_finite((result, grad))

    result, grad = library(Batch(*(x[list(order)] for x in batch)), config, np.float64)
    close(result.coefficient, want.coefficient, 1e-12)
    close(result.loss, want.loss, 1e-12)
    close(grad, want_grad[list(order)], 1e-12)

    widths = ((0, 2), (0, 3))
    padded = [np.pad(x, widths, constant_values=math.nan) for x in batch[:4]]
    padded.append(np.pad(batch.mask, widths))
    result, grad = library(Batch(*padded), config, np.float64)
    close(result.coefficient, want.coefficient, 1e-12)
    close(result.loss, want.loss, 1e-12)
    close(grad[:4, :5], want_grad, 1e-12)
    assert not grad[4:].any() and not grad[:, 5:].any()
    # What is logged is as blind to padding, p99 and counts included.
    for got, value in zip(result.diagnostics, want.diagnostics, strict=True):
        close(got, value, 1e-12 * max(1, abs(value)))


@pytest.mark.smoke
@by_level
def test_fully_masked(config):
    batch = random_batch(4)
    mask = batch.mask.copy()
    mask[1] = False
    row, grad = library(batch._replace(mask=mask), config, np.float64)
    kept = [0, 2, 3]
    want = expected(Batch(*(x[kept] for x in batch)), config)
    close(row.coefficient, want.coefficient, 1e-12)
    close(row.loss, want.loss, 1e-12)
    close(grad[kept], want.grad, 1e-12)
    assert not grad[1].any()

    nan = np.full((4, 5), math.nan)
    nothing = Batch(nan, nan, nan, nan[:, 0], ~FULL)
    result, grad = library(nothing, config, np.float64)
    assert all_finite((result, grad))
    assert result.coefficient == result.loss == result.diagnostics.tokens == 0
    assert not grad.any()


# 8. Extreme input.


def extreme(name: str) -> Batch:
    batch = random_batch(7)._replace(mask=FULL)
    rollout, advantages = batch.rollout_logps.copy(), batch.advantages
    mask = FULL
    if name == "far_above":
        rollout = rollout - 1e3
    elif name == "far_below":
        rollout = rollout + 1e3
    elif name == "both":
        rollout = rollout + 1e3 * (-1.0) ** np.arange(5)
    elif name == "impossible":
        rollout[2, 1] = -math.inf
    elif name == "one_spike":
        rollout[2, 1] = batch.old[2, 1] - math.log(1e12)
    elif name == "one_token":
        mask = np.zeros_like(FULL)
        mask[2, 1] = True
    elif name == "one_row":
        mask = np.zeros_like(FULL)
        mask[2] = True
    elif name == "no_advantage":
        advantages = advantages * 0
    elif name == "tiny_advantages":
        advantages = advantages * np.float32(1e-25)
    elif name == "huge_advantages":
        advantages = advantages * np.float32(1e25)
    return batch._replace(rollout_logps=rollout, advantages=advantages, mask=mask)


EXTREMES = [
    "far_above",
    "far_below",
    "both",
    "impossible",
    "one_spike",
    "one_token",
    "one_row",
    "no_advantage",
    "tiny_advantages",
    "huge_advantages",
]


@pytest.mark.parametrize("config", [AISConfig(cap=None), *LEVELS.values()])
@pytest.mark.parametrize("name", EXTREMES)
def test_extreme_input_is_finite(name, config):
    batch = extreme(name)
    result, grad = library(batch, config)
    assert all_finite((result, grad))
    assert 0 <= result.coefficient <= 1
    want = expected(batch, config)
    tol = tolerance(batch, np.float32) * (1 + 0.65 / 0.03)
    close(result.coefficient, want.coefficient, tol)
    scale = np.abs(batch.advantages).max() * np.max(result.weights, initial=1)
    close(result.loss, want.loss, tol * scale)
    close(grad, want.grad, tol * scale)


@pytest.mark.smoke
def test_overflow_gives_the_cap_and_underflow_0():
    spike = extreme("one_spike")
    assert library(spike, coefficient=1.0)[0].weights[2, 1] == 2
    assert library(extreme("impossible"), coefficient=1.0)[0].weights[2, 1] == 2
    assert (library(extreme("far_above"), coefficient=1.0)[0].weights == 2).all()
    assert (library(extreme("far_below"), coefficient=1.0)[0].weights < 1e-6).all()
    uncapped = library(spike, AISConfig(cap=None))[0].diagnostics
    close(uncapped.ratio_max, math.exp(20), 1e-5 * math.exp(20))
    close(uncapped.reliability, 1 / 20, 1e-5)
    assert library(extreme("no_advantage"))[0].diagnostics.amplification == 1
    assert library(extreme("no_advantage"))[0].loss == 0


@pytest.mark.parametrize(
    "config",
    [
        AISConfig(),
        AISConfig(coefficient="fixed", mask_low=0.5, mask_high=2.0),
        AISConfig(geometric_low=0.9, geometric_high=1.1),
        AISConfig(coefficient="fixed", veto=1e-4),
        AISConfig(coefficient="fixed", veto=1e-4, level="sequence_product"),
    ],
    ids=["ais", "icepop", "geometric", "veto", "veto_product"],
)
def test_nan_at_a_valid_position_reaches_the_loss(config):
    """Whatever else the row holds: a rejected row must not hide it."""
    batch = random_batch(8)._replace(mask=FULL)
    rollout = batch.rollout_logps.copy()
    rollout[2, 3] += 15  # beside it a ratio of exp(-15), below every threshold
    batch = batch._replace(rollout_logps=rollout)
    assert math.isfinite(library(batch, config)[0].loss)
    for field in Batch._fields[:4]:
        values = getattr(batch, field).copy()
        values[2, 1] = math.nan
        assert math.isnan(library(batch._replace(**{field: values}), config)[0].loss), field


@pytest.mark.parametrize("clips", [(0.0, 0.2), (0.2, 0.0), (0.0, 0.0), (0.2, 0.2)])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_at_ratio_1_is_whole_even_where_a_clip_begins_there(clips, advantage):
    """At the point where both branches of the clipped objective are equal, it is the ratio's."""
    config = AISConfig(coefficient="fixed", fixed_alpha=0.0, clip_low=clips[0], clip_high=clips[1])
    logps = np.full((1, 1), -0.7, np.float32)

    def loss(x):
        return ais_loss(x, logps, np.array([advantage]), np.ones((1, 1)), config=config).loss

    np.testing.assert_allclose(jax.grad(loss)(logps), -advantage, rtol=1e-6)
