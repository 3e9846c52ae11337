"""Where gradient flows, the shape of the coefficient, and what each diagnostic adds to it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ais_oracle import (
    LEVELS,
    close,
    coefficient,
    library,
    omega,
    random_batch,
)

from ais_jax import (
    AISConfig,
    Diagnostics,
    ais_loss,
    diagnose,
    importance_weights,
    mixing_coefficient,
)

by_level = pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)

# 7. Where gradient flows.


@by_level
def test_gradient_flows_through_logps_alone(config):
    batch = random_batch(5)

    @functools.partial(jax.grad, argnums=range(6))
    def gradients(logps, rollout, old, advantages, severity_scale, alpha):
        mixed = ais_loss(logps, rollout, advantages, batch.mask, old, severity_scale, config=config)
        given = ais_loss(logps, rollout, advantages, batch.mask, old, None, alpha, config=config)
        # All that is returned, not the loss alone.
        return mixed.loss + given.loss + sum(jnp.sum(x) for x in (*mixed[2:3], *mixed[3], mixed[4]))

    grads = jax.jit(gradients)(*batch[:4], jnp.float32(0.03), jnp.float32(0.5))
    assert np.abs(grads[0]).max() > 0.01
    for grad in grads[1:]:
        assert not np.any(grad)


def test_finite_differences_of_the_frozen_loss():
    """Autodiff is the derivative at fixed alpha and w; either one unfrozen gives another."""
    batch = random_batch(6, spread=0.03)
    config = AISConfig()
    at = batch.old.astype(np.float64)
    batch = batch._replace(logps=at, old_logps=at)
    _, autodiff = library(batch, config, np.float64)
    alpha, h = coefficient(batch, config), 1e-6

    def frozen(logps):
        return library(batch._replace(logps=logps), config, np.float64)[0].loss

    def unfrozen(logps, free_alpha, free_w):
        moved = batch._replace(old_logps=logps)
        a = coefficient(moved, config) if free_alpha else alpha
        factors = omega(moved if free_w else batch, config, a)
        terms = factors * np.exp(logps - at) * batch.advantages
        return -terms[batch.mask].sum() / batch.mask.sum()

    def differences(function):
        grad = np.zeros(at.shape)
        for i in np.ndindex(at.shape):
            step = np.zeros(at.shape)
            step[i] = h
            grad[i] = (function(at + step) - function(at - step)) / (2 * h)
        return grad

    close(differences(frozen), autodiff, 1e-8)
    close(differences(lambda x: unfrozen(x, False, False)), autodiff, 1e-8)
    for free_alpha, free_w in [(True, False), (False, True)]:
        wrong = differences(lambda x, a=free_alpha, w=free_w: unfrozen(x, a, w))
        assert np.abs(wrong - autodiff).max() > 1e-3


# 9. Shape of the coefficient.


@functools.partial(jax.jit, static_argnames="config")
def alpha_of(reliability, severity, amplification, config=AISConfig()):
    cv = jnp.sqrt(1 / reliability - 1)
    seen = Diagnostics(reliability, severity, amplification, cv, sequences=16.0)
    return mixing_coefficient(seen, config)


def assert_no_jump(values):
    """On a grid twice as fine a continuous function takes half the steps."""
    fine, coarse = np.abs(np.diff(values)).max(), np.abs(np.diff(values[::2])).max()
    assert 0 < fine < 0.6 * coarse


@pytest.mark.parametrize("form", ["gated", "shrinkage"])
@pytest.mark.parametrize(("reliability", "amplification"), [(0.2, 4.0), (0.9, 0.5)])
def test_monotone_and_continuous(form, reliability, amplification):
    config = AISConfig(severity_scale=0.05, coefficient=form)
    d = np.linspace(0, 2, 4001, dtype=np.float32)
    by_d = np.asarray(alpha_of(reliability, d, amplification, config))
    assert by_d[0] == 0 and (by_d >= 0).all() and (by_d <= 1).all()
    assert (np.diff(by_d) >= -1e-7).all() and by_d[-1] > by_d[200] > by_d[20] > 0
    assert_no_jump(by_d)

    v = np.linspace(0, 8, 4001, dtype=np.float32)
    by_v = np.asarray(alpha_of(reliability, 0.1, v, config))
    assert (np.diff(by_v) <= 1e-7).all() and by_v[-1] < by_v[1000] <= by_v[0]
    assert_no_jump(by_v)

    r = np.linspace(0.05, 1, 4001, dtype=np.float32)
    by_r = np.asarray(alpha_of(r, 0.1, amplification, config))
    assert (np.diff(by_r) >= -1e-7).all() and by_r[-1] > by_r[2000] > by_r[0]
    assert_no_jump(by_r)


@by_level
def test_alpha_has_no_jump_as_the_mismatch_grows(config):
    """From none to far beyond the cap, in small steps of the same noise."""
    batch = random_batch(9, spread=1.0)
    noise = batch.rollout_logps.astype(np.float64) - batch.old
    results = [
        library(batch._replace(rollout_logps=batch.old + s * noise), config, np.float64)[0]
        for s in np.linspace(0, 2, 801)
    ]
    alphas = np.array([result.coefficient for result in results])
    assert alphas[0] == 0 and alphas[1] < 0.1 and alphas.max() > 0.3
    assert_no_jump(alphas)


# 11. No diagnostic is decoration.


def test_reliability_and_amplification_each_lower_alpha():
    gate = 0.01 / (0.01 + 0.0009)
    close(alpha_of(0.95, 0.1, 1.0), 0.95 * gate, 1e-6)
    assert alpha_of(0.95, 0.1, 1.0) - alpha_of(0.70, 0.1, 1.0) > 0.1
    assert alpha_of(0.95, 0.1, 1.0) - alpha_of(0.95, 0.1, 2.0) > 0.1
    assert alpha_of(0.70, 0.1, 1.0) - alpha_of(0.70, 0.1, 2.0) > 0.1


@jax.jit
def diagnose_ratios(delta, advantages, mask):
    old = jnp.full(delta.shape, -3.0)
    return diagnose(importance_weights(old, old - delta, mask), advantages)


@pytest.mark.smoke
def test_removing_any_diagnostic_changes_alpha():
    """Ratios (2, 1, 1, 1) with advantages (2, 1, 1, 1), worked out by hand."""
    delta, advantages, mask = np.zeros((2, 5)), np.ones((2, 5)), np.zeros((2, 5), bool)
    delta[0, 0], advantages[0, 0], mask[0, :4] = math.log(2), 2, True
    seen = diagnose_ratios(delta, advantages, mask)
    reliability, severity = 25 / 28, math.log(2) / 4
    amplification = (19 / 7) / (7 / 4)
    close(seen[:3], (reliability, severity, amplification), 1e-6)

    gate = severity**2 / (severity**2 + 0.1**2)
    configs = [
        AISConfig(severity_scale=0.1),
        AISConfig(severity_scale=0.1, reliability_power=0.0),
        AISConfig(severity_scale=0.1, amplification_gain=0.0),
        AISConfig(severity_scale=1e-6),
    ]
    want = [
        gate * reliability / amplification,
        gate / amplification,
        gate * reliability,
        reliability / amplification,
    ]
    close([mixing_coefficient(seen, config) for config in configs], want, 1e-6)


def test_each_diagnostic_sees_what_the_others_do_not():
    """The same weights on other tokens move V alone; the same D in one spike moves R."""
    advantages, mask = np.array([[1.0] * 5, [0.0] * 5]), np.ones((2, 5), bool)
    on_active, on_idle = np.zeros((2, 5)), np.zeros((2, 5))
    on_active[0, 0] = on_idle[1, 4] = 0.5
    active, idle, spread = (
        diagnose_ratios(delta, advantages, mask)
        for delta in (on_active, on_idle, np.full((2, 5), 0.05))
    )
    close(active[:2], idle[:2], 1e-6)
    assert active.amplification > 1.1 and idle.amplification < 0.95
    close(spread.severity, active.severity, 1e-6)
    assert spread.reliability > 0.9999 and active.reliability < 0.98
