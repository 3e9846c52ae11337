"""`ais_loss` and its parts against the float64 oracle; bad input; behaviour under transforms."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ais_oracle import (
    LEVELS,
    Batch,
    batches,
    close,
    cv,
    diagnostics,
    entries,
    ess_ratio,
    expected,
    library,
    near_kink,
    random_batch,
    tolerance,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ais_jax import (
    PRESETS,
    AISConfig,
    Diagnostics,
    aggregate,
    ais_loss,
    applied_reliability,
    diagnose,
    importance_weights,
    loss_denominator,
    mixing_coefficient,
    token_weights,
)

CONFIGS = (PRESETS | LEVELS) | {
    "shrinkage": AISConfig(coefficient="shrinkage"),
    "product_gated": AISConfig(level="sequence_product", coefficient="gated", cap=None),
    "geometric": AISConfig(level="sequence_geomean", geometric_low=0.9, geometric_high=1.2),
    "uncapped_part": AISConfig(cap=None, coefficient="fixed", fixed_alpha=0.3, dual_clip=1.4),
    "gains": AISConfig(
        reliability_power=2.0,
        amplification_gain=3.0,
        severity_scale=0.2,
        clip_low=0.1,
        clip_high=0.28,
        aggregation="sequence_mean",
    ),
    "negative_power": AISConfig(reliability_power=-1.0, clip_low=0.05, clip_high=0.1, veto=0.2),
    "gspo_dual": AISConfig(policy_ratio="sequence", dual_clip=1.1, mask_low=0.7, mask_high=1.6),
}
BY_RATIO = {
    "ratio_mean",
    "ratio_sem",
    "ratio_max",
    "ratio_p99",
    "kl_k3",
    "mult_error",
    "skew",
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(batch=batches())
def test_matches_the_oracle(name, dtype, batch):
    config = CONFIGS[name]
    assume(not near_kink(batch, config))
    want = expected(batch, config)
    result, grad = library(batch, config, dtype)
    tol = tolerance(batch, dtype)
    # The largest slope of D^2 / (D^2 + D0^2) is 0.65 / D0.
    alpha_tol = tol * (1 + 0.65 / config.severity_scale)
    omega = want.weights[batch.mask]
    largest = np.max(np.abs(omega), initial=1)
    term = largest * np.max(np.abs(batch.advantages)) * math.exp(0.5)

    close(result.coefficient, want.coefficient, alpha_tol)
    close(result.weights[batch.mask], omega, largest * (tol + alpha_tol))
    if omega.sum() > 0.01 * omega.size:  # else omega = 1 + alpha (w - 1) is all rounding
        rounded = (np.asarray(x, np.float32) for x in (batch.old, batch.rollout_logps))
        importance = importance_weights(*rounded, batch.mask, config)
        applied = applied_reliability(importance, want.coefficient)
        close(applied, ess_ratio(list(omega)), 8 * tolerance(batch, np.float32) * largest)
    close(result.loss, want.loss, term * (tol + alpha_tol))
    close(grad, want.grad, term * (tol + alpha_tol))
    assert not grad[~batch.mask].any()
    close(result.clip_fraction, want.clip_fraction, tol)
    ratio = np.exp(np.abs(np.clip(batch.old - batch.rollout_logps, -20, 20)))
    by_ratio = max(want.diagnostics["ratio_max"], np.max(ratio[batch.mask], initial=1))
    for key, value in want.diagnostics.items():
        scale = 2 * by_ratio if key in BY_RATIO else max(1, abs(value))
        close(getattr(result.diagnostics, key), value, tol * scale, key)


@pytest.mark.smoke
def test_numbers_by_hand():
    """Ratios 4, 1 and 1/2 in one batch, with advantages 1 and -2, worked out on paper."""
    rho = np.array([[4.0, 1.0], [0.5, 7.0]])
    logps = np.full((2, 2), -1.0)
    batch = Batch(
        logps, logps - np.log(rho), None, np.array([1.0, -2.0]), np.array([[1, 1], [1, 0]])
    )
    result, grad = library(batch, AISConfig(cap=2.0), np.float64)
    got = result.diagnostics
    close(got.reliability, 3.5**2 / (3 * (4 + 1 + 0.25)), 1e-14)
    close(got.severity, (math.log(4) + math.log(2)) / 3, 1e-14)
    amplification = ((4 + 1 + 0.25 * 4) / (1 + 1 + 4)) / (5.25 / 3)
    close(got.amplification, amplification, 1e-14)
    close(got.skew, (1.0 * 1 + 0 + -0.5 * -2) / 3, 1e-14)
    close(got.capped_fraction, 1 / 3, 1e-14)
    severity2 = math.log(2) ** 2  # (log 4 + log 2) / 3 = log 2
    alpha = severity2 / (severity2 + 0.03**2) * (3.5**2 / 15.75)
    close(result.coefficient, alpha, 1e-14)
    omega = np.array([1 + alpha, 1.0, 1 - alpha / 2])
    close(result.weights[batch.mask.astype(bool)], omega, 1e-14)
    close(result.loss, -(omega[0] + omega[1] - 2 * omega[2]) / 3, 1e-14)
    close(grad, [[-omega[0] / 3, -omega[1] / 3], [2 * omega[2] / 3, 0]], 1e-14)


# omega per token of a row with ratios (8, 1, 1/4) and one with (1, 1, 1): the product of the
# first is 2, its geometric mean 2^(1/3).
BY_HAND = {
    "none": [1, 1, 1, 1, 1, 1],
    "tis": [2, 1, 0.25, 1, 1, 1],
    "tis_sequence": [2, 2, 2, 1, 1, 1],
    "tis_geomean": [2 ** (1 / 3)] * 3 + [1, 1, 1],
    "icepop": [0, 1, 0, 1, 1, 1],
    "geometric_rejection": [0, 0, 0, 1, 1, 1],
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_hand(name):
    rho = np.array([[8.0, 1.0, 0.25], [1.0, 1.0, 1.0]])
    logps = np.full((2, 3), -1.0)
    batch = Batch(logps, logps - np.log(rho), None, np.array([1.0, -1.0]), np.ones((2, 3), bool))
    result, _ = library(batch, PRESETS[name], np.float64)
    if name == "ais":
        alpha = expected(batch, AISConfig()).coefficient
        assert 0.1 < alpha < 0.9
        want = 1 + alpha * (np.array(BY_HAND["tis"]) - 1)
    else:
        want = np.array(BY_HAND[name])
    close(result.weights.ravel(), want, 1e-13)
    # Rejected tokens stay in the denominator.
    close(result.loss, -(np.sum(want[:3]) - np.sum(want[3:])) / 6, 1e-13)


def test_omitted_arguments_equal_explicit_ones():
    batch = random_batch(0, moved=False)
    result, grad = library(batch._replace(advantages=batch.advantages[:, 0]))
    want, want_grad = library(batch._replace(old_logps=batch.logps))
    jax.tree.map(np.testing.assert_array_equal, result, want)
    np.testing.assert_array_equal(grad, want_grad)
    assert np.abs(grad).max() > 0.01


def test_given_values_are_used_as_they_are():
    batch = random_batch(1)
    result, grad = library(batch, coefficient=0.25, denominator=7.0)
    want = expected(batch, AISConfig(), alpha=0.25)
    scale = batch.mask.sum() / 7.0
    close(result.coefficient, 0.25, 0)
    close(result.loss, want.loss * scale, 1e-6)
    close(grad, want.grad * scale, 1e-6)
    result, _ = library(batch, severity_scale=0.5)
    close(result.coefficient, expected(batch, AISConfig(), d0=0.5).coefficient, 1e-6)
    auto = AISConfig(severity_scale="auto")
    again, _ = library(batch, auto, severity_scale=0.5)
    assert again.coefficient == result.coefficient


def test_the_public_parts_make_up_the_whole():
    batch, config = random_batch(2), AISConfig(level="sequence_geomean", clip_low=1, clip_high=99)

    @jax.jit
    def by_parts(logps, rollout, old, advantages, mask):
        importance = importance_weights(old, rollout, mask, config)
        seen = diagnose(importance, advantages)
        omega = token_weights(importance, mixing_coefficient(seen, config))
        objective = jnp.exp(logps - old) * advantages
        denominator = loss_denominator(mask, config)
        return importance, seen, omega, -aggregate(omega * objective, mask, denominator, config)

    importance, seen, omega, loss = by_parts(*batch)
    assert importance.weights.shape == importance.keep.shape == (4, 1)
    weights = [e.weight for e in entries(batch, config)]
    close(importance.weights[:, 0], weights, 1e-6)
    close(seen.cv, cv(weights), 1e-6)
    result, _ = library(batch, config)
    close(omega, result.weights, 1e-6)
    close(loss, result.loss, 1e-6)
    close(loss, expected(batch, config).loss, 1e-6)


def test_shrinkage_keeps_the_variance_of_nearly_equal_weights_in_float32():
    """1/R - 1 near 1e-6, beside D^2 and D0^2 of the same size, to five digits."""
    config = AISConfig(coefficient="shrinkage", severity_scale=1e-3)
    for seed in range(8):
        batch = random_batch(seed, rows=8, length=16, spread=1e-3)
        want = expected(batch, config).coefficient
        assert 0.2 < want < 0.8
        np.testing.assert_allclose(library(batch, config)[0].coefficient, want, rtol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
@pytest.mark.parametrize("name", ["logps", "rollout_logps", "old_logps"])
def test_low_precision_is_refused_by_name(name, dtype):
    arguments = {k: jnp.full((2, 3), -1.0) for k in ("logps", "rollout_logps", "old_logps")}
    arguments[name] = arguments[name].astype(dtype)
    with pytest.raises(TypeError, match=rf"^{name} has dtype {np.dtype(dtype).name}.*float32"):
        ais_loss(advantages=jnp.ones(2), mask=jnp.ones((2, 3)), **arguments)


def test_bfloat16_storage_alone_fakes_a_severity():
    """Why the type is refused: identical policies, one copy stored in bfloat16."""
    exact = -np.random.default_rng(0).exponential(2.0, (64, 64)).astype(np.float32)
    stored = exact.astype(jnp.bfloat16).astype(np.float32)
    batch = Batch(exact, stored, None, np.ones(64), np.ones((64, 64), bool))
    severity = library(batch)[0].diagnostics.severity
    close(severity, diagnostics(batch, AISConfig())["severity"], 1e-6)
    assert 0.002 < severity < 0.02


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mask", (6,)),
        ("mask", (3, 2)),
        ("logps", (2, 4)),
        ("rollout_logps", (2,)),
        ("old_logps", (2, 1)),
        ("advantages", (3,)),
        ("advantages", (2, 1)),
        ("advantages", ()),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    arguments = {k: jnp.full((2, 3), -1.0) for k in ("logps", "rollout_logps", "old_logps")}
    arguments |= {"advantages": jnp.ones(2), "mask": jnp.ones((2, 3))}
    arguments[name] = jnp.ones(shape)
    with pytest.raises(ValueError, match=rf"{name} ha\w+ .*{re.escape(str(shape))}"):
        ais_loss(**arguments)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("level", "sequence"),
        ("coefficient", "adaptive"),
        ("aggregation", "mean"),
        ("policy_ratio", "row"),
        ("cap", 0.0),
        ("cap", math.nan),
        ("fixed_alpha", 1.5),
        ("fixed_alpha", -0.1),
        ("amplification_gain", -1.0),
        ("reliability_power", math.nan),
        ("severity_scale", 0.0),
        ("severity_scale", math.nan),
        ("severity_scale", "automatic"),
        ("clip_low", -0.1),
        ("clip_low", 1.1),
        ("clip_high", -0.2),
        ("dual_clip", 1.0),
        ("mask_low", math.nan),
    ],
)
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=rf"^{setting}={re.escape(repr(value))} "):
        AISConfig(**{setting: value})


def test_contradicting_settings_are_named():
    with pytest.raises(ValueError, match=r"^max_length=None .*sequence_sum_norm"):
        AISConfig(aggregation="sequence_sum_norm")
    with pytest.raises(ValueError, match=r"^max_length=0 "):
        AISConfig(aggregation="sequence_sum_norm", max_length=0)
    with pytest.raises(ValueError, match=r"^mask_high=0\.5 .*mask_low=2\.0"):
        AISConfig(mask_low=2.0, mask_high=0.5)
    with pytest.raises(ValueError, match=r"^geometric_high=0\.9 .*geometric_low=1\.1"):
        AISConfig(geometric_low=1.1, geometric_high=0.9)


def test_config_defaults_and_hash():
    assert AISConfig().coefficient == AISConfig(level="sequence_geomean").coefficient == "gated"
    assert AISConfig(level="sequence_product").coefficient == "shrinkage"
    assert hash(AISConfig()) == hash(AISConfig(coefficient="gated"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        AISConfig().cap = 3.0
    assert all(f.metadata["doc"] for f in dataclasses.fields(AISConfig))


def test_auto_needs_a_value():
    batch = random_batch(0)
    with pytest.raises(ValueError, match=r"severity_scale='auto'.*severity_scale=<nats>"):
        library(batch, AISConfig(severity_scale="auto"))


@pytest.mark.smoke
def test_new_values_do_not_recompile():
    batch, traces = random_batch(3), 0
    arrays = [jnp.asarray(x) for x in (batch.logps, batch.rollout_logps, batch.advantages)]
    mask = jnp.asarray(batch.mask)

    @functools.partial(jax.jit, static_argnames="config")
    def step(logps, rollout, advantages, severity_scale, coefficient, config):
        nonlocal traces
        traces += 1
        mixed = ais_loss(
            logps, rollout, advantages, mask, severity_scale=severity_scale, config=config
        )
        given = ais_loss(logps, rollout, advantages, mask, coefficient=coefficient)
        return mixed.coefficient, given.loss

    seen = {
        tuple(float(x) for x in step(*arrays, d0, alpha, config=AISConfig()))
        for d0, alpha in [(0.01, 0.0), (0.1, 0.5), (0.5, 1.0)]
    }
    assert len({alpha for alpha, _ in seen}) == len({loss for _, loss in seen}) == 3
    assert traces == 1
    step(*arrays, 0.1, 0.5, config=AISConfig(cap=3.0))
    assert traces == 2


def test_vmap_over_seeds():
    seeds = [random_batch(seed) for seed in range(3)]
    stacked = [jnp.stack([getattr(b, k) for b in seeds]) for k in Batch._fields]

    def loss(logps, rollout, old, advantages, mask):
        result = ais_loss(logps, rollout, advantages, mask, old)
        return result.loss, result.coefficient

    gradient = jax.jit(jax.vmap(jax.value_and_grad(loss, has_aux=True)))
    (losses, alphas), grads = gradient(*stacked)
    for i, batch in enumerate(seeds):
        want = expected(batch, AISConfig())
        close(losses[i], want.loss, 1e-6)
        close(alphas[i], want.coefficient, 1e-6)
        close(grads[i], want.grad, 1e-6)


@given(
    severity=st.floats(0, 20),
    reliability=st.floats(1e-4, 1),
    amplification=st.floats(0, 100),
    power=st.floats(-2, 3),
    gain=st.floats(0, 5),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_coefficient_from_given_diagnostics(severity, reliability, amplification, power, gain):
    cv = math.sqrt(1 / reliability - 1)
    seen = Diagnostics(reliability, severity, amplification, cv, sequences=16.0)
    gate = severity**2 / (severity**2 + 0.03**2)
    gated = gate * reliability**power / (1 + gain * max(amplification - 1, 0))
    config = AISConfig(reliability_power=power, amplification_gain=gain)
    close(mixing_coefficient(seen, config), min(gated, 1), 1e-5)
    noise = amplification * (1 / reliability - 1) / 16
    shrinkage = severity**2 / (severity**2 + 0.03**2 + noise)
    close(mixing_coefficient(seen, AISConfig(coefficient="shrinkage")), shrinkage, 1e-4)
