"""Plans against what the sampler went through, and scores against the float64 network."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_oracle import (
    CONFIG,
    EXACT,
    LENGTH,
    MASK,
    MODEL,
    QUICK,
    SAMPLING,
    Network,
    batch,
    forbid,
    jitted,
    log_softmax,
    params_of,
    reference_of,
    rollout_of,
)

from ais_jax.sampling import DiffusionConfig, Policy, estimators

STATIC = EXACT["uneven_shares"]
THRESHOLD = EXACT["threshold"]


def rescored(policy, **settings):
    """The same sampler with another estimator."""
    diffusion = dataclasses.replace(policy.sampling.settings, **settings)
    return Policy(MODEL, dataclasses.replace(policy.sampling, diffusion=diffusion))


def planned(policy, seed=5, sampled=None):
    """A rollout with the policy's plan; `sampled` by another policy with the same sampler."""
    rollout = rollout_of(sampled or policy)
    return policy.plan(rollout, jax.random.split(jax.random.key(seed), len(rollout.tokens)))


def dense(plan):
    """[B, N, T] weights, and the number of times each token has one."""
    positions, weights = np.asarray(plan.positions), np.asarray(plan.weights)
    total = np.zeros(plan.visible.shape)
    b, n, _ = np.indices(positions.shape)
    np.add.at(total, (b, n, positions), weights)
    return total


def expected_scores(policy, params, rollout):
    """(log-probs, entropy) [B, T] float64: every canvas of the plan, each row without padding."""
    network, config, plan = Network(CONFIG, params), policy.sampling, rollout.plan
    weights, tokens = dense(plan), np.asarray(rollout.tokens)
    logps, entropy = np.zeros(tokens.shape), np.zeros(tokens.shape)
    for b, n in np.ndindex(plan.visible.shape[:2]):
        real = np.asarray(rollout.prompt_mask[b])
        prompt = np.where(plan.prompt_visible[b, n], rollout.prompts[b], MASK)[real]
        canvas = [*prompt, *np.where(plan.visible[b, n], tokens[b], MASK)]
        logits = network.logits(canvas)
        if scale := config.settings.cfg_scale:
            free = network.logits([MASK] * len(prompt) + canvas[len(prompt) :])
            logits = free + (scale + 1) * (logits - free)
        law = log_softmax(forbid(logits[len(prompt) :], config) / (config.temperature or 1))
        logps[b] += weights[b, n] * law[np.arange(LENGTH), tokens[b]]
        with np.errstate(invalid="ignore"):
            entropy[b] -= weights[b, n] * np.nansum(np.exp(law) * law, axis=-1)
    total = weights.sum(axis=1)
    return logps, entropy / np.where(total > 0, total, 1)


@pytest.mark.smoke
@pytest.mark.parametrize("name", EXACT)
def test_replaying_every_step_gives_the_recorded_log_probs(name):
    policy = EXACT[name]
    rollout = planned(policy)
    logps, entropy = jitted(policy)[1](params_of(), rollout)
    assert logps.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logps, rollout.logps, atol=1e-5)
    assert np.asarray(estimators.covered(rollout.plan)).all()


@pytest.mark.parametrize("segments", [0, 1, 3, 5, 99])
@pytest.mark.parametrize("name", ["one_token_a_step", "uneven_shares", "threshold"])
def test_trajectory_plans_are_what_the_sampler_went_through(name, segments):
    policy = rescored(EXACT[name], segments=segments)
    plan, rows = planned(policy, sampled=EXACT[name]).plan, reference_of(EXACT[name])
    settings = policy.sampling.settings
    most = settings.steps_of(LENGTH)
    count = min(segments or most, most)
    visible, weights = np.zeros((2, len(rows), count, LENGTH))
    for b, row in enumerate(rows):
        # Replaying every step takes as many canvases as there may be steps.
        total = most if count == most else row.forwards
        history = np.array([*row.canvases, *[row.tokens] * (1 + most - row.forwards)]) != MASK
        for n in range(count):
            first, last = n * total // count, (n + 1) * total // count
            visible[b, n] = history[first]
            weights[b, n] = history[last] & ~history[first]
    np.testing.assert_array_equal(plan.visible, visible)
    np.testing.assert_array_equal(dense(plan), weights)
    assert (weights.sum(axis=1) == 1).all()
    assert np.asarray(plan.prompt_visible).all()
    if settings.schedule == "static":  # no room for positions that are never scored
        assert plan.positions.shape[-1] == weights.sum(axis=2).max()


