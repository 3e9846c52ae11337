"""What decoding keeps of the tokens before, as a tree of arrays whose axes have names.

The names are those of `Model.cache_axes`: "rows", "positions" where there is one entry a token,
and those that mesh.py places. What is done to a cache between decoding steps is done by name, so
nothing here knows an architecture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ais_jax.mesh import is_axes
from ais_jax.quantize import kv_codes
from ais_jax.recipes import KV_FORMATS

NONE = "none"
FORMATS = (NONE, *KV_FORMATS)


class Codes(NamedTuple):
    """Quantized keys or values: values * scale."""

    values: jax.Array  # [..., S, h]
    scale: jax.Array  # [..., S, 1] float32, one a token and head


class KVCache(NamedTuple):
    """Keys and values, [B, K, S, h] each, perhaps stacked over blocks; arrays or `Codes`.

    Heads come before positions: both products of attention then read a row's head in one piece.
    """

    keys: Any
    values: Any


KV_AXES = KVCache(*[("layers", "rows", "kv_heads", "positions", "head")] * 2)


def empty(shape: tuple[int, ...], dtype, kv_format: str) -> KVCache:
    """Zeros; `kv_format` is one of `FORMATS`."""

    def one():
        if kv_format == NONE:
            return jnp.zeros(shape, dtype)
        # Not the codes of zeros, which a compiler would work out one by one.
        scale = jnp.ones((*shape[:-1], 1), jnp.float32)
        return Codes(jnp.zeros(shape, KV_FORMATS[kv_format]), scale)

    return KVCache(one(), one())


def entries(k: jax.Array, v: jax.Array, like: KVCache) -> KVCache:
    """Keys and values [B, T, K, h] of new tokens, in the form of a block's cache."""

    def one(x, held):
        x = x.swapaxes(1, 2)
        if not isinstance(held, Codes):
            return x.astype(held.dtype)
        kv_format = next(name for name, d in KV_FORMATS.items() if d == held.values.dtype.name)
        return Codes(*kv_codes(x, kv_format))

    return KVCache(one(k, like.keys), one(v, like.values))


def map_axes(function: Callable, axes: Any, *caches: Any) -> Any:
    """Applies function(names of an array's axes, *arrays) to all arrays of caches."""

    def one(names, *parts):
        return jax.tree.map(lambda *xs: function(names[len(names) - xs[0].ndim :], *xs), *parts)

    return jax.tree.map(one, axes, *caches, is_leaf=is_axes)


def write(axes: Any, cache: Any, new: Any, index: jax.Array | int) -> Any:
    """The cache with what is new: tokens from position `index` on, and states in full."""

    def one(names, old, new):
        if "positions" not in names:
            return new.astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, new, index, names.index("positions"))

    return map_axes(one, axes, cache, new)


def resize(axes: Any, cache: Any, positions: int) -> Any:
    """The cache with room for more positions."""

    def one(names, x):
        if "positions" not in names:
            return x
        axis = names.index("positions")
        return jnp.pad(x, [(0, positions - n if i == axis else 0) for i, n in enumerate(x.shape)])

    return map_axes(one, axes, cache)


def shift(axes: Any, cache: Any, by: jax.Array) -> Any:
    """The cache with position `by` moved to 0, the others after it; the first go to the end."""

    def one(names, x):
        return jnp.roll(x, -by, names.index("positions")) if "positions" in names else x

    return map_axes(one, axes, cache)


def take_rows(axes: Any, cache: Any, rows: jax.Array) -> Any:
    """The given rows of the cache."""
    return map_axes(lambda names, x: jnp.take(x, rows, axis=names.index("rows")), axes, cache)


def repeat_rows(axes: Any, cache: Any, count: int) -> Any:
    """Each row `count` times, one after the other."""
    return map_axes(lambda names, x: jnp.repeat(x, count, axis=names.index("rows")), axes, cache)


def put_rows(axes: Any, cache: Any, new: Any, rows: jax.Array, position: jax.Array) -> Any:
    """The cache with the rows of another one, whose tokens come to stand from `position` on.

    Args:
      axes: of both.
      cache: with room for them.
      new: as many rows as `rows` has entries.
      rows: [R] int32, where they go; entries beyond the cache are left out.
      position: of the first token.
    """

    def one(names, old, new):
        axis = names.index("rows")
        if "positions" in names:
            wide = jnp.zeros((*old.shape[:axis], len(rows), *old.shape[axis + 1 :]), old.dtype)
            new = jax.lax.dynamic_update_slice_in_dim(wide, new, position, names.index("positions"))
        at: Any = (slice(None),) * axis + (rows,)
        return old.at[at].set(new.astype(old.dtype), mode="drop")

    return map_axes(one, axes, cache, new)
