"""The AIS correction once more, in NumPy float64 and plain loops, and batches to compare it on.

Written from the formulas alone: an entry is one weight with the tokens that it covers, a row is
walked token by token, and the gradient is the chain rule by hand.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from ais_jax import AISConfig, ais_loss

ROWS, LENGTH = 4, 5
# One config per level; every aggregation and both policy ratios are among them.
LEVELS = {
    "token": AISConfig(),
    "product": AISConfig(
        level="sequence_product", policy_ratio="sequence", aggregation="sequence_mean"
    ),
    "geomean": AISConfig(level="sequence_geomean", aggregation="sequence_sum_norm", max_length=9),
}


class Batch(NamedTuple):
    logps: np.ndarray  # [B, T]
    rollout_logps: np.ndarray  # [B, T]
    old_logps: Any  # [B, T]; None: the same as logps
    advantages: np.ndarray  # [B] or [B, T]
    mask: np.ndarray  # [B, T] bool

    @property
    def old(self) -> np.ndarray:
        return self.logps if self.old_logps is None else self.old_logps

    def advantage(self, row: int, t: int) -> float:
        a = self.advantages[row]
        return float(a if np.ndim(a) == 0 else a[t])


class Entry(NamedTuple):
    row: int
    tokens: list[int]  # positions of the row that this weight applies to
    log_ratio: float
    ratio: float
    weight: float  # capped, before rejection
    keep: bool
    advantage: float


class Expected(NamedTuple):
    diagnostics: dict[str, float]
    coefficient: float
    weights: np.ndarray  # [B, T] omega, NaN at pads
    loss: float
    grad: np.ndarray  # [B, T] d loss / d logps
    clip_fraction: float


def clip(x: float, low: float, high: float) -> float:
    return low if x < low else high if x > high else x


def close(got, want, atol: Any, what: str = "") -> None:
    """Equal to `atol`, absolutely; NaN equals NaN only."""
    np.testing.assert_allclose(got, want, rtol=0, atol=atol, err_msg=what)


def valid_tokens(batch: Batch, row: int) -> list[int]:
    return [t for t in range(batch.mask.shape[1]) if batch.mask[row, t]]


def delta(batch: Batch, row: int, t: int) -> float:
    return clip(float(batch.old[row, t]) - float(batch.rollout_logps[row, t]), -20, 20)


def entries(batch: Batch, config: AISConfig) -> list[Entry]:
    """Every weight of the batch: one per valid token, or one per row with a valid token."""
    found = []
    for row in range(batch.mask.shape[0]):
        tokens = valid_tokens(batch, row)
        if not tokens:
            continue
        deltas = [delta(batch, row, t) for t in tokens]
        mean = math.fsum(deltas) / len(deltas)
        row_kept = not (
            (config.geometric_low is not None and math.exp(mean) < config.geometric_low)
            or (config.geometric_high is not None and math.exp(mean) > config.geometric_high)
            or (config.veto is not None and any(math.exp(d) < config.veto for d in deltas))
        )
        if config.level == "token":
            groups = [([t], d) for t, d in zip(tokens, deltas, strict=True)]
        elif config.level == "sequence_product":
            groups = [(tokens, clip(math.fsum(deltas), -20, 20))]
        else:
            groups = [(tokens, mean)]
        for group, log_ratio in groups:
            rho = math.exp(log_ratio)
            inside = (config.mask_low is None or rho >= config.mask_low) and (
                config.mask_high is None or rho <= config.mask_high
            )
            weight = rho if config.cap is None else min(rho, config.cap)
            advantage = math.fsum(batch.advantage(row, t) for t in group) / len(group)
            found.append(Entry(row, group, log_ratio, rho, weight, row_kept and inside, advantage))
    return found


def _mean(values) -> float:
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def cv(weights: list[float]) -> float:
    """Population standard deviation over mean."""
    mean = _mean(weights)
    return math.sqrt(_mean((w - mean) ** 2 for w in weights)) / mean if weights else 0.0


def ess_ratio(weights: list[float]) -> float:
    """(sum w)^2 / (n sum w^2)."""
    if not weights:
        return 1.0
    return math.fsum(weights) ** 2 / (len(weights) * math.fsum(w * w for w in weights))


def amplification(weights: list[float], advantages: list[float]) -> float:
    """(sum w^2 A^2 / sum A^2) / (sum w^2 / n)."""
    a2 = math.fsum(a * a for a in advantages)
    if a2 == 0:
        return 1.0
    w2a2 = math.fsum(w * w * a * a for w, a in zip(weights, advantages, strict=True))
    return (w2a2 / a2) / _mean(w * w for w in weights)


def diagnostics(batch: Batch, config: AISConfig) -> dict[str, float]:
    found = entries(batch, config)
    w, rho = [e.weight for e in found], [e.ratio for e in found]
    rows = range(batch.mask.shape[0])
    deltas = [delta(batch, row, t) for row in rows for t in valid_tokens(batch, row)]
    token_rho = [math.exp(d) for d in deltas]
    return {
        "reliability": ess_ratio(w),
        "severity": _mean(abs(e.log_ratio) for e in found),
        "amplification": amplification(w, [e.advantage for e in found]),
        "cv": cv(w),
        "reliability_raw": ess_ratio(rho),
        "ratio_mean": _mean(token_rho),
        "ratio_sem": _mean(token_rho) * cv(token_rho) / math.sqrt(max(len(deltas), 1)),
        "ratio_max": max(rho, default=0.0),
        "ratio_p99": float(np.quantile(rho, 0.99)) if rho else 0.0,
        "capped_fraction": _mean(config.cap is not None and r > config.cap for r in rho),
        "rejected_fraction": _mean(not e.keep for e in found),
        "kl_k1": _mean(-d for d in deltas),
        "kl_k3": _mean(math.expm1(d) - d for d in deltas),
        "mult_error": _mean(math.exp(abs(d)) for d in deltas),
        "skew": _mean((e.weight - 1) * e.advantage for e in found),
        "tokens": float(len(deltas)),
        "sequences": float(sum(bool(valid_tokens(batch, row)) for row in rows)),
    }


def coefficient(batch: Batch, config: AISConfig, d0: float | None = None) -> float:
    """alpha; `d0` overrides the config's severity scale."""
    found = entries(batch, config)
    if not found:
        return 0.0
    if config.coefficient == "fixed":
        return config.fixed_alpha
    d0 = float(config.severity_scale) if d0 is None else d0
    w = [e.weight for e in found]
    d = _mean(abs(e.log_ratio) for e in found)
    v = amplification(w, [e.advantage for e in found])
    if config.coefficient == "shrinkage":
        sequences = len({e.row for e in found})
        return d**2 / (d**2 + d0**2 + v * cv(w) ** 2 / sequences)
    gate = d**2 / (d**2 + d0**2)
    alpha = gate * ess_ratio(w) ** config.reliability_power
    alpha /= 1 + config.amplification_gain * max(v - 1, 0)
    return min(alpha, 1.0)