def test_selection_scores_the_whole_block_with_the_tokens_of_the_step():
    plan = planned(EXACT["selection"]).plan
    np.testing.assert_array_equal(dense(plan), dense(planned(STATIC).plan))
    blocks = np.repeat([[0, 1, 2, 3], [4, 5, 6, 7]], 3, axis=0)
    np.testing.assert_array_equal(plan.positions, np.broadcast_to(blocks, plan.positions.shape))


def test_left_to_right_plans_show_what_is_left_of_each_token():
    plan = planned(rescored(STATIC, estimator="ar_order"), sampled=STATIC).plan
    shape = (len(plan.visible), LENGTH, LENGTH)
    np.testing.assert_array_equal(plan.visible, np.broadcast_to(np.tri(LENGTH, k=-1), shape))
    np.testing.assert_array_equal(dense(plan), np.broadcast_to(np.eye(LENGTH), shape))
    assert np.asarray(plan.prompt_visible).all()


def test_one_step_plans_mask_the_completion_and_some_of_the_prompt():
    for rate in (0.0, 0.3, 1.0):
        policy = rescored(STATIC, estimator="one_step", prompt_masking=rate)
        prompts, mask, _ = batch(512)
        rollout = rollout_of(STATIC)._replace(
            prompts=prompts, prompt_mask=mask, tokens=jnp.ones((512, LENGTH), jnp.int32)
        )
        plan = policy.plan(rollout, jax.random.split(jax.random.key(0), 512)).plan
        assert not np.asarray(plan.visible).any()
        np.testing.assert_array_equal(dense(plan), np.ones((512, 1, LENGTH)))
        masked = 1 - np.asarray(plan.prompt_visible).mean()
        assert abs(masked - rate) < 5 * math.sqrt(rate * (1 - rate) / 2560) + 1e-9


SUBSETS = {
    "trajectory": rescored(STATIC, canvases=2),
    "threshold": rescored(THRESHOLD, canvases=2, segments=3),
    "left_to_right": rescored(STATIC, canvases=3, estimator="ar_order"),
}


@pytest.mark.parametrize("name", SUBSETS)
def test_a_part_of_the_canvases_is_a_part_of_the_plan(name):
    policy = SUBSETS[name]
    sampled = THRESHOLD if name == "threshold" else STATIC
    rollout = planned(policy, sampled=sampled)
    part, whole = rollout.plan, planned(rescored(policy, canvases=None), sampled=sampled).plan
    count, weights = policy.sampling.settings.canvases, dense(part)
    assert part.visible.shape[1] == part.prompt_visible.shape[1] == count

    def canvases(plan):
        return np.concatenate([plan.visible, dense(plan)], axis=2)

    chosen = []
    for few, every in zip(canvases(part), canvases(whole), strict=True):
        same = (few[:, None] == every[None]).all(axis=2)
        assert same.any(axis=1).all()
        chosen.append(tuple(same.argmax(axis=1)))
        if len(np.unique(every, axis=0)) == len(every):
            assert len(set(chosen[-1])) == count
    assert len(set(chosen)) > 3  # rows choose on their own
    covered = np.asarray(estimators.covered(part))
    np.testing.assert_array_equal(covered, (weights > 0).any(axis=1))
    assert name == "elbo" or not covered.all()
    logps, entropy = jitted(policy)[1](params_of(), rollout)
    assert (np.asarray(logps)[~covered] == 0).all() and (np.asarray(entropy)[~covered] == 0).all()
    expected = expected_scores(policy, params_of(), rollout)
    np.testing.assert_allclose(logps, expected[0], atol=2e-5)
    np.testing.assert_allclose(entropy, expected[1], atol=2e-5)


