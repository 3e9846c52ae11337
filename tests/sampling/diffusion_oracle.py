"""The LLaDA network and its sampler once more, in NumPy float64: one row, plain loops, no padding.

Written from the papers' formulas (arXiv 2502.09992, 2505.22618). Caches are taken at their word:
keys and values of positions that a step does not compute are those of the block's first forward.
Below it the tiny models and batches that the tests of diffusion sampling share.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ais_jax.models import LladaConfig, build
from ais_jax.sampling import DiffusionConfig, Policy, SamplingConfig


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Network:
    """A LLaDA model's forward pass for one row without padding."""

    def __init__(self, config: LladaConfig, params):
        self.config = config
        self.params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def logits(self, ids, start=0, cache=None):
        """[n, V] at key positions start.. on; `cache` [layers][2] of [S, K, h] is written to."""
        c, layers = self.config, self.params["layers"]
        x = self.params["embed_tokens"][np.asarray(ids)]
        position = start + np.arange(len(x))
        for i in range(c.n_layers):
            w = {name: value[i] for name, value in layers.items()}
            h = self._norm(x, w["input_layernorm"])
            x = x + self._attention(h, w, position, None if cache is None else cache[i])
            h = self._norm(x, w["post_attention_layernorm"])
            gate = h @ w["gate_proj"]
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up_proj"])) @ w["down_proj"]
        return self._norm(x, self.params["norm"]) @ self.params["lm_head"]

    def empty_cache(self, length):
        c = self.config
        shape = (c.n_layers, 2, length, c.n_kv_heads, c.d_model // c.n_heads)
        return np.full(shape, np.nan)

    def _norm(self, x, weight):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.rms_norm_eps) * weight

    def _attention(self, h, w, position, cache):
        c = self.config
        q, k, v = (
            (h @ w[f"{name}_proj"]).reshape(len(h), heads, -1)
            for name, heads in (("q", c.n_heads), ("k", c.n_kv_heads), ("v", c.n_kv_heads))
        )
        q, k = self._rotate(q, position), self._rotate(k, position)
        if cache is not None:
            cache[0][position], cache[1][position] = k, v
            k, v = cache
        out = np.empty(q.shape)
        for head in range(c.n_heads):
            of = head // (c.n_heads // c.n_kv_heads)
            scores = q[:, head] @ k[:, of].T / math.sqrt(q.shape[-1])
            out[:, head] = np.exp(log_softmax(scores)) @ v[:, of]
        return out.reshape(len(h), -1) @ w["o_proj"]

    def _rotate(self, x, position):
        """Coordinates j and j + h / 2 turn as one complex number."""
        half = x.shape[-1] // 2
        angle = position[:, None] * self.config.rope_theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
        return np.concatenate([z.real, z.imag], axis=-1)


