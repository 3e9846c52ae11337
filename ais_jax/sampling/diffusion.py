"""Sampling from a masked diffusion model: block after block, the surest tokens first.

The published sampler of LLaDA (arXiv 2502.09992) with its linear schedule and low-confidence
remasking. Letters in shapes: B rows, P prompt length (left-padded), T completion length,
V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ais_jax.models import Model, Params, positions_of
from ais_jax.sampling import logps as lp


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Static settings of the sampler.

    Attributes:
      max_new_tokens: T; a multiple of `block`.
      block: positions that are filled before the next ones are begun.
      steps: forwards a block; of the masks left, an equal share is filled at each.
      temperature: of the Gumbel noise; 0 takes the most probable token.
      mask_id: stands for a token not yet chosen; never sampled.
      token_count: ids from here on are never sampled.
    """

    max_new_tokens: int
    block: int
    steps: int
    temperature: float
    mask_id: int
    token_count: int

    def __post_init__(self):
        if self.block < 1 or self.max_new_tokens % self.block:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} must be a multiple of block={self.block}"
            )
        if not 1 <= self.steps <= self.block:
            raise ValueError(f"steps={self.steps} must be from 1 to block={self.block}")


def generate(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    config: DiffusionConfig,
) -> jax.Array:
    """Completions [B, T] int32.

    Args:
      model: a bidirectional model.
      params: its parameters, quantized or not.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool.
      keys: [B] PRNG keys; a row's noise comes from its own.
      config: lengths, schedule, temperature, ids.
    """
    rows, width = prompts.shape
    canvas = jnp.full((rows, config.max_new_tokens), config.mask_id, jnp.int32)
    canvas = jnp.concatenate([prompts.astype(jnp.int32), canvas], axis=1)
    mask = jnp.pad(prompt_mask, ((0, 0), (0, config.max_new_tokens)), constant_values=True)
    positions = positions_of(mask)
    ids = jnp.arange(model.config.vocab_size)
    allowed = (ids < config.token_count) & (ids != config.mask_id)

    def step(i, canvas):
        block, within = i // config.steps, i % config.steps
        start = width + block * config.block
        hidden, _ = model.hidden(params, canvas, positions, mask)
        hidden = jax.lax.dynamic_slice_in_dim(hidden, start, config.block, axis=1)
        logps = lp.log_probs(model.unembed(params, hidden), 1.0, allowed)
        tokens = _choose(logps, keys, i, config.temperature)
        current = jax.lax.dynamic_slice_in_dim(canvas, start, config.block, axis=1)
        masked = current == config.mask_id
        sure = jnp.where(masked, lp.pick(logps, tokens)[1], -jnp.inf)
        rank = jnp.argsort(jnp.argsort(-sure, axis=1), axis=1)  # 0 is the surest
        chosen = masked & (rank < _share(config, within))
        current = jnp.where(chosen, tokens.astype(jnp.int32), current)
        return jax.lax.dynamic_update_slice_in_dim(canvas, current, start, axis=1)

    steps = config.max_new_tokens // config.block * config.steps
    return jax.lax.fori_loop(0, steps, step, canvas)[:, width:]


def _choose(logps: jax.Array, keys: jax.Array, step: jax.Array, temperature: float) -> jax.Array:
    """Tokens [B, block] of log-probs [B, block, V]."""
    if temperature == 0:
        return jnp.argmax(logps, axis=-1)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logps.shape[1:], jnp.float32))(keys)
    return jnp.argmax(logps / temperature + noise, axis=-1)


def _share(config: DiffusionConfig, within: jax.Array) -> jax.Array:
    """How many positions the step `within` a block fills; the first steps take the remainder."""
    return config.block // config.steps + (within < config.block % config.steps)
