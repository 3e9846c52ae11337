"""Sampling from a masked diffusion model: block after block, the surest tokens first.

The sampler of LLaDA (arXiv 2502.09992) with the parallel schedules and approximate caches of
Fast-dLLM (arXiv 2505.22618). Letters in shapes: B rows, P prompt length (left-padded), T completion
length, L block length, V vocabulary, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ais_jax.errors import UserError
from ais_jax.models import Model, Params, positions_of
from ais_jax.sampling import logps as lp
from ais_jax.sampling.types import Rollout, SamplingConfig

# The probability that all rivals lose can round to 0; its logarithm must stay a number.
_LEAST = np.float32(2.0**-126)


class _Canvas(NamedTuple):
    """What sampling has come to. A row's own count of steps keeps it independent of the others."""

    ids: jax.Array  # [B, P + T] prompt, committed tokens, mask ids
    step_map: jax.Array  # [B, T]
    logps: jax.Array  # [B, T]
    forwards: jax.Array  # [B]


def rollout(
    model: Model,
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    config: SamplingConfig,
) -> Rollout:
    """Samples one completion a row; `config.diffusion` says how.

    The noise of row b at its step t comes from `fold_in(keys[b], t)` alone, so a row's tokens do
    not depend on the rows beside it. Later blocks stay masked and are attended to, as is whatever
    follows an end token.

    Args:
      model: structure of a bidirectional policy.
      params: its parameters, usually quantized and prepared.
      prompts: [B, P] int32, left-padded; without the mask id (see `check_prompt`).
      prompt_mask: [B, P] bool.
      keys: [B] PRNG keys.
      config: lengths, temperature, ids, schedule.

    Returns:
      `Rollout` without a plan. `logps` are float32 log-probs, under `params`, of each token at the
      canvas at which it was committed, of the distribution it was drawn from; at temperature 0 of
      the distribution at temperature 1. `forwards` [B] counts the steps that a row needed; the
      batch takes as many in each block as its slowest row.

    Raises:
      ValueError: the mask id is no row of the vocabulary.
    """
    width, length = prompts.shape[1], config.max_new_tokens
    settings = config.settings
    mask = jnp.pad(prompt_mask, ((0, 0), (0, length)), constant_values=True)
    empty = jnp.full((prompts.shape[0], length), config.mask_id, jnp.int32)
    canvas = _Canvas(
        ids=jnp.concatenate([prompts.astype(jnp.int32), empty], axis=1),
        step_map=jnp.zeros(empty.shape, jnp.int32),
        logps=jnp.zeros(empty.shape, jnp.float32),
        forwards=jnp.zeros(empty.shape[0], jnp.int32),
    )
    fill = functools.partial(_fill_block, model, params, mask, keys, config)
    blocks = length // settings.block_length
    if settings.cache == "prefix":  # how much is computed again differs between blocks
        for block in range(blocks):
            canvas = fill(block, canvas)
    else:
        canvas = jax.lax.fori_loop(0, blocks, fill, canvas)

    tokens = canvas.ids[:, width:]
    ends = jnp.any(tokens[..., None] == jnp.array(config.eos_ids), axis=-1)
    before = jnp.cumsum(ends, axis=1) - ends
    truncated = ~jnp.any(ends, axis=1)
    return Rollout(
        *(prompts, prompt_mask, tokens, before == 0, canvas.logps, truncated),
        step_map=canvas.step_map,
        forwards=canvas.forwards,
    )


def check_prompt(ids: Any, mask_id: int | None) -> None:
    """Refuses a prompt that holds the mask id.

    Raises:
      UserError: it does.
    """
    if mask_id is not None and mask_id in ids:
        raise UserError(
            f"the prompt holds the mask token (id {mask_id}), which stands for tokens not chosen "
            "yet: remove it"
        )


