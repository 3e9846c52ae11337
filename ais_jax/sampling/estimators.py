"""Log-probs of what a diffusion model sampled: which canvases they are read at, and reading them.

A masked diffusion model gives the probability of a token at a partly masked canvas. An estimator
is a plan: some canvases, and for each the tokens that are scored there. Plans are arrays, drawn
once and stored with the rollout, so every policy is asked at the same canvases. docs/diffusion.md
says which estimator is exact given what.

Letters in shapes: B rows, N canvases, P prompt length, T completion length, S positions scored a
canvas.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ais_jax.models import Model, Params
from ais_jax.sampling import diffusion
from ais_jax.sampling import logps as lp
from ais_jax.sampling.types import Plan, Rollout, SamplingConfig


def draw_plan(rollout: Rollout, keys: jax.Array, config: SamplingConfig) -> Plan:
    """The plan of the estimator that `config.diffusion` names.

    Args:
      rollout: of a diffusion model; `trajectory` reads its step_map and forwards.
      keys: [B] PRNG keys; a row's masks come from its own.
      config: of the sampler.
    """
    settings = config.settings
    keys = jax.vmap(jax.random.split)(keys)
    if settings.estimator == "one_step":
        plan = one_step(rollout, keys[:, 0], settings.prompt_masking)
    elif settings.estimator == "ar_order":
        plan = ar_order(rollout)
    elif settings.estimator == "elbo":
        plan = elbo(rollout, keys[:, 0], settings.elbo_samples)
    else:
        plan = trajectory(rollout, config)
    count = plan.visible.shape[1]
    if settings.canvases is None or settings.canvases >= count:
        return plan
    # A row that took fewer steps than others has canvases at which nothing is scored: those last.
    empty = ~jnp.any(plan.weights != 0, axis=-1)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (count,)))(keys[:, 1])
    order = jnp.argsort(noise + empty, axis=1)[:, : settings.canvases]
    return jax.tree.map(lambda x: jax.vmap(lambda row, i: row[i])(x, order), plan)


def trajectory(rollout: Rollout, config: SamplingConfig) -> Plan:
    """Each token at the canvas at which it was committed, or at the first one of its segment.

    A row's steps are cut into N segments of equal length, `segments` or as many as there are steps;
    the tokens of a segment are scored at the canvas it began with (StepMerge of d2,
    arXiv 2509.21474). With every step a segment of its own the sum over a row is the exact
    log-probability of its tokens, given the order in which positions were committed.
    """
    settings, length = config.settings, config.max_new_tokens
    steps = settings.steps_of(length)
    count = min(settings.segments or steps, steps)
    exact = count == steps
    if settings.schedule == "static":
        total: jax.Array | int = steps
    else:  # a row's own number of steps, of which `steps` is the most
        total = rollout.forwards[:, None] if not exact else steps
    first = jnp.arange(count + 1) * total // count  # [N + 1] or [B, N + 1]
    first = jnp.broadcast_to(first, (rollout.tokens.shape[0], count + 1))[..., None]
    step_map = rollout.step_map[:, None]
    visible = step_map < first[:, :-1]
    scored = (step_map >= first[:, :-1]) & (step_map < first[:, 1:])
    if settings.selection:
        # The others of the block took part in the choice: they are there with weight 0.
        block = jnp.arange(count) // (count * settings.block_length // length)
        positions = block[:, None] * settings.block_length + jnp.arange(settings.block_length)
        positions = jnp.broadcast_to(positions, (len(rollout.tokens), *positions.shape))
        weights = jnp.take_along_axis(scored, positions, axis=2)
    else:
        positions, weights = _gather(scored, _most_scored(config, count))
    return Plan(visible, _whole_prompt(rollout, count), positions, weights.astype(jnp.float32))


def _most_scored(config: SamplingConfig, count: int) -> int:
    """S: the most tokens that one of `count` segments can hold."""
    settings, length = config.settings, config.max_new_tokens
    if settings.schedule != "static":
        return settings.block_length if count == length else length
    steps = settings.steps_of(length)
    committed = np.tile(diffusion.shares(config), length // settings.block_length)
    segment = (np.arange(1, count + 1) * steps // count)[None] <= np.arange(steps)[:, None]
    return int(np.bincount(segment.sum(axis=1), committed).max())


def _gather(scored: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """(positions, whether there is one) [B, N, S], of which [B, N, T] are scored; S is `most`."""
    positions = jnp.argsort(~scored, axis=-1, stable=True)[..., :most]
    return positions.astype(jnp.int32), jnp.take_along_axis(scored, positions, axis=-1)


def one_step(rollout: Rollout, keys: jax.Array, prompt_masking: float) -> Plan:
    """All tokens at the fully masked canvas, prompt tokens masked at random (d1, arXiv 2504.12216).

    Every token on its own, at a canvas that sampling begins with and never sees again: a proxy.
    """
    rows, length = rollout.tokens.shape
    width = rollout.prompts.shape[1]
    # Counted from the right, so that a prompt's masks do not depend on its padding.
    draw = jax.vmap(lambda key: jax.random.uniform(key, (1, width)))(keys)[..., ::-1]
    positions = jnp.broadcast_to(jnp.arange(length), (rows, 1, length))
    return Plan(
        visible=jnp.zeros((rows, 1, length), bool),
        prompt_visible=draw >= prompt_masking,
        positions=positions,
        weights=jnp.ones((rows, 1, length), jnp.float32),
    )


def ar_order(rollout: Rollout) -> Plan:
    """Each token after those to its left, the rest masked: T canvases (JustGRPO).

    The exact log-probability under a sampler that goes from left to right, one token a step.
    """
    rows, length = rollout.tokens.shape
    position = jnp.arange(length)
    visible = jnp.broadcast_to(position < position[:, None], (rows, length, length))
    positions = jnp.broadcast_to(position[:, None], (rows, length, 1))
    weights = jnp.ones(positions.shape, jnp.float32)
    return Plan(visible, _whole_prompt(rollout, length), positions, weights)


def elbo(rollout: Rollout, keys: jax.Array, samples: int) -> Plan:
    """Random masks in complementary pairs, weighted so that a row's sum estimates its ELBO.

    The bound is E over l uniform on 1..T and l random positions masked of (T / l) times the sum of
    their log-probs (LLaDA, arXiv 2502.09992). Here l is uniform on 0..T, l positions are masked at
    one canvas of a pair and the other T - l at the other (coupled, as in ESPO and DiffuCoder); with
    weights (T + 1) / (2 l) the expectation is that bound, and every token is scored once a pair.
    """
    length = rollout.tokens.shape[1]

    def one(key):
        size_key, order_key = jax.random.split(key)
        size = jax.random.randint(size_key, (), 0, length + 1)
        masked = jax.random.permutation(order_key, length) < size
        masked = jnp.stack([masked, ~masked])
        counts = jnp.maximum(jnp.sum(masked, axis=1, keepdims=True), 1)
        return ~masked, masked * (length + 1) / (2 * counts * samples)

    split = jax.vmap(lambda key: jax.random.split(key, samples))(keys)
    visible, weights = jax.vmap(jax.vmap(one))(split)
    shape = (len(rollout.tokens), 2 * samples, length)
    positions = jnp.broadcast_to(jnp.arange(length), shape)
    return Plan(
        visible.reshape(shape),
        _whole_prompt(rollout, 2 * samples),
        positions,
        weights.reshape(shape).astype(jnp.float32),
    )


def covered(plan: Plan) -> jax.Array:
    """[B, T] bool: tokens that the plan scores at all."""
    return _place(plan.weights, plan.positions, plan.visible.shape[-1]) > 0


def score(
    model: Model, params: Params, batch: Rollout, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of a rollout's tokens under its plan and the entropy, [B, T] float32 each.

    One forward a canvas, never through a cache, one after the other; differentiable in `params`,
    with one canvas' activations in memory at a time. Tokens that the plan leaves out have 0.

    A token's value is the sum over canvases of weight times log-prob; with `selection` its share
    of the log-probability that these positions were chosen is added. The entropy is that of the
    law a token was drawn from, averaged with the weights.
    """
    plan = batch.plan
    assert plan is not None
    width, length = batch.prompts.shape[1], batch.tokens.shape[1]
    mask = jnp.pad(batch.prompt_mask, ((0, 0), (0, length)), constant_values=True)

    @jax.checkpoint
    def one(total, canvas: Plan):
        prompts = jnp.where(canvas.prompt_visible, batch.prompts, config.mask_id)
        tokens = jnp.where(canvas.visible, batch.tokens, config.mask_id)
        ids = jnp.concatenate([prompts, tokens], axis=1)
        hidden, _ = diffusion.hidden_states(model, params, ids, mask, config)
        hidden = jnp.take_along_axis(hidden, width + canvas.positions[..., None], axis=1)
        found = _score_positions(model, params, hidden, batch.tokens, canvas, config)
        put = [_place(x * canvas.weights, canvas.positions, length) for x in found]
        return jax.tree.map(jnp.add, total, tuple(put)), None

    zeros = jnp.zeros(batch.tokens.shape, jnp.float32)
    canvases = jax.tree.map(lambda x: x.swapaxes(0, 1), plan)
    (logps, entropy), _ = jax.lax.scan(one, (zeros, zeros), canvases)
    weights = _place(plan.weights, plan.positions, length)
    return logps, entropy / jnp.where(weights > 0, weights, 1)


