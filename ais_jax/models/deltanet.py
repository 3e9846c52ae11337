"""The gated delta rule: a state that decays, forgets what a key held, and writes anew.

    d_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t)
    S_t = exp(g_t) S_{t-1} + k_t d_t^T
    o_t = S_t^T q_t

(Gated DeltaNet, arXiv 2412.06464.) `recurrent` is this line by line, for decoding; `chunked` gives
the same in matrix products over `CHUNK` positions, for whole sequences. Everything is float32.

Letters in shapes: B rows, T positions, H heads, k and v sizes of a key and a value.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

CHUNK = 64

# Chips that have bfloat16 units would otherwise use them for float32 products.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)


def recurrent(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One position after the other.

    Args:
      q: [B, T, H, k] queries, normed and scaled.
      k: [B, T, H, k] keys, normed.
      v: [B, T, H, v] values.
      g: [B, T, H] logarithm of the decay, at most 0; 0 where nothing is to happen.
      beta: [B, T, H] strength of writing, 0 to 1; 0 where nothing is to happen.
      state: [B, H, k, v] before the first position.

    Returns:
      (outputs [B, T, H, v], state after the last position), float32.
    """

    def step(state, inputs):
        q, k, v, g, beta = inputs
        state = state * jnp.exp(g)[..., None, None]
        delta = beta[..., None] * (v - _einsum("bhkv,bhk->bhv", state, k))
        state = state + k[..., None] * delta[..., None, :]
        return state, _einsum("bhkv,bhk->bhv", state, q)

    inputs = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (q, k, v, g, beta))
    state, out = jax.lax.scan(step, state, inputs)
    return jnp.moveaxis(out, 0, 1), state


def chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same as `recurrent`, `CHUNK` positions at a time.

    Within a chunk the deltas d solve a unit lower-triangular system, since each depends on those
    before it; the state is only read and written between chunks.
    """
    length = q.shape[1]
    q, k, v, g, beta = (_split(x) for x in (q, k, v, g, beta))
    total = jnp.cumsum(g, axis=-1)  # [N, B, H, C]
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    # Masked before exp: above the diagonal the difference is positive and may overflow.
    between = total[..., :, None] - total[..., None, :]
    decay = jnp.where(lower, jnp.exp(jnp.where(lower, between, 0.0)), 0.0)
    weighted = beta[..., None] * k
    system = jnp.tril(_einsum("nbhik,nbhjk->nbhij", weighted, k) * decay, -1)
    right = jnp.concatenate([beta[..., None] * v, weighted * jnp.exp(total)[..., None]], axis=-1)
    solved = jax.lax.linalg.triangular_solve(
        system, right, left_side=True, lower=True, unit_diagonal=True
    )
    fresh, held = jnp.split(solved, [v.shape[-1]], axis=-1)
    scores = _einsum("nbhik,nbhjk->nbhij", q, k) * decay

    def step(state, inputs):
        q, k, fresh, held, scores, total = inputs
        delta = fresh - _einsum("bhik,bhkv->bhiv", held, state)
        out = _einsum("bhik,bhkv->bhiv", q * jnp.exp(total)[..., None], state)
        out = out + _einsum("bhij,bhjv->bhiv", scores, delta)
        last = total[..., -1:]
        keys = k * jnp.exp(last - total)[..., None]
        state = state * jnp.exp(last)[..., None] + _einsum("bhik,bhiv->bhkv", keys, delta)
        return state, out

    state, out = jax.lax.scan(step, state, (q, k, fresh, held, scores, total))
    rows, heads, size = out.shape[1], out.shape[2], out.shape[4]
    out = jnp.transpose(out, (1, 0, 3, 2, 4)).reshape(rows, -1, heads, size)
    return out[:, :length], state


def _split(x: jax.Array) -> jax.Array:
    """[B, T, H, ...] to [N, B, H, C, ...], zeros after the end: they change no state."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % CHUNK)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:])
    return jnp.moveaxis(x, (1, 3), (0, 2))
