"""What a run carries from step to step, as one pytree."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ais_jax import mesh as mesh_lib
from ais_jax.ais_config import AISConfig
from ais_jax.models import Params
from ais_jax.sampling import Policy

CALIBRATION_BATCHES = 5
CALIBRATION_RANGE = (0.005, 0.1)


class Calibration(NamedTuple):
    """Severity of the first rollout batches, from which `severity_scale: auto` is set."""

    severity_sum: jax.Array  # [] float32, nats
    batches: jax.Array  # [] int32


class TrainState(NamedTuple):
    """Everything that an update changes. Sampling keys follow from the seed and the step."""

    params: Params  # float32 master weights of what is trained
    opt_state: optax.OptState
    calibration: Calibration
    skipped: jax.Array  # [] int32, non-finite updates in a row


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step. Jit it with `state_shardings` to create it in place."""
    calibration = Calibration(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32))
    return TrainState(params, optimizer.init(params), calibration, jnp.zeros((), jnp.int32))


def state_shardings(
    policy: Policy, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh
):
    """A `TrainState` of NamedShardings: moments lie like their parameters, scalars everywhere."""
    shapes = jax.eval_shape(policy.init_trainable, jax.random.key(0))
    params = mesh_lib.param_shardings(policy.trainable_axes(), shapes, mesh, mesh_lib.TRAIN_RULES)
    everywhere: Any = mesh_lib.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, sharding: sharding,
        jax.eval_shape(optimizer.init, shapes),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(params, opt_state, Calibration(everywhere, everywhere), everywhere)


def calibrate(calibration: Calibration, severity: jax.Array | float) -> Calibration:
    """Counts a batch's severity in, as long as fewer than `CALIBRATION_BATCHES` are."""
    new = (calibration.batches < CALIBRATION_BATCHES) & jnp.isfinite(severity)
    return Calibration(
        calibration.severity_sum + jnp.where(new, severity, 0.0),
        calibration.batches + new.astype(jnp.int32),
    )


def severity_scale(calibration: Calibration, config: AISConfig) -> jax.Array:
    """D0 in nats: the config's number, or with `auto` its factor times the mean severity so far."""
    if config.severity_scale != "auto":
        return jnp.float32(config.severity_scale)
    mean = calibration.severity_sum / jnp.maximum(calibration.batches, 1)
    return jnp.clip(config.severity_factor * mean, *CALIBRATION_RANGE)
