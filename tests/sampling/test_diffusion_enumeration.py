"""Exact expectations over every trajectory of a tiny model: all orders times all completions.

Three positions, three symbols. A trajectory is the step at which each position was committed and
the token it holds; a rollout is made by hand of each, and its probability is what scoring says.
The reference is the float64 network at all canvases, and its finite differences.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusion_oracle import QUICK, Network, forbid, log_softmax, selection_term

from ais_jax import quantize
from ais_jax.models import LladaConfig, build
from ais_jax.sampling import DiffusionConfig, Policy, Rollout, SamplingConfig

SYMBOLS, LENGTH, MASK, PAD, END = 3, 3, 3, 4, 2
CONFIG = LladaConfig(
    vocab_size=5,
    d_model=16,
    mlp_hidden_size=24,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    rope_theta=1e4,
    mask_token_id=MASK,
)
MODEL = build(CONFIG, "float32")
PROMPT = [0, 2]


def policy_of(temperature=1.3, **settings):
    diffusion = DiffusionConfig(block_length=LENGTH, segments=0, **settings)
    return Policy(
        MODEL,
        SamplingConfig(
            max_new_tokens=LENGTH,
            temperature=temperature,
            pad_id=PAD,
            eos_ids=(END,),
            token_count=SYMBOLS,
            mask_id=MASK,
            diffusion=diffusion,
        ),
    )


SELECTION = policy_of(selection=True)
SELECTION_PAIR = policy_of(selection=True, steps=2)  # two positions at once, then one
WITHOUT = policy_of()
RANDOM = policy_of(remasking="random")
RANDOM_PAIR = policy_of(remasking="random", steps=2)
LEFT_TO_RIGHT = policy_of(remasking="ar")
EXACT = {
    "selection": SELECTION,
    "selection_pair": SELECTION_PAIR,
    "random": RANDOM,
    "random_pair": RANDOM_PAIR,
    "left_to_right": LEFT_TO_RIGHT,
}


@functools.cache
def params_of(recipe="none"):
    """The tiny model, or a quantized copy of it as plain arrays."""
    params = MODEL.init(jax.random.key(1))
    layers = jax.tree.map(lambda x: 12 * x if x.ndim == 3 else x, params["layers"])
    params = {**params, "layers": layers, "lm_head": 20 * params["lm_head"]}
    copy = quantize.quantize(params, recipe, jnp.float32)

    def is_quantized(x):
        return isinstance(x, quantize.QuantArray)

    return jax.tree.map(
        lambda x: x.dequantize() if is_quantized(x) else x, copy, is_leaf=is_quantized
    )


def orders(policy):
    """Every step_map that the policy's remasking can give."""
    s = policy.sampling.settings
    steps = [0, 0, 1] if s.steps == 2 else [0, 1, 2]
    return [(0, 1, 2)] if s.remasking == "ar" else sorted(set(itertools.permutations(steps)))


@functools.cache
def trajectories(policy):
    """[N, T] step maps and [N, T] tokens."""
    pairs = itertools.product(orders(policy), itertools.product(range(SYMBOLS), repeat=LENGTH))
    step_maps, tokens = zip(*pairs, strict=True)
    return np.array(step_maps, np.int32), np.array(tokens, np.int32)


@functools.cache
def rollout_of(policy):
    step_map, tokens = trajectories(policy)
    rows = len(tokens)
    rollout = Rollout(
        prompts=np.tile(np.array(PROMPT, np.int32), (rows, 1)),
        prompt_mask=np.ones((rows, len(PROMPT)), bool),
        tokens=tokens,
        mask=np.ones(tokens.shape, bool),
        logps=np.zeros(tokens.shape, np.float32),
        truncated=np.zeros(rows, bool),
        step_map=step_map,
        forwards=step_map.max(axis=1) + 1,
    )
    return policy.plan(
        jax.tree.map(jnp.asarray, rollout), jax.random.split(jax.random.key(0), rows)
    )


@functools.cache
def scorer(policy):
    """params -> [N, T] log-probs of all trajectories."""
    score = jax.jit(policy.score, compiler_options=QUICK)
    return lambda params: score(params, rollout_of(policy))[0]


def log_probability(policy, params):
    """[N] float64: what scoring says, and of the order where the parameters do not choose it."""
    total = np.asarray(scorer(policy)(params), np.float64).sum(axis=1)
    return total if chooses(policy) else total - math.log(len(orders(policy)))


def chooses(policy):
    return policy.sampling.settings.remasking == "low_confidence"


@functools.cache
def oracle(policy, recipe="none"):
    """[N] float64: the log-probability of each trajectory."""
    return log_probability_float64(policy, params_of(recipe))


def log_probability_float64(policy, params):
    network, settings = Network(CONFIG, params), policy.sampling.settings

    @functools.cache
    def laws(canvas):
        logits = forbid(network.logits([*PROMPT, *canvas])[len(PROMPT) :], policy.sampling)
        law = log_softmax(logits / policy.sampling.temperature)
        return law, np.exp(log_softmax(logits))

    def one(step_map, tokens):
        total = -math.log(1 if chooses(policy) else len(orders(policy)))
        for step in range(max(step_map) + 1):
            canvas = [t if s < step else MASK for s, t in zip(step_map, tokens, strict=True)]
            law, sure = laws(tuple(canvas))
            masked = [k for k in range(LENGTH) if step_map[k] >= step]
            chosen = [k for k in masked if step_map[k] == step]
            total += sum(law[k, tokens[k]] for k in chosen)
            if settings.selection:
                total += selection_term(law, sure, tokens, chosen, masked)
        return total

    with np.errstate(divide="ignore"):
        return np.array([one(*pair) for pair in zip(*trajectories(policy), strict=True)])


