"""Log-probs of the distribution that is sampled from, in float32.

Sampler and trainer compute them with the same temperature and forbidden ids, so that a difference
between their log-probs is a difference between their policies.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh

from ais_jax.sampling.types import SamplingConfig

# A finite stand-in for -inf: its probability is 0, and 0 * log-prob stays 0 in the entropy.
_FORBIDDEN = -1e30
_SMALL_VOCABULARY = 1024
# Ids that share a first draw. Noise is needed for V / _BLOCK + _BLOCK ids instead of V.
_BLOCK = 128
# Ids whose logits exist at the same time while scoring.
VOCAB_CHUNK = 16_384
_LANES = 128  # slices are a multiple of this, as chips like it


def log_probs(logits: jax.Array, temperature: float, allowed: jax.Array) -> jax.Array:
    """Log-softmax [..., V] float32 of logits / temperature over the `allowed` [V] ids."""
    return jax.nn.log_softmax(_scaled(logits, temperature, allowed), axis=-1)


def _scaled(logits: jax.Array, temperature: float, allowed: jax.Array) -> jax.Array:
    return jnp.where(allowed, logits.astype(jnp.float32) / temperature, _FORBIDDEN)


def next_token(
    logits: jax.Array, keys: jax.Array, config: SamplingConfig, allowed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One step of decoding.

    Args:
      logits: [B, V] float32.
      keys: [B] PRNG keys of this step; a row's token comes from its own alone.
      config: temperature and truncation. Temperature 0 takes the most probable token, whatever the
        truncation.
      allowed: [V] bool.

    Returns:
      (tokens int32, log-probs float32), [B] each. The log-probs are those of the distribution that
      was drawn from, truncated and renormalised; of temperature 0 those at temperature 1.
    """
    if config.temperature == 0:
        scaled = _scaled(logits, 1.0, allowed)
        peak = jnp.max(scaled, axis=-1, keepdims=True)
        return _argmax(scaled), -jnp.log(jnp.sum(jnp.exp(scaled - peak), axis=-1))
    if not config.truncated:
        return draw(logits, keys, config.temperature, allowed)
    logps = log_probs(logits, config.temperature, allowed)
    return sample(truncate(logps, config.top_k, config.top_p, config.min_p), keys)


