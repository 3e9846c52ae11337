"""The product of a linear layer, whatever its kernel is held as."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ais_jax.quantize import QuantArray, codes, multipliable

# By this name policies of rematerialization know what `linear` returns.
RESULT = "linear"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LoraArray:
    """A kernel as base + scale * a @ b; leading axes can be scanned over (arXiv 2106.09685).

    Attributes:
      base: [..., in, out], frozen; an array or a `QuantArray` without `activation`.
      a: [..., in, rank] float32.
      b: [..., rank, out] float32.
      scale: alpha / rank.
    """

    base: jax.Array | QuantArray
    a: jax.Array
    b: jax.Array
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.base.shape

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return self.base.ndim

    def merge(self) -> jax.Array:
        """The kernel [..., in, out] float32."""
        base = self.base
        base = base.dequantize() if isinstance(base, QuantArray) else base.astype(jnp.float32)
        return base + self.scale * jnp.matmul(self.a, self.b, precision="highest")


Kernel = jax.Array | QuantArray | LoraArray


def linear(x: jax.Array, w: Kernel) -> jax.Array:
    """x @ w with float32 (integers: int32) accumulation.

    A plain `w` is cast to x's dtype; its gradient is summed in float32 and not rounded to x's
    dtype. With a `QuantArray` that has `activation` set, x is quantized per token (over its last
    axis) as the weights are per channel, and result = (codes @ values) * token scale * channel
    scale: for sampling, not to be differentiated. Without, result = (x @ values) * scale, which
    has a gradient for x. A `LoraArray` is x @ base + scale * (x @ a) @ b.

    Args:
      x: [..., in] float32 or bfloat16.
      w: [in, out].

    Returns:
      [..., out] in x's dtype.

    Raises:
      ValueError: the shapes do not fit.
    """
    return checkpoint_name(wide_linear(x, w).astype(x.dtype), RESULT)


def wide_linear(x: jax.Array, w: Kernel) -> jax.Array:
    """`linear`, its result [..., out] in float32, as it is before it is rounded to x's dtype."""
    if w.ndim != 2 or x.ndim < 1 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"linear: x {x.shape} and w {w.shape} must be [..., in] and [in, out]")
    if isinstance(w, LoraArray):
        low = _product(x, w.a).astype(x.dtype)
        return wide_linear(x, w.base) + w.scale * _product(low, w.b)
    if not isinstance(w, QuantArray):
        return _product(x, w)
    if w.activation is None:
        return _product(x, w.values.astype(x.dtype), w.transposed) * w.scale[0]
    numbers, scale = codes(x.astype(jnp.float32), w.activation, axis=-1)
    values = w.values.astype(multipliable(w.values.dtype))
    product = _dot(numbers.astype(values.dtype), values, w.transposed)
    return product.astype(jnp.float32) * scale * w.scale[0]


def columns(w: Kernel, start: jax.Array | int, size: int) -> Kernel:
    """The kernel [..., in, size] of `size` output channels of `w`, from `start` on.

    Args:
      w: [..., in, out].
      start: may be traced; at most out - size, larger ones are clamped to it.
      size: static, at most out.

    Raises:
      ValueError: size is larger than out.
    """
    if size > w.shape[-1]:
        raise ValueError(f"columns: size={size} is more than the {w.shape[-1]} columns of w")

    def cut(x: jax.Array, axis: int = -1) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    if isinstance(w, LoraArray):
        base = columns(w.base, start, size)
        assert not isinstance(base, LoraArray)
        return dataclasses.replace(w, base=base, b=cut(w.b))
    if isinstance(w, QuantArray):
        values = cut(w.values, -2 if w.transposed else -1)
        return dataclasses.replace(w, values=values, scale=cut(w.scale))
    return cut(w)


def join(kernels: Sequence[Kernel]) -> Kernel:
    """The kernel [..., in, sum of outs] of several that share their input; columns in order.

    Raises:
      TypeError: one of them is a `LoraArray`, or they are not held alike.
    """
    first = kernels[0]
    if isinstance(first, LoraArray) or any(_held(k) != _held(first) for k in kernels):
        raise TypeError("join: kernels must be held alike, and adapters merged")
    if not isinstance(first, QuantArray):
        return jnp.concatenate([jnp.asarray(k) for k in kernels], axis=-1)
    parts = [k for k in kernels if isinstance(k, QuantArray)]
    axis = -2 if first.transposed else -1
    return dataclasses.replace(
        first,
        values=jnp.concatenate([k.values for k in parts], axis=axis),
        scale=jnp.concatenate([k.scale for k in parts], axis=-1),
    )


def _held(w: Kernel):
    return isinstance(w, QuantArray), getattr(w, "activation", None), getattr(w, "transposed", None)


def _dot(x: jax.Array, w: jax.Array, transposed: bool) -> jax.Array:
    """x @ w, or x @ w.T if `transposed`."""
    integer = jnp.issubdtype(x.dtype, jnp.integer)
    contract = (((x.ndim - 1,), (int(transposed),)), ((), ()))
    return jax.lax.dot_general(
        x, w, contract, preferred_element_type=jnp.int32 if integer else jnp.float32
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: jax.Array, w: jax.Array, transposed: bool = False) -> jax.Array:
    return _dot(x, w.astype(x.dtype), transposed)


def _product_forward(x, w, transposed):
    return _product(x, w, transposed), (x, w)


def _product_backward(transposed, residuals, g):
    # The derivative that jax would take multiplies float32 cotangents with bfloat16 operands,
    # which every chip widens: the backward pass would lose the speed of bfloat16.
    x, w = residuals
    g = g.astype(x.dtype)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    rows = tuple(range(x.ndim - 1))
    dx = dot(g, w.astype(x.dtype), (((g.ndim - 1,), (int(not transposed),)), ((), ())))
    dw = dot(*((g, x) if transposed else (x, g)), ((rows, rows), ((), ())))
    return dx.astype(x.dtype), dw.astype(w.dtype)


_product.defvjp(_product_forward, _product_backward)