RETURNS = 10 * np.random.default_rng(0).normal(size=SYMBOLS**LENGTH)


def returns_of(policy):
    """[N]: a return for each completion, whatever the order."""
    return RETURNS[trajectories(policy)[1] @ SYMBOLS ** np.arange(LENGTH)]


@pytest.mark.smoke
@pytest.mark.parametrize("name", EXACT)
def test_probabilities_of_all_trajectories_sum_to_one(name):
    policy = EXACT[name]
    expected = np.exp(oracle(policy))
    assert abs(expected.sum() - 1) < 1e-12
    found = np.exp(log_probability(policy, params_of()))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert abs(found.sum() - 1) < 1e-6


@pytest.mark.parametrize("name", ["selection", "selection_pair", "random_pair"])
def test_the_sampler_has_the_law_that_scoring_says(name):
    policy, n = EXACT[name], 20_000
    prompts = jnp.tile(jnp.array(PROMPT, jnp.int32), (n, 1))
    keys = jax.random.split(jax.random.key(3), n)
    rollout = jax.jit(policy.rollout, compiler_options=QUICK)(
        params_of(), prompts, jnp.ones(prompts.shape, bool), keys
    )

    def codes(step_map, tokens):
        return np.asarray(step_map) @ [64, 16, 4] * 64 + np.asarray(tokens) @ [16, 4, 1]

    every, seen = codes(*trajectories(policy)), codes(rollout.step_map, rollout.tokens)
    assert np.isin(seen, every).all()
    counts, expected = (seen[:, None] == every).sum(axis=0), n * np.exp(oracle(policy))
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    counts = [*counts[common], counts[~common].sum()]
    expected = [*expected[common], expected[~common].sum() + 1e-9]
    assert len(counts) > 20
    assert scipy.stats.chisquare(counts, expected, sum_check=False).pvalue > 1e-4


def supported(policy):
    """[N] bool: trajectories that the quantized copy can sample."""
    return np.isfinite(oracle(policy, "fp4"))


@pytest.mark.smoke
@pytest.mark.parametrize("name", EXACT)
def test_the_mean_importance_ratio_is_one(name):
    """Less what the copy never samples: a token may be too sure there to lose to another one."""
    policy = EXACT[name]
    kept = supported(policy)
    p, q = (log_probability(policy, params_of(r))[kept] for r in ("none", "fp4"))
    assert np.abs(np.exp(p) - np.exp(q)).sum() > 0.2
    mean = (np.exp(oracle(policy, "fp4"))[kept] * np.exp(p - q)).sum()
    lost = np.exp(oracle(policy))[~kept].sum()
    assert abs(mean - (1 - lost)) < 1e-5
    assert 1e-3 < lost < 2e-3 if name == "selection" else lost == 0


def test_without_the_probability_of_the_choice_the_mean_ratio_is_not_one():
    """Tokens alone are 15 % off here: the parameters that made them sure chose them too."""
    assert not WITHOUT.unbiased
    log_ratio = log_probability(WITHOUT, params_of()) - log_probability(WITHOUT, params_of("fp4"))
    mean = (np.exp(oracle(SELECTION, "fp4")) * np.exp(log_ratio)).sum()
    assert abs(mean - 1.147) < 1e-3


def test_past_the_end_token_the_order_matters():
    """Ratios of the tokens through the first end token alone.

    From left to right whether a token counts is known before it is drawn, so the mean stays 1. In
    another order tokens behind the end are drawn first and lead to it, and their ratio is missing.
    """
    means = {}
    for name in ("left_to_right", "random_pair"):
        policy = EXACT[name]
        ends = trajectories(policy)[1] == END
        mask = np.cumsum(ends, axis=1) - ends == 0
        p, q = (np.asarray(scorer(policy)(params_of(r)), np.float64) for r in ("none", "fp4"))
        ratio = np.exp(((p - q) * mask).sum(axis=1))
        means[name] = (np.exp(oracle(policy, "fp4")) * ratio).sum()
    assert abs(means["left_to_right"] - 1) < 1e-5
    assert 1e-3 < abs(means["random_pair"] - 1) < 0.05, means


@pytest.mark.parametrize("name", ["selection_pair", "random_pair", "left_to_right"])
def test_importance_weighted_gradients_are_the_policy_gradient(name):
    """Sampled by the copy and weighted, against finite differences of the exact mean return."""
    policy, params = EXACT[name], params_of()
    kept, returns = supported(policy), returns_of(policy)
    p, q = (log_probability(policy, params_of(r)) for r in ("none", "fp4"))
    weights = np.exp(oracle(policy, "fp4")) * np.exp(np.where(kept, p - q, 0)) * returns

    def surrogate(params, rollout):
        return jnp.sum(weights * policy.score(params, rollout)[0].sum(axis=1))

    gradient = jax.jit(jax.grad(surrogate), compiler_options=QUICK)(params, rollout_of(policy))
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def mean_return(step):
        moved = jax.tree.map(lambda x, d: x + step * d, wide, direction)
        return (np.exp(log_probability_float64(policy, moved)) * returns)[kept].sum()

    for seed in range(3):
        rng = np.random.default_rng(seed)
        direction = jax.tree.map(lambda x, r=rng: x * r.normal(size=x.shape), wide)
        expected = (mean_return(1e-5) - mean_return(-1e-5)) / 2e-5
        pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        found = sum((np.asarray(g, np.float64) * d).sum() for g, d in pairs)
        assert abs(expected) > 0.01
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
