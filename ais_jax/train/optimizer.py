"""AdamW with a learning-rate schedule and clipping of the global gradient norm, by optax."""

from __future__ import annotations

import jax
import optax

from ais_jax.config import Config, WarmupConfig
from ais_jax.quantize import SMALL_NAMES


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Learning rate of each update: linear rise, then constant, cosine or linear fall."""
    c = config.optimizer
    updates = config.train.steps * config.grpo.inner_epochs * config.grpo.minibatches
    rest = max(updates - c.warmup_steps, 1)
    end = c.learning_rate * c.final_fraction
    after = {
        "constant": optax.constant_schedule(c.learning_rate),
        "cosine": optax.cosine_decay_schedule(c.learning_rate, rest, c.final_fraction),
        "linear": optax.linear_schedule(c.learning_rate, end, rest),
    }[c.schedule]
    return _rise(c.learning_rate, c.warmup_steps, after)


def _rise(peak: float, steps: int, after: optax.Schedule) -> optax.Schedule:
    if steps == 0:
        return after
    # Starts at peak / steps, not at 0: the first update should move something.
    rise = optax.linear_schedule(peak / steps, peak, steps - 1 or 1)
    return optax.join_schedules([rise, after], [steps])


def adamw(
    schedule: optax.Schedule,
    b1: float,
    b2: float,
    weight_decay: float,
    max_grad_norm: float,
    mu_dtype: str = "float32",
) -> optax.GradientTransformation:
    """Clip, then AdamW; decay spares norms, decay rates and convolutions."""

    def decayed(params):
        return jax.tree.map_with_path(
            lambda path, _: not any(x in jax.tree_util.keystr(path[-1:]) for x in SMALL_NAMES),
            params,
        )

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.adamw(
            schedule, b1=b1, b2=b2, mu_dtype=mu_dtype, weight_decay=weight_decay, mask=decayed
        ),
    )


def grpo_optimizer(config: Config) -> optax.GradientTransformation:
    """The optimizer of the GRPO phase."""
    c = config.optimizer
    schedule = learning_rate_schedule(config)
    return adamw(schedule, c.b1, c.b2, c.weight_decay, c.max_grad_norm, c.mu_dtype)


def warmup_optimizer(config: WarmupConfig) -> optax.GradientTransformation:
    """The optimizer of the supervised phase: rise, then cosine to a tenth of the peak."""
    rest = max(config.steps - config.learning_rate_warmup, 1)
    after = optax.cosine_decay_schedule(config.learning_rate, rest, 0.1)
    schedule = _rise(config.learning_rate, config.learning_rate_warmup, after)
    return adamw(schedule, 0.9, 0.99, config.weight_decay, 1.0)
