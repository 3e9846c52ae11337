"""Layers shared by the architectures: parameters with axis names, norms, rotary, attention.

Letters in shapes: B rows, T query positions, S key positions, D hidden size, H query heads,
K key/value heads, h head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ais_jax.linear import linear


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], init) -> nnx.Param:
    """A float32 parameter that carries the logical name of each of its axes (see mesh.py)."""
    return nnx.Param(init(rngs.params(), shape, jnp.float32), axes=axes)


def kernel(
    rngs: nnx.Rngs,
    stack: tuple[int, ...],
    shape: tuple[int, int],
    axes: tuple[str, str],
    stddev: float = 0.02,
) -> nnx.Param:
    """Kernels [*stack, in, out] of one linear, stacked over the layers that are scanned."""
    init = jax.nn.initializers.normal(stddev)
    return param(rngs, (*stack, *shape), ("layers",) * len(stack) + axes, init)


def scale(
    rngs: nnx.Rngs, stack: tuple[int, ...], size: int, init=jax.nn.initializers.ones
) -> nnx.Param:
    """A norm's weights [*stack, size]: ones, or zeros where the norm multiplies by 1 + weight."""
    return param(rngs, (*stack, size), ("layers",) * len(stack) + ("norm",), init)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * weight over the last axis: float32 statistics, cast back, then the weight."""
    return _over_rms(x, eps).astype(x.dtype) * weight.astype(x.dtype)


def rms_norm_zero_centred(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * (1 + weight) over the last axis, in float32; cast back at the end."""
    return (_over_rms(x, eps) * (1 + weight.astype(jnp.float32))).astype(x.dtype)


def _over_rms(x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    return x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)


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


def write_cache(cache: KVCache, k: jax.Array, v: jax.Array, index: jax.Array | int) -> KVCache:
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


def padding_mask(key_mask: jax.Array) -> jax.Array:
    """[B, 1, 1, S] bool: every query may see every real key [B, S]."""
    return key_mask[:, None, None, :]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    cache: KVCache | None,
    index: jax.Array | int,
) -> tuple[jax.Array, KVCache | None]:
    """Attention over the new keys, or over a layer's cache with the new ones put at `index`.

    Args:
      q: [B, T, H, h].
      k: [B, T, K, h]; K divides H, each key head serves H / K consecutive query heads.
      v: [B, T, K, h].
      mask: [B, 1, T or 1, S] bool; S is T, or the cache's length.
      cache: [B, S, K, h] each, or None.
      index: where the new keys begin in the cache.

    Returns:
      ([B, T, H * h], the new cache or None).
    """
    if cache is not None:
        cache = write_cache(cache, k, v, index)
        k, v = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=q.shape[-1] ** -0.5)
    return out.reshape(*out.shape[:2], -1), cache


def swiglu(x: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array) -> jax.Array:
    """(silu(x gate) * (x up)) down."""
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)


class LanguageModel(nnx.Module):
    """Embedding, blocks, final norm and output layer; an architecture adds `hidden`."""

    def __init__(
        self,
        config,
        blocks: Callable[..., nnx.Module],
        *,
        rngs: nnx.Rngs,
        norm_init=jax.nn.initializers.ones,
    ):
        self.config = config
        init = jax.nn.initializers.normal(0.02)
        shape, axes = (config.vocab_size, config.hidden_size), ("vocab", "embed")
        self.embed_tokens = param(rngs, shape, axes, init)
        self.layers = blocks(config, rngs=rngs)
        self.norm = scale(rngs, (), config.hidden_size, norm_init)
        if not config.tie_word_embeddings:
            self.lm_head = param(rngs, shape[::-1], axes[::-1], init)

    def embed(self, tokens: jax.Array, dtype) -> jax.Array:
        """[B, T, D] in `dtype`, of tokens [B, T]."""
        return self.embed_tokens.get_value()[tokens].astype(dtype)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        if self.config.tie_word_embeddings:
            weights = self.embed_tokens.get_value().T
        else:
            weights = self.lm_head.get_value()
        return jnp.matmul(hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)


def call_block(
    block: nnx.Module, call: Callable, x: jax.Array, cache: Any, remat: bool
) -> tuple[jax.Array, Any]:
    """call(block, x, cache), recomputed in the backward pass if `remat`."""
    run, params = _with_params(block, call, remat)
    return run(x, (params, cache))


def scan_blocks(
    blocks: nnx.Module, call: Callable, x: jax.Array, cache: Any, remat: bool
) -> tuple[jax.Array, Any]:
    """Applies stacked blocks one after the other.

    Args:
      blocks: parameters and caches have the scanned axis first.
      call: (one block, x, its cache) -> (x, its new cache).
      x: [B, T, D].
      cache: of all blocks, or None.
      remat: recompute each block in the backward pass.

    Returns:
      (x, the new cache of all blocks).
    """
    run, stacked = _with_params(blocks, call, remat)
    return jax.lax.scan(run, x, (stacked, cache))


def _with_params(block: nnx.Module, call: Callable, remat: bool) -> tuple[Callable, Any]:
    """(x, (parameters, cache)) -> call(block, x, cache) as a function, and the parameters."""
    graphdef, params = nnx.split(block)

    def run(x, inputs):
        params, cache = inputs
        return call(nnx.merge(graphdef, params), x, cache)

    return jax.checkpoint(run) if remat else run, params