def omega(batch: Batch, config: AISConfig, alpha: float) -> np.ndarray:
    """1 + alpha (w - 1) at valid positions, NaN elsewhere; w = 0 where rejected."""
    result = np.full(batch.mask.shape, np.nan)
    for e in entries(batch, config):
        for t in e.tokens:
            result[e.row, t] = 1 + alpha * ((e.weight if e.keep else 0.0) - 1)
    return result


def _token_objective(log_ratio: float, a: float, config: AISConfig) -> tuple[float, float, bool]:
    """(objective, its derivative by log_ratio, clip active) of one token."""
    ratio = math.exp(clip(log_ratio, -20, 20))
    slope = ratio * a if abs(log_ratio) < 20 else 0.0
    clipped = clip(ratio, 1 - config.clip_low, 1 + config.clip_high)
    value, active = ratio * a, False
    if clipped * a < value:
        value, slope, active = clipped * a, 0.0, True
    if config.dual_clip is not None and a < 0 and value < config.dual_clip * a:
        value, slope, active = config.dual_clip * a, 0.0, True
    return value, slope, active


def denominator(batch: Batch, config: AISConfig) -> float:
    rows = sum(bool(valid_tokens(batch, row)) for row in range(batch.mask.shape[0]))
    if config.aggregation == "token_mean":
        return float(batch.mask.sum())
    return float(rows if config.aggregation == "sequence_mean" else rows * config.max_length)


def loss_and_grad(batch: Batch, config: AISConfig, factors: np.ndarray):
    """(loss, gradient [B, T], clip fraction) with the given factor of each token's loss."""
    grad, loss, active = np.zeros(batch.mask.shape), 0.0, 0
    divisor = denominator(batch, config) or 1.0
    for row in range(batch.mask.shape[0]):
        tokens = valid_tokens(batch, row)
        log_ratios = {t: float(batch.logps[row, t]) - float(batch.old[row, t]) for t in tokens}
        mean = _mean(log_ratios.values())
        per_token = 1 / divisor
        if config.aggregation == "sequence_mean" and tokens:
            per_token /= len(tokens)
        for t in tokens:
            whole_row = config.policy_ratio == "sequence"
            value, slope, clipped = _token_objective(
                mean if whole_row else log_ratios[t], batch.advantage(row, t), config
            )
            loss -= per_token * factors[row, t] * value
            active += clipped
            for u in tokens if whole_row else [t]:
                share = 1 / len(tokens) if whole_row else 1.0
                grad[row, u] -= per_token * factors[row, t] * slope * share
    return loss, grad, active / max(int(batch.mask.sum()), 1)


