"""The quantized copy of a policy.

A linear layer's kernel [..., in, out] becomes a `QuantArray`: numbers of a low-precision format
with one float32 scale per output channel. `linear.linear` then quantizes its input with one scale
per token, multiplies the codes and applies both scales to the float32 (or int32) result.
Parameters are nested dicts; leading axes of a kernel are stacked layers. See docs/quantization.md.

Every code is rounded to its format's grid by float32 arithmetic before it is cast. The cast alone
would not do: compilers may drop a narrowing cast that is widened again, or round twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ais_jax.errors import UserError
from ais_jax.recipes import KV_FORMATS, Recipe, find_recipe
from ais_jax.recipes import RECIPES as RECIPES

LINEAR_NAMES = (
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("in_proj_qkv", "in_proj_z", "out_proj"),  # of linear attention; its decays and gates are not
)

EMBEDDING_NAME, HEAD_NAME = "embed_tokens", "lm_head"

# Parts of the names of what is small and used in float32 somewhere. Trainer and sampler must not
# round these differently.
SMALL_NAMES = ("norm", "conv1d", "A_log", "dt_bias")
# Below this scale, weights that are subnormal in float32 would matter, and some chips flush those.
_SCALE_FLOOR = np.float32(2.0**-100)
# No compiler multiplies four-bit numbers everywhere; these hold the same numbers.
_MULTIPLIABLE = {"int4": "int8", "float4_e2m1fn": "float8_e4m3fn"}

# Where kernels are held [out, in]. CPUs multiply int8 faster so, and a GPU's library takes 8-bit
# numbers in no other order: XLA would make a transposed copy of all kernels.
_TRANSPOSED = ("cpu", "gpu")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class QuantArray:
    """A kernel as values * scale. A pytree of two arrays; leading axes can be scanned over.

    Attributes:
      values: numbers of a format, [..., in, out], or [..., out, in] if `transposed`; after
        `prepare`, perhaps in a wider dtype.
      scale: [..., 1, out] float32, per output channel.
      activation: format in which `linear` quantizes its input, or None.
      transposed: whether the last two axes of `values` are swapped in memory.
    """

    values: jax.Array
    scale: jax.Array
    activation: str | None = dataclasses.field(default=None, metadata={"static": True})
    transposed: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel, [..., in, out]."""
        shape = self.values.shape
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else shape

    @property
    def ndim(self) -> int:
        """Number of axes of the kernel."""
        return self.values.ndim

    def dequantize(self, dtype=jnp.float32) -> jax.Array:
        """The kernel [..., in, out]: values * scale in float32, cast to `dtype`."""
        values = jnp.swapaxes(self.values, -1, -2) if self.transposed else self.values
        return (values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(
    params: Any,
    recipe: str | Recipe,
    dtype=jnp.bfloat16,
    targets: Iterable[str] = LINEAR_NAMES,
    platform: str | None = None,
) -> Any:
    """The copy of `params` that samples: targeted kernels quantized, other floats cast.

    Norms and the small parameters of linear attention stay as they are.

        scale = max(amax / fmax, 2^-100),  values = round(clip(weight * (1 / scale), -fmax, fmax))

    with amax = max |weight| over the input axis and fmax the format's largest number (127 and 7
    for the integers); rounding is to nearest, ties to even. Kernels are first rounded to `dtype`,
    in which the trainer multiplies, so the copy is a quantization of what the trainer computes
    with, and with recipe "none" it is exactly that.

    A recipe with `head` quantizes the output layer too, `lm_head`. Where that is the embedding
    transposed, the copy has a quantized `lm_head` beside the embedding, which tokens are looked up
    in.

    Pure and jittable; called outside jit it runs as one program, compiled once per recipe and
    shapes. Leaves keep their shardings; a scale is whole along the input axis.

    Args:
      params: nested dict of arrays. Leaves that are not floating stay as they are.
      recipe: a name in `RECIPES`, or a `Recipe`.
      dtype: compute dtype of the trainer, bfloat16 or float32.
      targets: names of the linears. A leaf is a kernel if one of them is on its path, "bias" is
        not, and it has two axes or more.
      platform: hold the numbers in the dtype that `prepare` would give them there, without the
        cast to the format in between, which a CPU has no instruction for. None is the format's.

    Raises:
      UserError: the recipe's name is unknown, or it finds no kernel or no output layer.
      TypeError: `params` holds a `QuantArray` already.
    """
    return _quantize(params, find_recipe(recipe), np.dtype(dtype), tuple(targets), platform)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _quantize(params, recipe: Recipe, dtype: np.dtype, targets: tuple[str, ...], platform):
    if recipe.head:
        targets = (*targets, HEAD_NAME)
    quantized = functools.partial(_quantized, recipe=recipe, dtype=dtype, platform=platform)

    def one(path, leaf):
        names = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
        if _is_quantized(leaf):
            raise TypeError(
                f"{'.'.join(names)} is quantized already; quantize the trainer's parameters"
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating) or any(x in names[-1] for x in SMALL_NAMES):
            return leaf
        kernel = leaf.ndim >= 2 and not set(targets).isdisjoint(names) and "bias" not in names
        if not kernel or recipe.weights is None:
            return leaf.astype(dtype)
        return quantized(leaf)

    copy = jax.tree_util.tree_map_with_path(one, params, is_leaf=_is_quantized)
    if recipe.weights is not None and not any(
        _is_quantized(x) for x in jax.tree.leaves(copy, is_leaf=_is_quantized)
    ):
        raise UserError(
            f"nothing to quantize to {recipe.weights}: no kernel is named {', '.join(targets)}"
        )
    if recipe.head and HEAD_NAME not in params:
        if EMBEDDING_NAME not in params:
            raise UserError(
                f"no output layer to quantize: neither {HEAD_NAME} nor {EMBEDDING_NAME} is there; "
                "choose a recipe without _head"
            )
        table = params[EMBEDDING_NAME]
        copy = {**copy, HEAD_NAME: quantized(table, transposed=True)}
    return copy


def _quantized(
    w: jax.Array, *, recipe: Recipe, dtype: np.dtype, platform: str | None, transposed=False
) -> QuantArray:
    """Of a kernel, or of one that is given `transposed` and is left so."""
    assert recipe.weights is not None
    axis = -1 if transposed else -2
    values, scale = codes(w.astype(jnp.float32), recipe.weights, axis, precision=dtype)
    scale = jnp.swapaxes(scale, -1, -2) if transposed else scale
    held = jnp.dtype(recipe.weights) if platform is None else _held(recipe.weights, platform)
    return QuantArray(values.astype(held), scale, recipe.activations, transposed)


def codes(
    x: jax.Array, dtype: str, axis: int, precision=jnp.float32
) -> tuple[jax.Array, jax.Array]:
    """(codes, scale), float32, one scale along `axis`; the codes are numbers of format `dtype`.

    Args:
      x: float32; what is quantized is x rounded to `precision`.
      dtype: a name in `FORMATS`.
      axis: of x.
      precision: a floating dtype.
    """
    info = jnp.finfo(precision)

    def rounded(x):  # An operation: a cast and back may be dropped as excess precision.
        return jax.lax.reduce_precision(x, info.nexp, info.nmant)

    largest = _largest(dtype)
    # The maximum of rounded numbers is the rounded maximum, which a CPU finds 10 times faster.
    amax = rounded(jnp.max(jnp.abs(x), axis=axis, keepdims=True))
    scale = jnp.maximum(amax * np.float32(1 / largest), _SCALE_FLOOR)
    # Compilers turn a division by a broadcast into this product, where they please.
    scaled = rounded(x) * (1 / scale)
    # They may also hold x more precisely here than in amax.
    return _round(jnp.clip(scaled, -largest, largest), dtype), scale


def kv_codes(x: jax.Array, kv_format: str) -> tuple[jax.Array, jax.Array]:
    """(numbers, scale) of keys or values, one scale per token and head.

    Args:
      x: [..., h] floating.
      kv_format: a name in `KV_FORMATS`.

    Returns:
      ([..., h] in the format's dtype, [..., 1] float32).
    """
    dtype = KV_FORMATS[kv_format]
    numbers, scale = codes(x.astype(jnp.float32), dtype, axis=-1)
    return numbers.astype(dtype), scale


def _largest(dtype: str) -> float:
    integer = jnp.issubdtype(dtype, jnp.integer)
    return float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)


