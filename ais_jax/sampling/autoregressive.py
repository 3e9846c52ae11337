"""Autoregressive sampling with a KV cache, and scoring of what was sampled.

Letters in shapes: B rows, P prompt length (left-padded), T completion length, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ais_jax.models import Model, Params, positions_of
from ais_jax.sampling import logps as lp
from ais_jax.sampling.types import Rollout, SamplingConfig


class _Loop(NamedTuple):
    """What the decode loop carries: everything about the `step` tokens sampled so far."""

    step: jax.Array  # []
    last: jax.Array  # [B] the newest token
    tokens: jax.Array  # [B, T]
    logps: jax.Array  # [B, T]
    mask: jax.Array  # [B, T]
    done: jax.Array  # [B] has sampled an end token
    cache: Any


def rollout(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    config: SamplingConfig,
) -> Rollout:
    """Samples one completion a row: prefill, then one decode loop that ends when all rows have.

    The noise of row b at step t comes from `fold_in(keys[b], t)` alone, so a row's tokens do not
    depend on the rows beside it.

    Args:
      model: structure of the policy; its dtype is that of activations and cache.
      params: the policy's parameters, usually quantized and prepared.
      prompts: [B, P] int32, left-padded.
      prompt_mask: [B, P] bool.
      keys: [B] PRNG keys.
      config: lengths, temperature, ids.

    Returns:
      `Rollout`; `logps` are float32 log-probs under `params` of the distribution sampled from.
    """
    rows, width = prompts.shape
    allowed = config.allowed_ids(model.config.vocab_size)
    cache = model.empty_cache(rows, width + config.max_new_tokens)
    slots = jnp.ones((rows, config.max_new_tokens), bool)
    key_mask = jnp.concatenate([prompt_mask, slots], axis=1)
    lengths = jnp.sum(prompt_mask, axis=1, dtype=jnp.int32)

    def draw(hidden, step):
        logps = lp.log_probs(model.unembed(params, hidden[:, -1]), config.temperature or 1, allowed)
        if config.temperature == 0:
            return lp.greedy(logps)
        return lp.sample(logps, jax.vmap(functools.partial(jax.random.fold_in, data=step))(keys))

    def decode(state: _Loop) -> _Loop:
        positions = lengths + state.step - 1
        hidden, cache = model.hidden(
            params,
            state.last[:, None],
            positions[:, None],
            key_mask,
            state.cache,
            width + state.step - 1,
        )
        token, logp = draw(hidden, state.step)
        return _append(state._replace(cache=cache), token, logp, config)

    hidden, filled = model.hidden(params, prompts, positions_of(prompt_mask), key_mask, cache, 0)
    zeros = jnp.zeros((rows, config.max_new_tokens))
    state = _Loop(
        step=jnp.zeros((), jnp.int32),
        last=jnp.full(rows, config.pad_id, jnp.int32),
        tokens=jnp.full(zeros.shape, config.pad_id, jnp.int32),
        logps=zeros,
        mask=zeros.astype(bool),
        done=jnp.zeros(rows, bool),
        cache=filled,
    )
    token, logp = draw(hidden, 0)
    state = _append(state, token, logp, config)
    state = jax.lax.while_loop(
        lambda s: (s.step < config.max_new_tokens) & ~jnp.all(s.done), decode, state
    )
    return Rollout(prompts, prompt_mask, state.tokens, state.mask, state.logps, ~state.done)


def _append(state: _Loop, token: jax.Array, logp: jax.Array, config: SamplingConfig) -> _Loop:
    """Records one token a row; rows that are done get padding."""
    live = ~state.done
    token = jnp.where(live, token.astype(jnp.int32), config.pad_id)
    ended = jnp.any(token[:, None] == jnp.array(config.eos_ids), axis=1)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
    return state._replace(
        step=state.step + 1,
        last=token,
        tokens=put(state.tokens, token[:, None]),
        logps=put(state.logps, jnp.where(live, logp, 0.0)[:, None]),
        mask=put(state.mask, live[:, None]),
        done=state.done | (live & ended),
    )


def score(
    model: Model, params: Params, batch: Rollout, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of a rollout's tokens and the entropy under `params`, [B, T] float32 each.

    One forward over prompt and completion; differentiable in `params`. Values at positions where
    `batch.mask` is 0 are finite and meaningless.
    """
    tokens = jnp.concatenate([batch.prompts, batch.tokens], axis=1)
    mask = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)
    # Nothing follows the last token: it is predicted, never read.
    hidden, _ = model.hidden(params, tokens[:, :-1], positions_of(mask[:, :-1]), mask[:, :-1])
    return lp.token_logps(
        hidden[:, batch.prompts.shape[1] - 1 :],
        functools.partial(model.unembed, params),
        batch.tokens,
        temperature=config.temperature or 1,
        allowed=config.allowed_ids(model.config.vocab_size),
        chunk=config.score_chunk,
    )
