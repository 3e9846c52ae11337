"""Layers shared by the architectures: parameters with axis names, norms, rotary, products.

Letters in shapes: B rows, T positions, D hidden size, h head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ais_jax.linear import Kernel, join, linear


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