SCORED: dict[str, tuple[Policy, dict]] = {
    "one_step": (STATIC, {"estimator": "one_step", "prompt_masking": 0.4}),
    "left_to_right": (EXACT["guided"], {"estimator": "ar_order"}),
    "elbo": (STATIC, {"estimator": "elbo", "elbo_samples": 2}),
    "merged": (THRESHOLD, {"segments": 3}),
}


@pytest.mark.parametrize("name", SCORED)
def test_scores_are_those_of_the_network_at_the_planned_canvases(name):
    """For two policies on one plan: the masks are part of the rollout."""
    sampled, settings = SCORED[name]
    policy = rescored(sampled, **settings)
    rollout = planned(policy, sampled=sampled)
    for seed in (0, 1):
        logps, entropy = jitted(policy)[1](params_of(seed), rollout)
        expected = expected_scores(policy, params_of(seed), rollout)
        np.testing.assert_allclose(logps, expected[0], atol=2e-5)
        np.testing.assert_allclose(entropy, expected[1], atol=2e-5)


def test_gradients_do_not_depend_on_the_chunks_that_logits_come_in():
    """Many positions a canvas: merged segments of the threshold schedule."""
    sampled, settings = SCORED["merged"]
    policy = rescored(sampled, **settings)
    rollout = planned(policy, sampled=sampled)

    @functools.partial(jax.jit, static_argnums=0, compiler_options=QUICK)
    def gradient(chunk, params):
        chunked = Policy(MODEL, dataclasses.replace(policy.sampling, score_chunk=chunk))
        return jax.grad(lambda x: sum(y.sum() for y in chunked.score(x, rollout)))(params)

    pairs = zip(
        *(jax.tree.leaves(jax.device_get(gradient(chunk, params_of()))) for chunk in (128, 3)),
        strict=True,
    )
    for whole, chunked in pairs:
        assert np.isfinite(whole).all() and np.abs(whole).max() > 1e-3
        np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("cfg_scale", [0.0, 1.5])