def expected(
    batch: Batch, config: AISConfig, alpha: float | None = None, d0: float | None = None
) -> Expected:
    """Everything `ais_loss` returns, and the gradient."""
    if alpha is None:
        alpha = coefficient(batch, config, d0)
    factors = omega(batch, config, alpha)
    loss, grad, clip_fraction = loss_and_grad(batch, config, factors)
    return Expected(diagnostics(batch, config), alpha, factors, loss, grad, clip_fraction)


def near_kink(batch: Batch, config: AISConfig, margin: float = 1e-4) -> bool:
    """Whether a ratio lies so close to a threshold that rounding may decide about its side."""
    pairs = []
    thresholds = (config.mask_low, config.mask_high, config.cap)
    rows = range(batch.mask.shape[0])
    for e in entries(batch, config):
        pairs += [(e.ratio, x) for x in thresholds]
    for row in rows:
        tokens = valid_tokens(batch, row)
        if not tokens:
            continue
        mean = _mean(delta(batch, row, t) for t in tokens)
        pairs += [(math.exp(mean), x) for x in (config.geometric_low, config.geometric_high)]
        pairs += [(math.exp(delta(batch, row, t)), config.veto) for t in tokens]
        moves = [float(batch.logps[row, t]) - float(batch.old[row, t]) for t in tokens]
        ratios = [math.exp(m) for m in [*moves, _mean(moves)]]
        edges = (1 - config.clip_low, 1 + config.clip_high, config.dual_clip)
        pairs += [(r, x) for r in ratios for x in edges]
    return any(x is not None and abs(value - x) < margin * x for value, x in pairs)


def tolerance(batch: Batch, dtype) -> float:
    """Relative rounding error of exp(sum of a row's deltas) and of a few sums over it."""
    if dtype == np.float64:
        return 1e-12
    rows = range(batch.mask.shape[0])
    total = max(sum(abs(delta(batch, row, t)) for t in valid_tokens(batch, row)) for row in rows)
    return float(4 * np.finfo(dtype).eps * (8 + total))


@st.composite
def batches(draw, scales=(0.02, 0.3, 3.0, 30.0), rows=ROWS, length=LENGTH) -> Batch:
    """Batches on the float32 grid: mismatch from noise to far beyond the clip, any mask."""
    shape = (rows, length)

    def array(shape, low, high):
        floats = st.floats(low, high, width=32, allow_subnormal=False)
        return draw(hnp.arrays(np.float32, shape, elements=floats))

    old = array(shape, -8, 0)
    rollout = old - array(shape, -1, 1) * np.float32(draw(st.sampled_from(scales)))
    logps = old + array(shape, -0.5, 0.5) * np.float32(draw(st.booleans()))
    advantages = array((rows, draw(st.sampled_from([1, length]))), -2, 2)
    advantages[np.abs(advantages) < 1e-30] = 0  # float32 flushes such products to zero
    mask = draw(hnp.arrays(bool, shape))
    return Batch(logps, rollout, old, np.broadcast_to(advantages, shape), mask)


def random_batch(seed: int, rows=ROWS, length=LENGTH, spread=0.3, moved=True) -> Batch:
    """A batch of normal noise on the float32 grid, with rows of different lengths."""
    rng = np.random.default_rng(seed)
    shape = (rows, length)
    old = (-2 + 0.7 * rng.standard_normal(shape)).astype(np.float32)
    rollout = (old + spread * rng.standard_normal(shape)).astype(np.float32)
    logps = (old + 0.2 * rng.standard_normal(shape)).astype(np.float32)
    lengths = rng.integers(1, length + 1, rows)
    advantages = rng.standard_normal((rows, 1)).astype(np.float32).repeat(length, axis=1)
    mask = np.arange(length) < lengths[:, None]
    return Batch(logps if moved else old, rollout, old if moved else None, advantages, mask)


# Dozens of configs are compiled for a few tiny arrays each: the compiler's effort is the cost.
@functools.partial(
    jax.jit, static_argnames="config", compiler_options={"xla_backend_optimization_level": 0}
)
def _loss_and_grad(logps, rollout, old, advantages, mask, kwargs, config):
    def loss(logps):
        result = ais_loss(logps, rollout, advantages, mask, old, config=config, **kwargs)
        return result.loss, result

    grad, result = jax.grad(loss, has_aux=True)(logps)
    return result, grad


def library(batch: Batch, config: AISConfig = AISConfig(), dtype=np.float32, **kwargs):
    """(`AISResult`, gradient by logps) of the library in `dtype`, as NumPy arrays."""
    with jax.enable_x64(dtype == np.float64):
        arrays = [
            None if x is None else jnp.asarray(x, dtype)
            for x in (batch.logps, batch.rollout_logps, batch.old_logps, batch.advantages)
        ]
        kwargs = {name: jnp.asarray(value, dtype) for name, value in kwargs.items()}
        output = _loss_and_grad(*arrays, jnp.asarray(batch.mask), kwargs, config)
        return jax.tree.map(np.asarray, output)