def _round(x: jax.Array, dtype: str) -> jax.Array:
    """float32 `x`, within the range of format `dtype`, to its nearest number, ties to even."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.round(x)
    info = jnp.finfo(dtype)
    step = float(info.smallest_subnormal)
    subnormal = jnp.round(x * (1 / step)) * step
    normal = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=info.nmant)
    return jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, normal)


def _is_quantized(x) -> bool:
    return isinstance(x, QuantArray)


def prepare(params: Any, platform: str | None = None) -> Any:
    """The quantized copy, its values held in the dtypes and order that `platform` multiplies fast.

    The numbers stay the same. On "cpu" floating formats are held in bfloat16, everywhere int4 in
    int8 and (off the CPU) float4_e2m1fn in float8_e4m3fn; the rest stays. On "cpu" and "gpu"
    kernels are held [..., out, in]; `copy_axes` follows. Meant for once after `quantize`, not for
    the decoding step.

    Args:
      params: tree with `QuantArray`s; other leaves stay as they are.
      platform: "cpu", "gpu", "tpu"...; None takes jax's default backend.
    """
    platform = jax.default_backend() if platform is None else platform

    def one(x):
        if not _is_quantized(x):
            return x
        transposed = platform in _TRANSPOSED
        values = x.values.astype(_held(x.values.dtype, platform))
        if transposed != x.transposed:
            # Fused with what makes the numbers, a transposition would slow all of that down.
            values = jnp.swapaxes(jax.lax.optimization_barrier(values), -1, -2)
        return dataclasses.replace(x, values=values, transposed=transposed)

    return jax.tree.map(one, params, is_leaf=_is_quantized)


def _held(dtype, platform: str) -> np.dtype:
    """The dtype in which a platform holds numbers of a format."""
    if platform == "cpu" and jnp.issubdtype(dtype, jnp.floating):
        return jnp.dtype(jnp.bfloat16)
    return multipliable(jnp.dtype(dtype))


def copy_axes(axes: Any, copy: Any) -> Any:
    """Logical axis names of every array of a quantized copy.

    Args:
      axes: those of the parameters, a tuple of names in the place of each.
      copy: from `quantize`, prepared or not. In the place of one parameter it may hold a container
        of slices of it, which lack its first axes.

    Returns:
      A tree like `copy` with a tuple in the place of each array.
    """

    def one(names, leaf):
        def of(x):
            own = names[len(names) - x.ndim :]
            if not _is_quantized(x):
                return own
            swapped = (*own[:-2], own[-1], own[-2])
            return dataclasses.replace(x, values=swapped if x.transposed else own, scale=own)

        return jax.tree.map(of, leaf, is_leaf=_is_quantized)

    if HEAD_NAME in copy and HEAD_NAME not in axes:
        axes = {**axes, HEAD_NAME: axes[EMBEDDING_NAME][::-1]}
    return jax.tree.map(one, axes, copy, is_leaf=lambda x: isinstance(x, tuple))


def multipliable(dtype) -> np.dtype:
    """The dtype in which numbers of format `dtype` are multiplied."""
    return jnp.dtype(_MULTIPLIABLE.get(dtype.name, dtype))


def bytes_of(params: Any) -> int:
    """Bytes of all leaves; four-bit numbers count half a byte.

    Leaves may be `jax.ShapeDtypeStruct`s.
    """
    return sum(math.ceil(x.size * _bits(x.dtype) / 8) for x in jax.tree.leaves(params))


def _bits(dtype) -> int:
    return 4 if dtype.name in _MULTIPLIABLE else 8 * dtype.itemsize


def changed_fraction(old_params: Any, new_params: Any) -> jax.Array:
    """Share of the quantized numbers that differ between two copies, a float32 scalar.

    Compares the values of `QuantArray`s, not their scales; in copies without any (recipe "none"),
    all floating leaves. 0 after an update means that the update did not reach the sampler. NaN if
    there is nothing to compare.

    Args:
      old_params: a copy from `quantize`, prepared or not.
      new_params: another of the same recipe, structure and shapes, prepared likewise.
    """
    old, new = (_compared(params) for params in (old_params, new_params))
    changed = [_count(a != b) for a, b in zip(old, new, strict=True)]
    total = sum(x.size for x in new)
    # A Python integer above 2^31 would not fit the int32 that jax takes it for.
    return jnp.asarray(sum(changed), jnp.float32) / jnp.float32(total if total else jnp.nan)


def _compared(params) -> list[jax.Array]:
    leaves = jax.tree.leaves(params, is_leaf=_is_quantized)
    values = [x.values for x in leaves if _is_quantized(x)]
    return values or [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


def _count(x: jax.Array) -> jax.Array:
    """Number of true entries, float32. Summed row by row: float32 stops counting at 2^24."""
    rows = jnp.sum(x, axis=tuple(range(max(x.ndim - 2, 0), x.ndim)), dtype=jnp.int32)
    return jnp.sum(rows.astype(jnp.float32))
