"""Layers shared by the architectures: parameters with axis names, norms, rotary, attention.

Letters in shapes: B rows, T query positions, S key positions, D hidden size, H query heads,
K key/value heads, h head size.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ais_jax.quantize import linear


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init) -> nnx.Param:
    """A float32 parameter that carries the logical name of each of its axes (see mesh.py)."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def kernel(
    rngs: nnx.Rngs, layers: int, shape: tuple[int, int], axes: tuple[str, str], stddev: float
) -> nnx.Param:
    """Kernels [layers, in, out] of one linear, stacked over the layers that are scanned."""
    init = jax.nn.initializers.normal(stddev)
    return param(rngs, (layers, *shape), ("layers", *axes), init)


def scale(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    """A norm's weight, ones."""
    return param(rngs, shape, axes, jax.nn.initializers.ones)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis: float32 statistics, cast back, then the weight."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weight.astype(x.dtype)


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, h / 2] float32, of positions [B, T]."""
    inverse = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * inverse
    return jnp.cos(angles), jnp.sin(angles)


def apply_rotary(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, heads, h] in float32; the halves of h are the two coordinates."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class KVCache(NamedTuple):
    """Keys and values of all layers, [layers, B, S, K, h], filled from the left."""

    keys: jax.Array
    values: jax.Array


def write_cache(cache: KVCache, k: jax.Array, v: jax.Array, index: jax.Array) -> KVCache:
    """Puts one layer's new keys and values [B, T, K, h] at key position `index`."""
    update = jax.lax.dynamic_update_slice_in_dim
    return KVCache(
        update(cache.keys, k.astype(cache.keys.dtype), index, axis=1),
        update(cache.values, v.astype(cache.values.dtype), index, axis=1),
    )


def causal_mask(key_mask: jax.Array, queries: int, index: jax.Array | int) -> jax.Array:
    """[B, 1, T, S] bool: which keys [B, S] the T queries at key positions index.. may see."""
    query_position = index + jnp.arange(queries)
    key_position = jnp.arange(key_mask.shape[1])
    causal = key_position[None, :] <= query_position[:, None]
    return (causal[None] & key_mask[:, None, :])[:, None]


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down."""
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)
