"""Layers shared by the architectures: parameters with axis names, norms, rotary, attention.

Letters in shapes: B rows, T query positions, S key positions, D hidden size, H query heads,
K key/value heads, h head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ais_jax.linear import Kernel, join, linear
from ais_jax.models import cache as cache_lib
from ais_jax.models.cache import Codes, KVCache

# A finite stand-in for -inf: a query that sees nothing has numbers all the same.
_UNSEEN = -1e30


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
    # Else XLA:CPU would compute them anew for every head of every layer.
    return jax.lax.optimization_barrier((jnp.cos(angles), jnp.sin(angles)))


def apply_rotary(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, T, heads, h] in float32; the halves of h are the two coordinates."""
    cos, sin = angles
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Masks(NamedTuple):
    """Which keys a query may see."""

    new: jax.Array  # [B, 1, T or 1, T] bool, among the tokens that are computed
    old: jax.Array | None  # [B, 1, 1, S] bool, among those in the cache; None reads none of them


def causal_masks(key_mask: jax.Array, queries: int, cache: Any, index: jax.Array | int) -> Masks:
    """Every query sees the real keys up to its own place.

    Args:
      key_mask: [B, S] bool, real tokens by key position.
      queries: T, of them at key positions index...
      cache: None if there is none.
      index: key position of the first query.
    """
    real = _from(key_mask, queries, index)
    new = (jnp.tril(jnp.ones((queries, queries), bool)) & real[:, None, :])[:, None]
    if not _read(cache, index):
        return Masks(new, None)
    before = jnp.arange(key_mask.shape[1]) < index
    return Masks(new, (key_mask & before)[:, None, None, :])


def padding_masks(key_mask: jax.Array, queries: int, cache: Any, index: jax.Array | int) -> Masks:
    """Every query sees every real key; those that are computed stand for the cached ones."""
    new = _from(key_mask, queries, index)[:, None, None, :]
    if not _read(cache, index) and queries == key_mask.shape[1]:
        return Masks(new, None)
    position = jnp.arange(key_mask.shape[1])
    replaced = (position >= index) & (position < index + queries)
    return Masks(new, (key_mask & ~replaced)[:, None, None, :])


def _from(key_mask: jax.Array, queries: int, index: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(key_mask, index, queries, axis=1)


def _read(cache: Any, index: jax.Array | int) -> bool:
    """Whether there may be something in the cache: an index of 0 that is known is a beginning."""
    return cache is not None and not (isinstance(index, int) and index == 0)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, cache: KVCache | None
) -> tuple[jax.Array, KVCache | None]:
    """Attention over the new keys, and over those of a block's cache.

    Args:
      q: [B, T, H, h].
      k: [B, T, K, h]; K divides H, each key head serves H / K consecutive query heads.
      v: [B, T, K, h].
      masks: what is seen.
      cache: [B, K, S, h] each; read, not written. None for whole sequences.

    Returns:
      ([B, T, H * h], the new keys and values in the form of the cache, or None without one).
    """
    if cache is None:
        out = jax.nn.dot_product_attention(q, k, v, mask=masks.new, scale=q.shape[-1] ** -0.5)
        return out.reshape(*out.shape[:2], -1), None
    new = cache_lib.entries(k, v, like=cache)
    parts = [(new, masks.new)] if masks.old is None else [(cache, masks.old), (new, masks.new)]
    # The cache is written once it has been read, in place.
    return jax.lax.optimization_barrier((_grouped_attention(q, parts), new))


def _grouped_attention(q: jax.Array, parts: list[tuple[KVCache, jax.Array]]) -> jax.Array:
    """One softmax over several stretches of keys, each with its mask; [B, T, H * h].

    The queries of a key head are rows of one product, so keys and values are never repeated.
    """
    rows, length, _, size = q.shape
    groups = _numbers(parts[0][0].keys).shape[1]
    q = q.reshape(rows, length, groups, -1, size).transpose(0, 2, 3, 1, 4)
    shape = q.shape[:-1]  # [B, K, H / K, T]
    q = q.reshape(rows, groups, -1, size)
    # Codes are widened a layer at a time, and not those of all layers before the first.
    q, parts = jax.lax.optimization_barrier((q, parts))

    def scores(keys, mask):
        products = _batched(q, keys, ((3,), (3,)))
        if isinstance(keys, Codes):
            products *= keys.scale.swapaxes(2, 3)
        return jnp.where(mask[:, :, None], products.reshape(*shape, -1) * size**-0.5, _UNSEEN)

    found = [scores(part.keys, mask) for part, mask in parts]
    weights = jax.nn.softmax(jnp.concatenate(found, axis=-1), axis=-1)
    out, start = jnp.float32(0), 0
    for part, _ in parts:
        count = _numbers(part.values).shape[2]
        weight = weights[..., start : start + count].reshape(rows, groups, -1, count)
        if isinstance(part.values, Codes):
            weight = weight * part.values.scale.swapaxes(2, 3)
        out += _batched(weight.astype(q.dtype), part.values, ((3,), (2,)))
        start += count
    out = out.astype(q.dtype).reshape(*shape, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, length, -1)


def _numbers(held: jax.Array | Codes) -> jax.Array:
    return held.values if isinstance(held, Codes) else held


def _batched(x: jax.Array, held: jax.Array | Codes, contract) -> jax.Array:
    """Products a row and key head, float32; codes without their scale."""
    return jax.lax.dot_general(
        x,
        _numbers(held).astype(x.dtype),
        (contract, ((0, 1), (0, 1))),
        preferred_element_type=jnp.float32,
    )


def swiglu(x: jax.Array, gate: Kernel, up: Kernel, down: Kernel) -> jax.Array:
    """(silu(x gate) * (x up)) down."""
    size = down.shape[0]
    opened, risen = products(x, (gate, up), (size, size))
    # Step by step in bfloat16 it is rounded, and on a CPU converted, four times.
    gates = jax.nn.silu(opened.astype(jnp.float32)).astype(x.dtype)
    return linear(gates * risen, down)


def products(x: jax.Array, kernels: Sequence[Kernel], sizes: Sequence[int]) -> list[jax.Array]:
    """x @ w for each of several kernels, one product if `fuse` has put them together.

    Args:
      x: [..., in].
      kernels: [in, out] each; of fused ones the first holds all columns, the others none.
      sizes: their outs.
    """
    if kernels[1].shape[-1]:
        return [linear(x, kernel) for kernel in kernels]
    places = np.cumsum(sizes)[:-1]
    return jnp.split(linear(x, kernels[0]), places, axis=-1)


# Kernels that share their input.
_SHARED_INPUT = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("in_proj_qkv", "in_proj_z"),
)


def fuse(blocks: dict[str, Any]) -> dict[str, Any]:
    """Parameters of blocks with kernels that share their input put together, see `products`.

    The first of them holds all columns and the others, to keep the tree's structure, none. Fewer
    and wider products are faster where each is small.
    """
    fused: dict[str, Any] = {k: fuse(v) if isinstance(v, dict) else v for k, v in blocks.items()}
    for names in _SHARED_INPUT:
        if all(name in fused for name in names):
            whole = join([fused[name] for name in names])
            empty = jnp.zeros((*whole.shape[:-1], 0), jnp.float32)
            fused |= {name: empty for name in names[1:]} | {names[0]: whole}
    return fused


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
