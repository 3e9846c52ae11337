"""Statistics over the valid entries of an array.

The mask is applied to the values *before* any arithmetic, so that NaN or inf at a masked
entry reaches neither a value nor a gradient. An empty mask gives 0, never NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def select(x: jax.Array, mask: jax.Array) -> jax.Array:
    """`x` where `mask` is true, 0 elsewhere. Shapes broadcast."""
    return jnp.where(mask, x, jnp.zeros((), x.dtype))


def count(mask: jax.Array, axis: Axis = None, dtype=jnp.float32) -> jax.Array:
    """Number of true entries along `axis`, as a float."""
    return jnp.sum(mask, axis=axis, dtype=dtype)


def sum(x: jax.Array, mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """Sum of the valid entries of `x` along `axis`."""
    return jnp.sum(select(x, mask), axis=axis, keepdims=keepdims)


def mean(x: jax.Array, mask: jax.Array, axis: Axis = None, keepdims: bool = False) -> jax.Array:
    """Mean of the valid entries of `x` along `axis`; 0 where there are none."""
    total = sum(x, mask, axis=axis, keepdims=keepdims)
    n = jnp.sum(jnp.broadcast_to(mask, x.shape), axis=axis, keepdims=keepdims, dtype=x.dtype)
    return total / jnp.maximum(n, 1)


def max(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Largest valid entry of `x`; 0 where there is none."""
    return jnp.where(jnp.any(mask), jnp.max(jnp.where(mask, x, -jnp.inf)), 0).astype(x.dtype)


def quantile(x: jax.Array, mask: jax.Array, q: float) -> jax.Array:
    """The `q`-quantile of the valid entries, by linear interpolation; 0 where there are none."""
    values = jnp.sort(jnp.where(mask, x, jnp.inf).ravel())
    last = jnp.maximum(count(mask, dtype=x.dtype) - 1, 0)
    position = q * last
    low = jnp.floor(position)
    high = jnp.minimum(low + 1, last)
    below, above = values[low.astype(jnp.int32)], values[high.astype(jnp.int32)]
    result = below + (position - low) * (above - below)
    return jnp.where(jnp.any(mask), result, 0).astype(x.dtype)
