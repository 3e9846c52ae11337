"""The pure functions of one GRPO step: refit, measure, update.

Each is a function of arrays, with its static parts bound by `functools.partial`; `programs.py`
jits them with shardings.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from ais_jax import ais, masked, quantize
from ais_jax.ais_config import AISConfig
from ais_jax.models import Model, Params
from ais_jax.sampling import Policy, Rollout, sampling_copy
from ais_jax.train.state import Calibration, TrainState, calibrate, severity_scale


class TrainBatch(NamedTuple):
    """A rollout with everything its gradient needs. B rows, T completion positions."""

    rollout: Rollout
    mask: jax.Array  # [B, T] bool, tokens in the loss
    advantages: jax.Array  # [B] float32
    old_logps: jax.Array  # [B, T] float32, trainer at the weights that sampled
    ref_logps: jax.Array | None  # [B, T] float32, the policy before GRPO


class Measurement(NamedTuple):
    """What a whole rollout batch says about the mismatch."""

    coefficient: jax.Array  # [] alpha
    severity_scale: jax.Array  # [] D0, nats
    reliability_applied: jax.Array  # [] R of what tokens are multiplied by
    diagnostics: ais.Diagnostics


def refit(params: Params, previous: Params | None, *, model: Model, recipe: str, platform: str):
    """The sampling copy of `params`, and the share of its codes that differ from `previous`.

    A share of 0 after an update means that the sampler is deaf to what is learned.
    """
    copy = sampling_copy(model, params, recipe, platform)
    changed = jnp.float32(jnp.nan)
    if previous is not None:
        changed = quantize.changed_fraction(previous, copy)
    return copy, changed


def plan(rollout: Rollout, keys: jax.Array, *, policy: Policy, draws: int) -> Rollout:
    """The rollout's rows `draws` times over, each time with canvases of their own to be scored at.

    `keys` [B] are PRNG keys. An autoregressive rollout has no canvases and comes back as it is.
    """
    parts = [
        policy.plan(rollout, jax.vmap(jax.random.fold_in, (0, None))(keys, i)) for i in range(draws)
    ]
    return parts[0] if draws == 1 else jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def score(
    params: Params, rollout: Rollout, *, policy: Policy, rows: int
) -> tuple[jax.Array, jax.Array]:
    """(log-probs, entropy) [B, T] float32, of `rows` rows at a time, as in an update."""
    parts = rollout.tokens.shape[0] // rows
    if parts == 1:
        return policy.score(params, rollout)
    scores = jax.lax.map(functools.partial(policy.score, params), _split(rollout, parts))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), scores)


def measure(
    calibration: Calibration, batch: TrainBatch, *, config: AISConfig
) -> tuple[Calibration, Measurement]:
    """Diagnostics and coefficient of a rollout batch, before any minibatch is cut from it."""
    importance = ais.importance_weights(batch.old_logps, batch.rollout.logps, batch.mask, config)
    diagnostics = ais.diagnose(importance, batch.advantages)
    calibration = calibrate(calibration, diagnostics.severity)
    scale = severity_scale(calibration, config)
    coefficient = ais.mixing_coefficient(diagnostics, config, scale)
    applied = ais.applied_reliability(importance, coefficient)
    return calibration, Measurement(coefficient, scale, applied, diagnostics)


def loss(
    params: Params,
    frozen: Params | None,
    batch: TrainBatch,
    coefficient: jax.Array,
    denominator: jax.Array,
    *,
    policy: Policy,
    config: AISConfig,
    kl_coef: float,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss of a micro-batch, a part of the sum that is the minibatch's loss.

    The KL to the reference is the k3 estimate exp(d) - 1 - d of d = ref_logps - logps, never
    weighted by the correction.
    """
    logps, _ = policy.score(policy.join(params, frozen), batch.rollout)
    result = ais.ais_loss(
        logps,
        batch.rollout.logps,
        batch.advantages,
        batch.mask,
        old_logps=batch.old_logps,
        coefficient=coefficient,
        denominator=denominator,
        config=config,
    )
    total, kl = result.loss, jnp.float32(0)
    if batch.ref_logps is not None:
        log_ratio = masked.select(batch.ref_logps, batch.mask) - masked.select(logps, batch.mask)
        k3 = jnp.expm1(jnp.clip(log_ratio, -20, 20)) - log_ratio
        kl = ais.aggregate(k3, batch.mask, denominator, config)
        total += kl_coef * kl
    clipped = result.clip_fraction * masked.count(batch.mask)
    return total, {"kl": kl, "clip_fraction": clipped}


def update(
    state: TrainState,
    frozen: Params | None,
    batch: TrainBatch,
    coefficient: jax.Array,
    *,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    config: AISConfig,
    kl_coef: float,
    micro_batches: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a minibatch, its gradient accumulated over micro-batches.

    `frozen` is the part of the policy that is not trained, None if all of it is.

    The denominator is the whole minibatch's, so neither the number of micro-batches nor that of
    devices changes loss or gradient. An update that is not finite is skipped and counted.
    """
    denominator = ais.loss_denominator(batch.mask, config)

    def one(carry, micro):
        (value, aux), grads = jax.value_and_grad(loss, has_aux=True)(
            state.params,
            frozen,
            micro,
            coefficient,
            denominator,
            policy=policy,
            config=config,
            kl_coef=kl_coef,
        )
        return jax.tree.map(jnp.add, carry, (value, aux, grads)), None

    zero = jax.tree.map(jnp.zeros_like, state.params)
    start = (jnp.float32(0), {"kl": jnp.float32(0), "clip_fraction": jnp.float32(0)}, zero)
    if micro_batches == 1:
        (value, aux, grads), _ = one(start, batch)
    else:
        (value, aux, grads), _ = jax.lax.scan(one, start, _split(batch, micro_batches))

    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    new = state._replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    new = new._replace(skipped=jnp.where(finite, 0, state.skipped + 1))
    aux["clip_fraction"] /= jnp.maximum(masked.count(batch.mask), 1)
    return new, {"loss": value, "grad_norm": grad_norm, **aux}


def _split(batch, parts: int):
    """[B, ...] to [parts, B / parts, ...]: row i goes to part i % parts.

    Strided, so that with rows split over devices in blocks every part is split over all of them.
    """

    def one(x):
        return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(one, batch)