class Sampler:
    """One row's completion, step by step; `noise(step)` gives (Gumbel [L, V], uniform [L])."""

    def __init__(self, network: Network, config: SamplingConfig, prompt, noise):
        self.network, self.config, self.noise = network, config, noise
        self.prompt = [int(x) for x in prompt]
        self.tokens = [config.mask_id] * config.max_new_tokens
        self.step_map = [-1] * config.max_new_tokens
        self.logps = [math.nan] * config.max_new_tokens
        self.forwards = 0
        self.canvases: list[list[int]] = []  # the tokens before each step

    def run(self):
        s = self.config.settings
        for first in range(0, self.config.max_new_tokens, s.block_length):
            block = list(range(first, first + s.block_length))
            size = len(self.prompt) + len(self.tokens)
            caches = None
            if s.cache != "none":
                caches = [self.network.empty_cache(size) for _ in range(2 if s.cfg_scale else 1)]
            i = 0
            while any(self.tokens[k] == self.config.mask_id for k in block):
                self._step(block, i, caches)
                i += 1
        return self

    def _logits(self, block, i, caches):
        """[L, V] of the block, guided."""
        s, ids = self.config.settings, self.prompt + self.tokens
        versions = [ids]
        if s.cfg_scale:
            versions.append([self.config.mask_id] * len(self.prompt) + self.tokens)
        start, end = 0, len(ids)
        if caches is not None and i > 0:
            start = len(self.prompt) + block[0]
            end = start + len(block) if s.cache == "dual" else len(ids)
        found = []
        for n, version in enumerate(versions):
            cache = None if caches is None else caches[n]
            at = len(self.prompt) + block[0] - start
            found.append(
                self.network.logits(version[start:end], start, cache)[at : at + len(block)]
            )
        if not s.cfg_scale:
            return found[0]
        return found[1] + (s.cfg_scale + 1) * (found[0] - found[1])

    def _step(self, block, i, caches):
        c, s = self.config, self.config.settings
        self.canvases.append(list(self.tokens))
        logits = forbid(self._logits(block, i, caches), c)
        law = log_softmax(logits / (c.temperature or 1))
        sure = np.exp(log_softmax(logits))
        gumbel, uniform = self.noise(self.forwards)
        draw = (law if c.temperature == 0 else law + gumbel).argmax(axis=-1)
        masked = [j for j, k in enumerate(block) if self.tokens[k] == c.mask_id]
        key = {
            "low_confidence": lambda j: -sure[j, draw[j]],
            "random": lambda j: -uniform[j],
            "ar": lambda j: j,
        }[s.remasking]
        order = sorted(masked, key=key)
        chosen = order[: self._count([sure[j, draw[j]] for j in order], len(block), i)]
        share = 0.0
        if s.selection:
            share = selection_term(law, sure, draw, chosen, masked) / len(chosen)
        for j in chosen:
            self.tokens[block[j]], self.step_map[block[j]] = int(draw[j]), self.forwards
            self.logps[block[j]] = law[j, draw[j]] + share
        self.forwards += 1

    def _count(self, sure, length, i):
        s = self.config.settings
        if s.schedule == "static":
            blocks = self.config.max_new_tokens // length
            per_block = (s.steps or self.config.max_new_tokens) // blocks
            return length // per_block + (i < length % per_block)
        if s.schedule == "threshold":
            return max(sum(p >= s.threshold for p in sure), 1)
        n = 1
        while n < len(sure) and all(sure[m - 1] >= 1 - s.factor / (m + 1) for m in range(1, n + 2)):
            n += 1
        return n


def selection_term(law, sure, draw, chosen, masked):
    """log of the product over the rest of sum_v p_j(v) [c_j(v) < the least of the chosen]."""
    least = min(sure[j, draw[j]] for j in chosen)
    rest = [j for j in masked if j not in chosen]
    return sum(np.log(np.exp(law[j])[sure[j] < least].sum()) for j in rest)


def forbid(logits, config: SamplingConfig):
    """Logits with -inf at ids that are never sampled."""
    result = np.array(logits, np.float64)
    result[..., config.token_count :] = -np.inf
    result[..., config.mask_id] = -np.inf
    if config.pad_id not in config.eos_ids:
        result[..., config.pad_id] = -np.inf
    return result


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _noise(keys, steps, length, vocab_size):
    def at(key, step):
        draw, order = jax.random.split(jax.random.fold_in(key, step))
        gumbel = jax.random.gumbel(draw, (length, vocab_size), jnp.float32)
        return gumbel, jax.random.uniform(order, (length,))

    return jax.vmap(lambda key: jax.vmap(lambda step: at(key, step))(jnp.arange(steps)))(keys)


def noise_of(keys, config: SamplingConfig, vocab_size: int):
    """What each row's sampler draws at each of its steps: a function of the step for every row."""
    gumbel, uniform = jax.device_get(
        _noise(keys, config.max_new_tokens, config.settings.block_length, vocab_size)
    )
    return [lambda step, b=b: (gumbel[b, step], uniform[b, step]) for b in range(len(keys))]