def draw(
    logits: jax.Array, keys: jax.Array, temperature: float, allowed: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`sample` of `log_probs`, without log-probs of tokens that are not drawn.

    Args:
      logits: [B, V].
      keys: [B] PRNG keys, one a row.
      temperature: above 0.
      allowed: [V] bool.

    Returns:
      (tokens int32, log-probs float32), [B] each.
    """
    if logits.shape[-1] <= _SMALL_VOCABULARY:
        return sample(log_probs(logits, temperature, allowed), keys)
    scaled = _scaled(logits, temperature, allowed)
    peak = jnp.max(scaled, axis=-1)
    tokens, chosen, total = _two_draws(scaled, peak, keys)
    return tokens, chosen - peak - jnp.log(total)


def sample(logps: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws tokens [B, ...] int32 from log-probs [B, ..., V], each row with its own key [B].

    Returns:
      (tokens, their log-probs). The noise is float32: bfloat16 noise would cut the law's tail off.
    """
    if logps.shape[-1] <= _SMALL_VOCABULARY:
        return pick(logps, jnp.argmax(logps + _gumbel(keys, logps.shape, "low"), axis=-1))
    return _two_draws(logps, jnp.zeros(logps.shape[:-1]), keys)[:2]


def _two_draws(scores, peak, keys):
    """Draws a block of ids, then one of its ids; the law is that of softmax(scores).

    `scores` [B, ..., V] are logits of any offset, `peak` [B, ...] about their maximum. Returns the
    tokens, their scores, and the sum of exp(scores - peak), [B, ...] each.
    """
    pad = [(0, 0)] * (scores.ndim - 1) + [(0, -scores.shape[-1] % _BLOCK)]
    blocks = jnp.pad(scores, pad, constant_values=_FORBIDDEN)
    blocks = blocks.reshape(*scores.shape[:-1], -1, _BLOCK)
    masses = jnp.sum(jnp.exp(blocks - peak[..., None, None]), axis=-1)
    keys = jax.vmap(jax.random.split)(keys)
    # Of 23 bits a uniform number comes no nearer to 1 than 2^-24, and what is less probable than
    # that is never drawn. One token does not matter, those of a large vocabulary add up.
    block = _argmax(jnp.log(masses) + _gumbel(keys[:, 0], masses.shape, "high"))
    within = jnp.take_along_axis(blocks, block[..., None, None], axis=-2)[..., 0, :]
    token = _argmax(within + _gumbel(keys[:, 1], within.shape, "high"))
    chosen = jnp.take_along_axis(within, token[..., None], axis=-1)[..., 0]
    return block * _BLOCK + token, chosen, jnp.sum(masses, axis=-1)


def _gumbel(keys: jax.Array, shape: tuple[int, ...], mode: str) -> jax.Array:
    """Noise of `shape` [B, ...], each row from its own key alone."""
    noise = functools.partial(jax.random.gumbel, shape=shape[1:], dtype=jnp.float32, mode=mode)
    return jax.vmap(noise)(keys)


def _argmax(x: jax.Array) -> jax.Array:
    """argmax over the last axis, int32. XLA's own is three times slower on a CPU."""
    last = x.shape[-1] - 1
    ids = jnp.arange(last + 1, dtype=jnp.int32)
    return jnp.min(jnp.where(x == jnp.max(x, axis=-1, keepdims=True), ids, last), axis=-1)


def greedy(logps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens of log-probs [..., V], and their log-probs."""
    return pick(logps, jnp.argmax(logps, axis=-1))


def pick(logps: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens, log-probs at them), of log-probs [..., V] and tokens [...]."""
    return tokens, jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]


def truncate(logps: jax.Array, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> jax.Array:
    """Log-probs [..., V] of the most probable tokens alone, renormalised.

    For evaluation: a policy that is trained is sampled whole, or every ratio is biased.

    First the `top_k` most probable stay (0 keeps all), then of those the fewest whose share of
    their probability reaches `top_p`, then those at least `min_p` times as probable as the most
    probable one, which always stays. Tokens as probable as the last one kept stay too. The order
    is that of transformers.
    """
    kept = logps
    if top_k:
        best = jax.lax.top_k(logps, min(top_k, logps.shape[-1]))[0]
        # Not best[..., -1:], which XLA would take from a sort of all of them.
        kept = jnp.where(logps >= jnp.min(best, axis=-1, keepdims=True), logps, _FORBIDDEN)
    if top_p < 1:
        probs = jax.nn.softmax(kept, axis=-1)
        kept = jnp.where(probs >= _least_kept(probs, top_p), kept, _FORBIDDEN)
    if min_p:
        peak = jnp.max(kept, axis=-1, keepdims=True)
        kept = jnp.where(kept >= peak + jnp.log(min_p), kept, _FORBIDDEN)
    return jax.nn.log_softmax(kept, axis=-1)


def _least_kept(probs: jax.Array, top_p: float) -> jax.Array:
    """[..., 1]: the largest number such that what is at least as probable sums to `top_p`.

    Halves the interval between bit patterns, which are ordered as the numbers are: sorting a large
    vocabulary takes a CPU longer than a forward pass.
    """

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        bar = jax.lax.bitcast_convert_type(middle, jnp.float32)
        mass = jnp.sum(jnp.where(probs >= bar, probs, 0.0), axis=-1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    above = jax.lax.bitcast_convert_type(jnp.max(probs, axis=-1, keepdims=True), jnp.int32) + 1
    # 1.0 and what is below it are fewer than 2^30 patterns.
    low, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(above), above))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def vocab_chunk(mesh: Mesh | None) -> int:
    """Ids whose logits exist at the same time: `VOCAB_CHUNK`, or the share of a device.

    An output layer that is split over `tensor` is not sliced: every slice would have to be gathered
    from the devices that hold its parts, and would be multiplied by all of them.
    """
    split = mesh is not None and mesh.shape["tensor"] > 1
    return sys.maxsize if split else VOCAB_CHUNK


def token_logps(
    hidden: jax.Array,
    unembed: Callable[..., jax.Array],
    tokens: jax.Array,
    *,
    temperature: float,
    allowed: jax.Array,
    chunk: int,
    vocab_chunk: int = VOCAB_CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of given tokens and the policy's entropy, without ever holding [B, T, V].

    Logits exist for `chunk` positions and `vocab_chunk` ids at a time; the backward pass computes
    them again.

    Args:
      hidden: [B, T, D], states that predict `tokens`.
      unembed: `unembed(hidden)` gives float32 logits of all ids, `unembed(hidden, start, size)`
        those of `size` ids (static) from `start` on, differentiable in hidden states and in what
        it closes over. A weight whose slice along the vocabulary is the first thing that is done
        with it has its gradient written slice by slice into one array.
      tokens: [B, T] int32.
      temperature: divides the logits.
      allowed: [V] bool.
      chunk: positions at a time.
      vocab_chunk: ids at a time, at most.

    Returns:
      (logps, entropy), each [B, T] float32, nats.
    """
    whole = allowed.shape[0] <= vocab_chunk

    @jax.checkpoint
    def one(inputs):
        h, t = inputs
        logps = log_probs(unembed(h), temperature, allowed)
        return pick(logps, t)[1], -jnp.sum(jnp.exp(logps) * logps, axis=-1)

    rows, length = tokens.shape
    if whole and length <= chunk:
        return one((hidden, tokens))
    chunk = min(chunk, length)
    pad = -length % chunk
    split = tuple(
        jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        .reshape(rows, -1, chunk, *x.shape[2:])
        .swapaxes(0, 1)
        for x in (hidden, tokens)
    )
    if whole:
        found = jax.lax.map(one, split)
    else:
        found = _sliced(unembed, split[0], split[1], temperature, allowed, vocab_chunk)
    logps, entropy = (x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in found)
    return logps, entropy


@dataclasses.dataclass(frozen=True)
class _Slices:
    """How the vocabulary is cut. `program` is the jaxpr of (hidden, start) -> logits of a slice."""

    program: Any
    temperature: float
    vocab: int
    size: int

    @property
    def firsts(self) -> jax.Array:
        """The first id of each slice."""
        return jnp.arange(-(-self.vocab // self.size), dtype=jnp.int32) * self.size

    def scores(self, hidden, tokens, weights, allowed, first):
        """Scaled logits [B, c, size] of a slice; place of the tokens in it, and if they are there.

        The last slice ends with the vocabulary: what the one before has had of it is forbidden.
        """
        start = jnp.minimum(first, self.vocab - self.size)
        logits = jax.core.eval_jaxpr(self.program, weights, hidden, start)[0]
        real = jax.lax.dynamic_slice_in_dim(allowed, start, self.size)
        real &= start + jnp.arange(self.size) >= first
        place = tokens - start
        there = (tokens >= first) & (place < self.size)
        return _scaled(logits, self.temperature, real), place, there


def _sliced(unembed, hidden, tokens, temperature, allowed, most):
    """`token_logps` of chunks of positions, hidden [n, B, c, D], a slice of ids at a time."""
    vocab = allowed.shape[0]
    even = -(-vocab // -(-vocab // most))
    size = min(most, even + -even % _LANES)
    # What `unembed` closes over has to be an argument of what has a gradient of its own.
    program = jax.make_jaxpr(lambda h, start: unembed(h, start, size))(hidden[0], jnp.int32(0))
    slices = _Slices(program.jaxpr, temperature, vocab, size)
    run = jax.custom_vjp(lambda *args: _forward(slices, *args)[:2])
    run.defvjp(
        functools.partial(_save, slices), functools.partial(_backward, slices), symbolic_zeros=True
    )
    return run(hidden, tuple(program.consts), tokens, allowed)


def _forward(slices: _Slices, hidden, weights, tokens, allowed):
    """(logps, entropy, peak, log of the sum of exp(scores - peak)), [n, B, c] each."""

    def one_chunk(first, inputs):
        h, t, (peak, total, moment, chosen) = inputs
        scores, place, there = slices.scores(h, t, weights, allowed, first)
        higher = jnp.maximum(peak, jnp.max(scores, axis=-1))
        rest = scores - higher[..., None]
        terms, keep, fall = jnp.exp(rest), jnp.exp(peak - higher), peak - higher
        moment = keep * (moment + fall * total) + jnp.sum(terms * rest, axis=-1)
        total = keep * total + jnp.sum(terms, axis=-1)
        here = pick(scores, jnp.clip(place, 0, slices.size - 1))[1]
        return first, (higher, total, moment, jnp.where(there, here, chosen))

    def one_slice(sums, first):
        return jax.lax.scan(one_chunk, first, (hidden, tokens, sums))[1], None

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    sums = (zeros + _FORBIDDEN, zeros, zeros, zeros)
    (peak, total, moment, chosen), _ = jax.lax.scan(one_slice, sums, slices.firsts)
    return chosen - peak - jnp.log(total), jnp.log(total) - moment / total, peak, jnp.log(total)


def _save(slices: _Slices, *primals):
    """The forward pass, with what the backward pass needs; weights with a gradient stand apart."""
    hidden, weights, tokens, allowed = jax.tree.map(lambda x: x.value, primals)
    logps, entropy, *norm = _forward(slices, hidden, weights, tokens, allowed)
    trained = tuple(x.value if x.perturbed else None for x in primals[1])
    fixed = tuple(None if x.perturbed else x.value for x in primals[1])
    return (logps, entropy), (hidden, trained, fixed, tokens, allowed, entropy, norm)


def _backward(slices: _Slices, saved, cotangents):
    """Gradients of hidden states and weights, those of the weights added up in place.

    Of a score x with probability p, and H the entropy: d log p_t / dx = [x is t's] - p and
    dH / dx = -p (log p + H).
    """
    hidden, trained, fixed, tokens, allowed, entropy, (peak, log_total) = saved
    cotangents = tuple(
        jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x for x in cotangents
    )
    sums = jax.tree.map(lambda x: jax.new_ref(jnp.zeros_like(x)), trained)

    def one_chunk(first, inputs):
        h, t, (peak, log_total, entropy, of_logp, of_entropy), dh = inputs

        def scores_of(h, trained):
            weights = [y if x is None else x for x, y in zip(trained, fixed, strict=True)]
            scores, *rest = slices.scores(h, t, weights, allowed, first)
            return scores, rest

        pullback: Any  # jax's annotation says a plain function
        scores, pullback, (place, there) = jax.vjp(scores_of, h, trained, has_aux=True)
        logps = scores - peak[..., None] - log_total[..., None]
        slope = (of_logp + of_entropy * entropy)[..., None] + of_entropy[..., None] * logps
        is_token = (jnp.arange(slices.size) == place[..., None]) & there[..., None]
        grad = jnp.where(is_token, of_logp[..., None], 0.0) - jnp.exp(logps) * slope
        part = jax.new_ref(jnp.zeros_like(h))
        pullback.with_refs(part, sums)(grad)
        return first, dh + part[...].astype(jnp.float32)

    def one_slice(dh, first):
        rows = (peak, log_total, entropy, *cotangents)
        return jax.lax.scan(one_chunk, first, (hidden, tokens, rows, dh))[1], None

    start = jnp.zeros(hidden.shape, jnp.float32)
    dh, _ = jax.lax.scan(one_slice, start, slices.firsts)
    return dh.astype(hidden.dtype), jax.tree.map(lambda x: x[...], sums), None, None