def hidden_states(
    model: Model,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    config: SamplingConfig,
    cache: Any = None,
    start: jax.Array | int = 0,
) -> tuple[jax.Array, Any]:
    """What `logits` reads, [B, n, D], and the cache; [B, n, 2 D] with guidance.

    Args:
      model: structure.
      params: its parameters.
      ids: [B, n] int32, the canvas from key position `start` on.
      mask: [B, P + T] bool, real tokens among the keys.
      config: of the sampler.
      cache: of the whole canvas, or None; then `ids` are the whole canvas.
      start: key position of the first of the ids.
    """
    count = ids.shape[1]
    positions = jax.lax.dynamic_slice_in_dim(positions_of(mask), start, count, axis=1)
    if not config.settings.cfg_scale:
        return model.hidden(params, ids, positions, mask, cache, start)
    in_prompt = start + jnp.arange(count) < mask.shape[1] - config.max_new_tokens
    without_prompt = jnp.where(in_prompt, config.mask_id, ids)
    ids = jnp.concatenate([ids, without_prompt])
    positions, mask = (jnp.concatenate([x, x]) for x in (positions, mask))
    hidden, cache = model.hidden(params, ids, positions, mask, cache, start)
    return jnp.concatenate(jnp.split(hidden, 2), axis=-1), cache


def logits(
    model: Model,
    params: Params,
    hidden: jax.Array,
    config: SamplingConfig,
    start: jax.Array | int | None = None,
    size: int | None = None,
) -> jax.Array:
    """Logits [..., V] float32 of `hidden_states`, guided away from those without the prompt.

    With `start` and `size` those of `size` ids from `start` on.
    """
    scale = config.settings.cfg_scale
    if not scale:
        return model.unembed(params, hidden, start, size)
    given, free = (model.unembed(params, h, start, size) for h in jnp.split(hidden, 2, axis=-1))
    return free + (scale + 1) * (given - free)


def _fill_block(model, params, mask, keys, config: SamplingConfig, block, canvas: _Canvas):
    """Commits all positions of a block."""
    settings = config.settings
    width, length = mask.shape[1] - config.max_new_tokens, settings.block_length
    start = width + block * length
    blocks = config.max_new_tokens // length
    limit = settings.steps_of(config.max_new_tokens) // blocks
    forward = functools.partial(hidden_states, model, params)

    def commit(i, canvas, hidden):
        return _commit(canvas, logits(model, params, hidden, config), i, start, keys, config)

    def unfinished(state):
        i, canvas, _ = state
        ids = jax.lax.dynamic_slice_in_dim(canvas.ids, start, length, axis=1)
        return (i < limit) & jnp.any(ids == config.mask_id)

    def step(state):
        i, canvas, cache = state
        if cache is None:
            hidden, _ = forward(canvas.ids, mask, config)
            hidden = jax.lax.dynamic_slice_in_dim(hidden, start, length, axis=1)
        else:
            count = length if settings.cache == "dual" else canvas.ids.shape[1] - start
            ids = jax.lax.dynamic_slice_in_dim(canvas.ids, start, count, axis=1)
            hidden, cache = forward(ids, mask, config, cache, start)
            hidden = hidden[:, :length]
        return i + 1, commit(i, canvas, hidden), cache

    state = (jnp.int32(0), canvas, None)
    if settings.cache != "none":  # every block begins with exact keys and values
        rows = canvas.ids.shape[0] * (2 if settings.cfg_scale else 1)
        cache = model.empty_cache(rows, canvas.ids.shape[1], params=params)
        hidden, cache = forward(canvas.ids, mask, config, cache)
        hidden = jax.lax.dynamic_slice_in_dim(hidden, start, length, axis=1)
        state = (jnp.int32(1), commit(jnp.int32(0), canvas, hidden), cache)
    return jax.lax.while_loop(unfinished, step, state)[1]


def _commit(canvas: _Canvas, logits, i, start, keys, config: SamplingConfig) -> _Canvas:
    """Draws a token at each masked position of a block and keeps some; [B, L, V] logits.

    `i` is the step within the block, `start` the block's key position.
    """
    settings, allowed = config.settings, config.allowed_ids(logits.shape[-1])
    width, length = canvas.ids.shape[1] - config.max_new_tokens, logits.shape[1]
    keys = jax.vmap(lambda k, i: jax.random.split(jax.random.fold_in(k, i)))(keys, canvas.forwards)
    law = lp.log_probs(logits, config.temperature or 1, allowed)
    # How sure the model is, whatever the temperature of the draw.
    plain = law if config.temperature in (0, 1) else lp.log_probs(logits, 1, allowed)
    if config.temperature == 0:
        tokens, logps = lp.greedy(law)
    else:
        tokens, logps = lp.sample(law, keys[:, 0])
    ids, step_map, known = (
        jax.lax.dynamic_slice_in_dim(x, at, length, axis=1)
        for x, at in (
            (canvas.ids, start),
            (canvas.step_map, start - width),
            (canvas.logps, start - width),
        )
    )
    masked = ids == config.mask_id
    chosen = _choose(lp.pick(plain, tokens)[1], masked, i, keys[:, 1], config)
    if settings.selection:
        logps += selection_share(law, plain, tokens, chosen, masked)
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
    return _Canvas(
        ids=put(canvas.ids, jnp.where(chosen, tokens.astype(jnp.int32), ids), start),
        step_map=put(
            canvas.step_map, jnp.where(chosen, canvas.forwards[:, None], step_map), start - width
        ),
        logps=put(canvas.logps, jnp.where(chosen, logps, known), start - width),
        forwards=canvas.forwards + jnp.any(masked, axis=1),
    )