EOS, PAD, MASK, VOCAB, COUNT, LENGTH = 1, 0, 13, 24, 20, 8
CONFIG = LladaConfig(
    vocab_size=VOCAB,
    d_model=32,
    mlp_hidden_size=48,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    rope_theta=1e4,
    mask_token_id=MASK,
)
MODEL = build(CONFIG, "float32")
SAMPLING = SamplingConfig(
    max_new_tokens=LENGTH,
    temperature=0.9,
    pad_id=PAD,
    eos_ids=(EOS,),
    token_count=COUNT,
    mask_id=MASK,
    diffusion=DiffusionConfig(block_length=4, segments=0),
)


# Compiling takes most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0}


def policy_of(temperature=0.9, **settings) -> Policy:
    """The tiny policy; scoring replays every step unless `settings` say otherwise."""
    diffusion = DiffusionConfig(**{"block_length": 4, "segments": 0, **settings})
    return Policy(
        MODEL, dataclasses.replace(SAMPLING, temperature=temperature, diffusion=diffusion)
    )


@functools.cache
def jitted(policy: Policy):
    """(rollout, score) of a policy, compiled once a session."""
    return tuple(jax.jit(f, compiler_options=QUICK) for f in (policy.rollout, policy.score))


@functools.cache
def params_of(seed=0):
    """Random parameters, larger than at the start of training: choices differ between prompts."""
    params = MODEL.init(jax.random.key(seed))
    layers = jax.tree.map(lambda x: 6 * x if x.ndim == 3 else x, params["layers"])
    return {**params, "layers": layers, "lm_head": 20 * params["lm_head"]}


def batch(rows=8, width=5):
    """(prompts, mask, keys): left-padded prompts of different lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, width + 1, rows)
    mask = np.arange(width)[None] >= width - lengths[:, None]
    words = np.setdiff1d(np.arange(2, COUNT), MASK)
    prompts = np.where(mask, rng.choice(words, (rows, width)), PAD).astype(np.int32)
    return jnp.asarray(prompts), jnp.asarray(mask), jax.random.split(jax.random.key(7), rows)


@functools.cache
def rollout_of(policy: Policy):
    """The policy's rollout of `batch()`."""
    return jitted(policy)[0](params_of(), *batch())


@functools.cache
def reference_of(policy: Policy) -> list[Sampler]:
    """What the rows of `rollout_of` should be."""
    network, (prompts, mask, keys) = Network(CONFIG, params_of()), batch()
    noise = noise_of(keys, policy.sampling, VOCAB)
    return [
        Sampler(network, policy.sampling, p[m], n).run()
        for p, m, n in zip(np.asarray(prompts), np.asarray(mask), noise, strict=True)
    ]


# Every remasking, schedule, guidance and selection; those that scoring can replay.
EXACT = {
    "one_token_a_step": policy_of(),
    "uneven_shares": policy_of(steps=6),
    "guided": policy_of(steps=4, cfg_scale=0.7),
    "random": policy_of(temperature=1.0, remasking="random", steps=4),
    "left_to_right": policy_of(remasking="ar", steps=6),
    "threshold": policy_of(schedule="threshold", threshold=0.3),
    "factor_guided": policy_of(schedule="factor", factor=1.4, cfg_scale=0.5),
    "selection": policy_of(selection=True, steps=6),
    "selection_guided": policy_of(
        temperature=1.3, selection=True, steps=3, block_length=LENGTH, cfg_scale=0.5
    ),
    "blocks_of_one": policy_of(block_length=1),
    "all_at_once": policy_of(block_length=LENGTH, steps=1, temperature=0.5),
}
GREEDY = {
    "greedy": policy_of(temperature=0.0, steps=4),
    "greedy_threshold": policy_of(temperature=0.0, schedule="threshold", threshold=0.5),
}
CACHED = {
    "dual": policy_of(cache="dual"),
    "dual_guided_threshold": policy_of(
        cache="dual", cfg_scale=0.5, schedule="threshold", threshold=0.3
    ),
    "prefix": policy_of(cache="prefix"),
    "prefix_guided": policy_of(cache="prefix", cfg_scale=0.5, steps=6),
}