def test_a_vocabulary_in_slices_gives_the_scores_of_a_whole_one(cfg_scale, monkeypatch):
    """Also guided: the slices of two output layers are combined."""
    settings = dataclasses.replace(SAMPLING.settings, estimator="one_step", cfg_scale=cfg_scale)
    policy = Policy(MODEL, dataclasses.replace(SAMPLING, diffusion=settings))
    sampled = rollout_of(STATIC)
    keys = jax.random.split(jax.random.key(3), len(sampled.tokens))
    rollout = policy.plan(sampled, keys)
    whole = policy.score(params_of(), rollout)
    monkeypatch.setattr(estimators.lp, "vocab_chunk", lambda mesh: MODEL.config.vocab_size // 2)
    sliced = policy.score(params_of(), rollout)
    for a, b in zip(sliced, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


T = 4  # of the tests of the bound


def bound_policy(**settings):
    diffusion = DiffusionConfig(block_length=T, estimator="elbo", **settings)
    return Policy(MODEL, dataclasses.replace(SAMPLING, max_new_tokens=T, diffusion=diffusion))


def some_rollout(rows):
    """`rows` times one prompt and completion; nothing of it was sampled."""
    rollout = jax.tree.map(
        lambda x: jnp.tile(x[:1], (rows,) + (1,) * (x.ndim - 1)), rollout_of(STATIC)
    )
    return rollout._replace(tokens=rollout.tokens[:, :T])


def test_random_masks_come_in_complementary_pairs_with_the_right_law():
    rows, samples = 3000, 2
    plan = (
        bound_policy(elbo_samples=samples)
        .plan(some_rollout(rows), jax.random.split(jax.random.key(0), rows))
        .plan
    )
    masked = ~np.asarray(plan.visible).reshape(rows, samples, 2, T)
    weights = dense(plan).reshape(masked.shape)
    np.testing.assert_array_equal(masked[:, :, 0], ~masked[:, :, 1])
    size = masked.sum(axis=3, keepdims=True)
    np.testing.assert_allclose(weights, masked * (T + 1) / (2 * samples * np.maximum(size, 1)))
    assert np.asarray(plan.prompt_visible).all()

    codes = masked[:, :, 0] @ (1 << np.arange(T))
    subsets = [sum(c) for c in itertools.product(*[(0, 1 << k) for k in range(T)])]
    expected = [1 / (T + 1) / math.comb(T, int(x).bit_count()) for x in subsets]
    for sample in range(samples):
        counts = [(codes[:, sample] == x).sum() for x in subsets]
        assert scipy.stats.chisquare(counts, rows * np.array(expected)).pvalue > 1e-4
    same = (codes[:, 0] == codes[:, 1]).mean()  # pairs of a row are drawn independently
    chance = np.square(expected).sum()
    assert abs(same - chance) < 5 * math.sqrt(chance * (1 - chance) / rows)


@pytest.mark.smoke
def test_the_expectation_over_random_masks_is_the_bound():
    """All masks that can be drawn, each with its probability, against E_l (T / l) sum log p."""
    policy, rows = bound_policy(), 400
    rollout = policy.plan(some_rollout(rows), jax.random.split(jax.random.key(1), rows))
    masked = ~np.asarray(rollout.plan.visible)[:, 0]
    _, first = np.unique(masked, axis=0, return_index=True)
    assert len(first) == 2**T
    sizes = masked[first].sum(axis=1)
    probability = np.array([1 / (T + 1) / math.comb(T, n) for n in sizes])
    every = jax.tree.map(lambda x: x[first], rollout)
    logps, _ = jitted(policy)[1](params_of(), every)
    found = probability @ np.asarray(logps, np.float64).sum(axis=1)

    network = Network(CONFIG, params_of())
    prompt = np.asarray(rollout.prompts[0])[np.asarray(rollout.prompt_mask[0])]
    tokens, bound = np.asarray(rollout.tokens[0]), 0.0
    for size in range(1, T + 1):
        for hidden in itertools.combinations(range(T), size):
            canvas = [MASK if k in hidden else t for k, t in enumerate(tokens)]
            logits = network.logits([*prompt, *canvas])[len(prompt) :]
            law = log_softmax(forbid(logits, policy.sampling) / SAMPLING.temperature)
            share = 1 / T / math.comb(T, size)
            bound += share * T / size * sum(law[k, tokens[k]] for k in hidden)
    np.testing.assert_allclose(found, bound, rtol=1e-5)


def test_a_part_of_the_canvases_is_never_empty():
    """Of rows that took few steps most of the canvases have nothing to score."""
    policy = rescored(THRESHOLD, canvases=2)
    sampled = rollout_of(THRESHOLD)
    assert (np.asarray(sampled.forwards) < LENGTH).any()
    for seed in range(8):
        plan = planned(policy, seed, sampled=THRESHOLD).plan
        assert (np.asarray(plan.weights).sum(axis=2) > 0).all()


def test_one_step_masks_do_not_depend_on_padding():
    rollout = rollout_of(STATIC)
    wider = rollout._replace(prompts=jnp.pad(rollout.prompts, ((0, 0), (3, 0))))
    keys = jax.random.split(jax.random.key(1), len(rollout.tokens))
    a, b = (estimators.one_step(r, keys, 0.5).prompt_visible for r in (rollout, wider))
    np.testing.assert_array_equal(a, b[:, :, 3:])
    assert 0 < np.asarray(a).mean() < 1