def _choose(sure, masked: jax.Array, i, keys, config: SamplingConfig) -> jax.Array:
    """[B, L] bool: which of the `masked` positions are committed.

    `sure` [B, L] are log-probs at temperature 1 of the tokens drawn. Of equals the leftmost is
    first.
    """
    settings = config.settings
    length = sure.shape[1]
    if settings.remasking == "low_confidence":
        order = sure
    elif settings.remasking == "random":
        order = jax.vmap(lambda key: jax.random.uniform(key, (length,)))(keys)
    else:
        order = jnp.broadcast_to(-jnp.arange(length, dtype=jnp.float32), sure.shape)
    order = jnp.where(masked, order, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-order, axis=1), axis=1)  # 0 is the first to be committed
    if settings.schedule == "static":
        count = jnp.asarray(shares(config))[i]
    elif settings.schedule == "threshold":
        count = jnp.sum(jnp.exp(order) >= settings.threshold, axis=1, keepdims=True)
    else:
        probs = jnp.exp(-jnp.sort(-order, axis=1))
        enough = probs >= 1 - settings.factor / (jnp.arange(length) + 2)
        count = jnp.sum(jnp.cumprod(enough, axis=1), axis=1, keepdims=True)
    return masked & (rank < jnp.maximum(count, 1))


def shares(config: SamplingConfig) -> np.ndarray:
    """[steps a block] int: tokens each step of the static schedule commits in a block.

    Equal ones; the first steps take the remainder (the linear schedule of LLaDA).
    """
    settings = config.settings
    blocks = config.max_new_tokens // settings.block_length
    steps = settings.steps_of(config.max_new_tokens) // blocks
    return settings.block_length // steps + (np.arange(steps) < settings.block_length % steps)


def selection_share(
    law: jax.Array, plain: jax.Array, tokens: jax.Array, chosen: jax.Array, masked: jax.Array
) -> jax.Array:
    """Log-probability that the `chosen` were the surest, in equal shares for each of them.

    Every masked position draws a token; with c the confidence of the least sure of the chosen, the
    others j must have drawn tokens v with less: the sum over j of
    log sum_v p_j(v) [confidence of v at j < c]. With the log-probs of the chosen tokens that is
    the exact log-probability of what a step commits. A sum that rounds to 0 counts as 2^-126.

    Args:
      law: [B, L, V] float32, log-probs that tokens are drawn from.
      plain: [B, L, V] float32, log-probs at temperature 1, the confidences.
      tokens: [B, L] int32, at the chosen positions what was committed.
      chosen: [B, L] bool.
      masked: [B, L] bool, positions that drew a token, the chosen among them.

    Returns:
      [B, L] float32, the same at all chosen positions of a row and 0 elsewhere.
    """
    sure = jnp.where(chosen, lp.pick(plain, tokens)[1], jnp.inf)
    least = jnp.min(sure, axis=1)[:, None, None]
    # Of equally sure positions the leftmost is chosen first.
    last = jnp.max(jnp.where(sure == least[..., 0], jnp.arange(sure.shape[1]), -1), axis=1)
    after = jnp.arange(sure.shape[1]) > last[:, None]
    loses = (plain < least) | ((plain == least) & after[..., None])
    lost = jnp.sum(jnp.where(loses, jnp.exp(law), 0.0), axis=-1)
    total = jnp.sum(jnp.where(masked & ~chosen, jnp.log(jnp.maximum(lost, _LEAST)), 0.0), axis=1)
    share = total / jnp.maximum(jnp.sum(chosen, axis=1), 1)
    return jnp.where(chosen, share[:, None], 0.0)
