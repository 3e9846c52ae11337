"""Log-probs of the distribution that is sampled from, in float32.

Sampler and trainer call these same functions with the same temperature and forbidden ids, so that
a difference between their log-probs is a difference between their policies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

# A finite stand-in for -inf: its probability is 0, and 0 * log-prob stays 0 in the entropy.
_FORBIDDEN = -1e30
_SMALL_VOCABULARY = 1024


def log_probs(logits: jax.Array, temperature: float, allowed: jax.Array) -> jax.Array:
    """Log-softmax [..., V] float32 of logits / temperature over the `allowed` [V] ids."""
    scaled = logits.astype(jnp.float32) / temperature
    return jax.nn.log_softmax(jnp.where(allowed, scaled, _FORBIDDEN), axis=-1)


def sample(logps: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws tokens [B, ...] from log-probs [B, ..., V], each row with its own key [B].

    Returns:
      (tokens, their log-probs). The noise is float32: bfloat16 noise would cut the law's tail off.
    """
    # Of 23 bits a uniform number comes no nearer to 1 than 2^-24, and tokens less probable than
    # that are never drawn. One of them does not matter, those of a large vocabulary add up.
    mode = "high" if logps.shape[-1] > _SMALL_VOCABULARY else "low"
    draw = functools.partial(jax.random.gumbel, shape=logps.shape[1:], dtype=jnp.float32, mode=mode)
    return pick(logps, jnp.argmax(logps + jax.vmap(draw)(keys), axis=-1))


def greedy(logps: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens of log-probs [..., V], and their log-probs."""
    return pick(logps, jnp.argmax(logps, axis=-1))


def pick(logps: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(tokens, log-probs at them), of log-probs [..., V] and tokens [...]."""
    return tokens, jnp.take_along_axis(logps, tokens[..., None], axis=-1)[..., 0]


def token_logps(
    hidden: jax.Array,
    unembed: Callable[[jax.Array], jax.Array],
    tokens: jax.Array,
    *,
    temperature: float,
    allowed: jax.Array,
    chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of given tokens and the policy's entropy, without ever holding [B, T, V].

    Positions are taken `chunk` at a time; the backward pass recomputes each chunk's logits.

    Args:
      hidden: [B, T, D], states that predict `tokens`.
      unembed: hidden states to float32 logits.
      tokens: [B, T] int32.
      temperature: divides the logits.
      allowed: [V] bool.
      chunk: positions at a time.

    Returns:
      (logps, entropy), each [B, T] float32, nats.
    """

    @jax.checkpoint
    def one(inputs):
        h, t = inputs
        logps = log_probs(unembed(h), temperature, allowed)
        return pick(logps, t)[1], -jnp.sum(jnp.exp(logps) * logps, axis=-1)

    rows, length = tokens.shape
    if length <= chunk:
        return one((hidden, tokens))
    pad = -length % chunk
    split = [
        jnp.pad(x, [(0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 2))
        .reshape(rows, -1, chunk, *x.shape[2:])
        .swapaxes(0, 1)
        for x in (hidden, tokens)
    ]
    logps, entropy = (
        x.swapaxes(0, 1).reshape(rows, -1)[:, :length] for x in jax.lax.map(one, tuple(split))
    )
    return logps, entropy