def _score_positions(model, params, hidden, tokens, canvas: Plan, config: SamplingConfig):
    """(log-probs, entropy) [B, S] at one canvas, of hidden states [B, S, D]."""
    allowed = config.allowed_ids(model.config.vocab_size)

    def unembed(hidden, start=None, size=None):
        return diffusion.logits(model, params, hidden, config, start, size)

    temperature = config.temperature or 1
    tokens = jnp.take_along_axis(tokens, canvas.positions, axis=1)
    logps, entropy = lp.token_logps(
        hidden,
        unembed,
        tokens,
        temperature=temperature,
        allowed=allowed,
        chunk=config.score_chunk,
        vocab_chunk=lp.vocab_chunk(model.mesh),
    )
    if config.settings.selection:
        logits = unembed(hidden)
        law = lp.log_probs(logits, temperature, allowed)
        plain = lp.log_probs(logits, 1, allowed)
        masked = ~jnp.take_along_axis(canvas.visible, canvas.positions, axis=1)
        logps += diffusion.selection_share(law, plain, tokens, canvas.weights > 0, masked)
    return logps, entropy


def _place(values: jax.Array, positions: jax.Array, length: int) -> jax.Array:
    """[B, T]: sums of values [B, ..., S] by their positions."""

    def row(values, positions):
        return jnp.zeros(length, values.dtype).at[positions.ravel()].add(values.ravel())

    return jax.vmap(row)(values, positions)


def _whole_prompt(rollout: Rollout, count: int) -> jax.Array:
    rows, width = rollout.prompts.shape
    return jnp.ones((rows, count, width), bool)
