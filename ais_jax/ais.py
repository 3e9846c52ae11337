"""Adaptive importance sampling: from log-probs to diagnostics, one coefficient and the loss.

A quantized copy of the policy samples (`rollout_logps`), the full-precision policy learns
(`old_logps` at the same weights, `logps` being differentiated). Per batch, three diagnostics of
that mismatch give one mixing coefficient alpha in [0, 1], which interpolates between the
uncorrected gradient (alpha = 0) and the fully importance-weighted one (alpha = 1).

The idea and the three diagnostics are those of "AIS: Adaptive Importance Sampling for Quantized
RL" (arXiv 2605.13907). Its closed form of the coefficient is not in its public abstract; the form
here is this project's own, see docs/ais.md.

Everything here is a pure, jittable, differentiable function of arrays: no mesh, no trainer, no
state. Statistics are sums over all rows given, so under `jit` with a batch sharded over devices
they are global. Symbols: B sequences, T completion positions.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ais_jax import masked
from ais_jax.ais_config import AISConfig

_LOG_RATIO_LIMIT = 20.0


class ImportanceWeights(NamedTuple):
    """Ratios of trainer to rollout policy. L is T at token level and 1 at the sequence levels."""

    delta: jax.Array  # [B, T] log rho per token, clipped to +-20, 0 where invalid
    mask: jax.Array  # [B, T] bool, valid tokens
    log_ratio: jax.Array  # [B, L] log rho at the chosen level
    ratio: jax.Array  # [B, L] rho, uncapped
    weights: jax.Array  # [B, L] w = min(rho, cap), before rejection
    keep: jax.Array  # [B, L] bool, false where the weight is rejected
    valid: jax.Array  # [B, L] bool, entries that statistics run over


class Diagnostics(NamedTuple):
    """Scalars over the global batch, at the level of the weights unless said otherwise."""

    reliability: jax.Array | float  # R, effective-sample-size ratio of the weights
    severity: jax.Array | float  # D, mean |log rho|, nats
    amplification: jax.Array | float  # V, how much more w^2 weighs where A^2 is large
    cv: jax.Array | float | None = None  # coefficient of variation of w: R = 1 / (1 + cv^2)
    reliability_raw: jax.Array | float = 1.0  # R of the uncapped ratios
    ratio_mean: jax.Array | float = 1.0  # token level, E[rho]: 1 in expectation for sampled tokens
    ratio_sem: jax.Array | float = 0.0  # token level, standard error of ratio_mean
    ratio_max: jax.Array | float = 1.0
    ratio_p99: jax.Array | float = 1.0
    capped_fraction: jax.Array | float = 0.0  # share of ratios above the cap
    rejected_fraction: jax.Array | float = 0.0  # share of entries whose weight is set to 0
    kl_k1: jax.Array | float = 0.0  # token level, mean(-log rho): KL(rollout || trainer), nats
    kl_k3: jax.Array | float = 0.0  # token level, mean(rho - 1 - log rho) >= 0, nats
    mult_error: jax.Array | float = 1.0  # token level, mean exp|log rho|
    skew: jax.Array | float = 0.0  # mean((w - 1) A): which sign of advantage the weights favour
    tokens: jax.Array | float = 1.0  # n, valid tokens
    sequences: jax.Array | float = 1.0  # N, rows with at least one valid token


class AISResult(NamedTuple):
    """What `ais_loss` returns."""

    coefficient: jax.Array  # [] alpha in [0, 1]
    loss: jax.Array  # []
    weights: jax.Array  # [B, T] omega, the factor of each token's loss, stop-gradient
    diagnostics: Diagnostics
    clip_fraction: jax.Array  # [] share of valid tokens whose policy ratio was clipped


def importance_weights(
    old_logps: jax.Array, rollout_logps: jax.Array, mask: jax.Array, config: AISConfig = AISConfig()
) -> ImportanceWeights:
    """Weights of the trainer's policy over the rollout policy, without gradient.

    delta = clip(old_logps - rollout_logps, -20, 20); rho = exp of delta per token, of its row sum
    (`sequence_product`) or of its row mean (`sequence_geomean`); w = min(rho, cap).

    Args:
      old_logps: [B, T] float32 or float64, trainer's log-probs at the weights that were quantized.
      rollout_logps: [B, T], log-probs recorded by the sampler.
      mask: [B, T], non-zero at sampled completion tokens.
      config: level, cap and rejection thresholds.

    Raises:
      TypeError: log-probs are stored in less than float32.
      ValueError: shapes differ.
    """
    old_logps = _logps("old_logps", old_logps)
    rollout_logps = _logps("rollout_logps", rollout_logps)
    mask = _check_mask(mask, old_logps=old_logps, rollout_logps=rollout_logps)
    old, mu = (masked.select(jax.lax.stop_gradient(x), mask) for x in (old_logps, rollout_logps))
    delta = jnp.clip(old - mu, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)

    row_mean = masked.mean(delta, mask, axis=1, keepdims=True)
    if config.level == "token":
        log_ratio, valid = delta, mask
    else:
        valid = jnp.any(mask, axis=1, keepdims=True)
        row_sum = masked.sum(delta, mask, axis=1, keepdims=True)
        log_ratio = (
            row_mean
            if config.level == "sequence_geomean"
            else jnp.clip(row_sum, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT)
        )
    ratio = jnp.exp(log_ratio)
    weights = ratio if config.cap is None else jnp.minimum(ratio, config.cap)
    keep = _kept(delta, row_mean, ratio, config)
    return ImportanceWeights(delta, mask, log_ratio, ratio, weights, keep, valid)


def _kept(delta, row_mean, ratio, config: AISConfig) -> jax.Array:
    """[B, L] bool. NaN is kept, so that it stays visible instead of being rejected quietly."""
    keep = jnp.ones(ratio.shape, bool)
    if config.mask_low is not None:
        keep &= ~(ratio < config.mask_low)
    if config.mask_high is not None:
        keep &= ~(ratio > config.mask_high)
    if config.geometric_low is not None:
        keep &= ~(jnp.exp(row_mean) < config.geometric_low)
    if config.geometric_high is not None:
        keep &= ~(jnp.exp(row_mean) > config.geometric_high)
    if config.veto is not None:
        keep &= ~jnp.any(jnp.exp(delta) < config.veto, axis=1, keepdims=True)
    return keep | jnp.isnan(row_mean)


def diagnose(importance: ImportanceWeights, advantages: jax.Array) -> Diagnostics:
    """The three diagnostics of a batch and the statistics logged beside them, before rejection.

        reliability    R = (sum w)^2 / (n sum w^2)
        severity       D = sum |log rho| / n
        amplification  V = (sum w^2 A^2 / sum A^2) / (sum w^2 / n)

    Sums run over valid tokens, at the sequence levels over rows with a valid token (with the
    row's log ratio and mean advantage). No gradient flows. An empty batch gives R = V = 1, D = 0.

    Args:
      importance: from `importance_weights`.
      advantages: [B] or [B, T].
    """
    delta, mask, log_ratio, ratio, w, keep, valid = importance
    a = _level_advantages(advantages, importance)
    reliability, cv = _ess_ratio(w, valid)
    reliability_raw, _ = _ess_ratio(ratio, valid)
    token_ratio = jnp.exp(delta)
    tokens = masked.count(mask, dtype=w.dtype)
    ratio_mean = masked.mean(token_ratio, mask)
    _, token_cv = _ess_ratio(token_ratio, mask)
    return Diagnostics(
        reliability=reliability,
        severity=masked.mean(jnp.abs(log_ratio), valid),
        amplification=_amplification(w, a, valid),
        cv=cv,
        reliability_raw=reliability_raw,
        ratio_mean=ratio_mean,
        ratio_sem=ratio_mean * token_cv / jnp.sqrt(jnp.maximum(tokens, 1)),
        ratio_max=masked.max(ratio, valid),
        ratio_p99=masked.quantile(ratio, valid, 0.99),
        capped_fraction=masked.mean((ratio > w).astype(w.dtype), valid),
        rejected_fraction=masked.mean((~keep).astype(w.dtype), valid),
        kl_k1=masked.mean(-delta, mask),
        kl_k3=masked.mean(token_ratio - 1 - delta, mask),
        mult_error=masked.mean(jnp.exp(jnp.abs(delta)), mask),
        skew=masked.mean((w - 1) * a, valid),
        tokens=tokens,
        sequences=masked.count(jnp.any(mask, axis=1), dtype=w.dtype),
    )


def _level_advantages(advantages, importance: ImportanceWeights) -> jax.Array:
    """Advantages at the level of the weights, [B, L], 0 where invalid."""
    a = _advantages(advantages, importance.mask, importance.weights.dtype)
    if importance.weights.shape[1] == 1 and a.shape[1] != 1:
        a = masked.mean(a, importance.mask, axis=1, keepdims=True)
    return masked.select(jnp.broadcast_to(a, importance.weights.shape), importance.valid)


def _ess_ratio(w: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(R, CV). From centred sums: sum w^2 - (sum w)^2 / n would cancel when weights agree."""
    w = w / _largest(w, valid)
    mean = masked.mean(w, valid)
    variance = masked.mean(jnp.square(w - mean), valid)
    cv = jnp.sqrt(variance) / jnp.where(mean == 0, 1, mean)
    return jnp.minimum(1 / (1 + jnp.square(cv)), 1), cv


def _amplification(w: jax.Array, a: jax.Array, valid: jax.Array) -> jax.Array:
    w2 = jnp.square(w / _largest(w, valid))
    a2 = jnp.square(a / _largest(jnp.abs(a), valid))
    total = masked.sum(a2, valid)
    with_advantage = masked.sum(w2 * a2, valid) / jnp.where(total == 0, 1, total)
    without = masked.mean(w2, valid)
    value = with_advantage / jnp.where(without == 0, 1, without)
    return jnp.where(total == 0, 1, value)


def _largest(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Scale that keeps squares inside float32's range; 1 for an empty or all-zero batch."""
    largest = masked.max(x, valid)
    return jnp.where(largest == 0, 1, largest)


def mixing_coefficient(
    diagnostics: Diagnostics,
    config: AISConfig = AISConfig(),
    severity_scale: jax.Array | float | None = None,
) -> jax.Array:
    """alpha in [0, 1], a traced scalar: how much of the importance correction to apply.

        gated      alpha = D^2 / (D^2 + D0^2) * R^p / (1 + kappa max(V - 1, 0))
        shrinkage  alpha = D^2 / (D^2 + D0^2 + V (1/R - 1) / N)
        fixed      alpha = fixed_alpha

    Continuous; non-decreasing in D, non-increasing in V and (p >= 0) in 1/R; 0 for an empty batch.

    Args:
      diagnostics: from `diagnose`; reliability, severity, amplification, tokens and sequences
        are used.
      severity_scale: D0 in nats, used as it is; None takes `config.severity_scale`.

    Raises:
      ValueError: `config.severity_scale` is "auto" and no value is given.
    """
    reliability, severity, amplification = (
        jax.lax.stop_gradient(_at_least_float32(x)) for x in diagnostics[:3]
    )
    if config.coefficient == "fixed":
        alpha = jnp.full_like(severity, config.fixed_alpha)
    else:
        # Divided through by D^2, whose square would underflow; NaN is not 0 and stays visible.
        d = jnp.where(severity == 0, 1, severity)
        tolerance = jnp.square(_severity_scale(config, severity_scale) / d)
        if config.coefficient == "gated":
            trust = reliability**config.reliability_power
            backoff = 1 + config.amplification_gain * jnp.maximum(amplification - 1, 0)
            alpha = trust / backoff / (1 + tolerance)
        else:
            sequences = jnp.maximum(diagnostics.sequences, 1)
            noise = amplification * _squared_cv(diagnostics, reliability) / sequences
            alpha = 1 / (1 + tolerance + noise / d / d)
        alpha = jnp.where(severity == 0, 0, alpha)
    return jnp.where(jnp.asarray(diagnostics.tokens) > 0, jnp.clip(alpha, 0, 1), 0)


def _squared_cv(diagnostics: Diagnostics, reliability: jax.Array) -> jax.Array:
    """1/R - 1, from the centred sums where they are known: R near 1 is rounded in float32."""
    if diagnostics.cv is None:
        return 1 / reliability - 1
    return jnp.square(jax.lax.stop_gradient(_at_least_float32(diagnostics.cv)))


def _severity_scale(config: AISConfig, given) -> jax.Array:
    if given is not None:
        return jax.lax.stop_gradient(_at_least_float32(given))
    if config.severity_scale == "auto":
        raise ValueError(
            "severity_scale='auto' is calibrated by the trainer: "
            "pass severity_scale=<nats>, or set a number in AISConfig"
        )
    return _at_least_float32(config.severity_scale)


def token_weights(importance: ImportanceWeights, coefficient: jax.Array | float) -> jax.Array:
    """omega = 1 + alpha (w - 1), [B, T], without gradient; w is 0 where it was rejected."""
    w = masked.select(importance.weights, importance.keep)
    omega = 1 + jax.lax.stop_gradient(coefficient) * (w - 1)
    return jnp.broadcast_to(omega, importance.delta.shape)


def applied_reliability(importance: ImportanceWeights, coefficient: jax.Array | float) -> jax.Array:
    """[] effective-sample-size ratio of the omega of valid tokens: mixed, and after rejection."""
    omega = masked.select(token_weights(importance, coefficient), importance.mask)
    return _ess_ratio(omega, importance.mask)[0]


def loss_denominator(mask: jax.Array, config: AISConfig = AISConfig()) -> jax.Array:
    """What the loss of a batch is divided by, from the whole batch's `mask` [B, T]."""
    mask = jnp.asarray(mask).astype(bool)
    if config.aggregation == "token_mean":
        return masked.count(mask)
    rows = masked.count(jnp.any(mask, axis=1))
    if config.aggregation == "sequence_mean":
        return rows
    assert config.max_length is not None  # AISConfig sees to it
    return rows * config.max_length


def aggregate(
    values: jax.Array,
    mask: jax.Array,
    denominator: jax.Array | float,
    config: AISConfig = AISConfig(),
) -> jax.Array:
    """Per-token `values` [B, T] to one number, by `config.aggregation`; 0 for an empty batch.

    With the `denominator` of the whole batch, the results of its micro-batches add up to the
    result of the whole.
    """
    per_row = (masked.mean if config.aggregation == "sequence_mean" else masked.sum)(
        values, mask, axis=1
    )
    denominator = jnp.asarray(denominator, values.dtype)
    return jnp.sum(per_row) / jnp.where(denominator == 0, 1, denominator)


def clipped_objective(
    logps: jax.Array,
    old_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    config: AISConfig,
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped objective per token [B, T], and where [B, T] the clip was active.

    ratio = exp(clip(logps - old_logps, -20, 20)), per token, or its length-normalised row value
    (GSPO, arXiv 2507.18071). Dual clip: arXiv 1912.09729.
    """
    log_ratio = masked.select(logps, mask) - masked.select(old_logps, mask)
    if config.policy_ratio == "sequence":
        log_ratio = masked.mean(log_ratio, mask, axis=1, keepdims=True)
    ratio = jnp.exp(jnp.clip(log_ratio, -_LOG_RATIO_LIMIT, _LOG_RATIO_LIMIT))
    clipped = jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    # Not jnp.minimum: where both are equal, as at ratio 1 with a clip of 0, it halves the gradient.
    active = clipped * advantages < ratio * advantages
    objective = jnp.where(active, jax.lax.stop_gradient(clipped), ratio) * advantages
    if config.dual_clip is not None:
        floor = config.dual_clip * advantages
        active |= (advantages < 0) & (objective < floor)
        objective = jnp.where(advantages < 0, jnp.maximum(objective, floor), objective)
    return jnp.broadcast_to(objective, mask.shape), jnp.broadcast_to(active, mask.shape)


def ais_loss(
    logps: jax.Array,
    rollout_logps: jax.Array,
    advantages: jax.Array,
    mask: jax.Array,
    old_logps: jax.Array | None = None,
    severity_scale: jax.Array | float | None = None,
    coefficient: jax.Array | float | None = None,
    denominator: jax.Array | float | None = None,
    config: AISConfig = AISConfig(),
) -> AISResult:
    """The GRPO loss under adaptive importance sampling.

        L = - sum m omega min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A) / denominator

    Gradient flows through `logps` alone. With alpha = 0 this is plain GRPO, with alpha = 1 it is
    truncated importance sampling, and the gradient is linear in alpha between them.

    Args:
      logps: [B, T] float32 or float64, log-probs of the policy being differentiated.
      rollout_logps: [B, T], log-probs recorded by the (quantized) sampler.
      advantages: [B] or [B, T].
      mask: [B, T], non-zero at sampled completion tokens; anything may stand elsewhere.
      old_logps: [B, T], trainer's log-probs at the weights that sampled; None means
        `stop_gradient(logps)`.
      severity_scale: D0 in nats, overrides the config's.
      coefficient: alpha of the whole rollout batch, where `logps` holds only a part of it.
      denominator: divisor of the whole batch (`loss_denominator`), likewise.
      config: static settings.

    Returns:
      `AISResult`: coefficient [], loss [], weights [B, T], diagnostics, clip_fraction [].

    Raises:
      TypeError: log-probs are stored in less than float32: bfloat16 storage alone fakes a
        severity near 0.009 nats.
      ValueError: shapes do not fit, or severity_scale is "auto" and not given.

    Example:
      >>> import jax.numpy as jnp
      >>> from ais_jax import ais_loss
      >>> logps = jnp.log(jnp.array([[0.5, 0.25], [0.5, 0.5]]))
      >>> result = ais_loss(logps, logps, jnp.array([1.0, -1.0]), jnp.ones((2, 2)))
      >>> float(result.coefficient), float(result.diagnostics.reliability)
      (0.0, 1.0)
    """
    logps = _logps("logps", logps)
    mask = _check_mask(mask, logps=logps)
    old = jax.lax.stop_gradient(logps if old_logps is None else _logps("old_logps", old_logps))
    importance = importance_weights(old, rollout_logps, mask, config)
    diagnostics = diagnose(importance, advantages)
    if coefficient is None:
        coefficient = mixing_coefficient(diagnostics, config, severity_scale)
    coefficient = jax.lax.stop_gradient(_at_least_float32(coefficient))
    omega = token_weights(importance, coefficient)

    a = _advantages(advantages, mask, logps.dtype)
    objective, clip_active = clipped_objective(logps, old, a, mask, config)
    if denominator is None:
        denominator = loss_denominator(mask, config)
    loss = -aggregate(omega * objective, mask, denominator, config)
    clip_fraction = masked.mean(clip_active.astype(logps.dtype), mask)
    return AISResult(coefficient, loss, omega, diagnostics, jax.lax.stop_gradient(clip_fraction))


def _at_least_float32(x) -> jax.Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _logps(name: str, x) -> jax.Array:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if dtype not in (np.dtype("float32"), np.dtype("float64")):
        raise TypeError(
            f"{name} has dtype {dtype}; log-probs must be float32 or float64: compute the "
            "log-softmax in float32 and keep it there (rounding alone looks like a mismatch)"
        )
    return jnp.asarray(x)


def _check_mask(mask, **logps) -> jax.Array:
    mask = jnp.asarray(mask).astype(bool)
    if mask.ndim != 2:
        raise ValueError(f"mask has shape {mask.shape}; expected [batch, tokens]")
    for name, x in logps.items():
        if x.shape != mask.shape:
            raise ValueError(
                f"{name} has shape {x.shape}, mask has {mask.shape}; they must be equal"
            )
    return mask


def _advantages(advantages, mask: jax.Array, dtype) -> jax.Array:
    """Advantages as [B, 1] or [B, T] without gradient, 0 where invalid."""
    a = jnp.asarray(advantages)
    a = jax.lax.stop_gradient(a.astype(jnp.promote_types(a.dtype, dtype)))
    if a.shape == mask.shape[:1]:
        return masked.select(a[:, None], jnp.any(mask, axis=1, keepdims=True))
    if a.shape != mask.shape:
        raise ValueError(
            f"advantages have shape {a.shape}; expected {mask.shape[:1]} or {mask.shape}"
        )
    return masked.select(a, mask)
