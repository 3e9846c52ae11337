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
    before it; the state is read and written between chunks alone.
    """
    length = q.shape[1]
    q, k, v, g, beta = (_split(x) for x in (q, k, v, g, beta))
    total = jnp.cumsum(g, axis=-1)  # [N, B, H, C]
    lower = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    # The decay from j to i as the sum over what lies between: a difference of two totals would lose
    # digits where decays are strong.
    strict = jnp.tril(lower, -1)
    between = jnp.cumsum(jnp.where(strict, g[..., :, None], 0.0), axis=-2)
    decay = jnp.where(lower, jnp.exp(between), 0.0)
    weighted = beta[..., None] * k
    system = jnp.tril(_einsum("nbhik,nbhjk->nbhij", weighted, k) * decay, -1)
    right = jnp.concatenate([beta[..., None] * v, weighted * jnp.exp(total)[..., None]], axis=-1)
    solved = _einsum("nbhij,nbhjk->nbhik", _unit_lower_inverse(system), right)
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


def _unit_lower_inverse(strict: jax.Array) -> jax.Array:
    """(I + strict)^-1 of strictly lower triangles [..., C, C], C a power of 2.

    The inverses of diagonal blocks are merged pair by pair. A triangular solve would do the same,
    but in jax 0.10 on a CPU concurrent solves can wait for each other forever; the product of
    (I - L)(I + L^2)(I + L^4)... would be shorter, and loses every digit where keys are alike.
    """
    size = strict.shape[-1]
    inverse = jnp.broadcast_to(jnp.eye(size, dtype=strict.dtype), strict.shape)
    place = jnp.arange(size)
    width = 1
    while width < size:
        block = place // width
        below = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
        part = _einsum("...ij,...jk->...ik", inverse, jnp.where(below, strict, 0.0))
        inverse = inverse - _einsum("...ij,...jk->...ik", part, inverse)
        width *= 2
    return inverse
