"""Attention: over whole sequences by one of four kernels, and over a cache.

Letters in shapes: B rows, T query positions, S key positions, H query heads, K key/value heads,
h head size.
"""

from __future__ import annotations

import functools
import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from ais_jax import mesh as mesh_lib
from ais_jax.models import cache as cache_lib
from ais_jax.models.blocks import Schedule
from ais_jax.models.cache import Codes, KVCache

# A finite stand-in for -inf: a query that sees nothing has numbers all the same.
_UNSEEN = -1e30

# "auto", or how whole sequences are attended to: all scores at once, some queries at a time, by
# cuDNN's flash attention, by the splash attention of TPUs.
KINDS = ("auto", "whole", "chunked", "cudnn", "splash")

# Scores of a row and head that may exist at a time: those of 2,048 queries and keys.
_MOST_SCORES = 2048**2
# From here on kernels that hold no scores are taken where there are some.
_FLASH_FROM = 1024
_LANES = 128  # of a TPU: what splash attention takes is a multiple of it


class Kernel(NamedTuple):
    """How whole sequences are attended to."""

    kind: str = "auto"  # one of `KINDS`
    mesh: Mesh | None = None  # rows over its batch axes, heads over `tensor`

    @classmethod
    def of(cls, schedule: Schedule) -> Kernel:
        """That of blocks that are run so."""
        return cls(schedule.attention, schedule.mesh)


class Masks(NamedTuple):
    """Which keys a query may see."""

    real: jax.Array  # [B, T] bool, real tokens among those that are computed; they stand together
    causal: bool  # those after a query are not seen
    old: jax.Array | None  # [B, 1, 1, S] bool, among those in the cache; None reads none of them
    kernel: Kernel

    @property
    def new(self) -> jax.Array:
        """[B, 1, T or 1, T] bool, among the tokens that are computed."""
        if not self.causal:
            return self.real[:, None, None, :]
        queries = self.real.shape[1]
        return (jnp.tril(jnp.ones((queries, queries), bool)) & self.real[:, None, :])[:, None]


def causal_masks(
    key_mask: jax.Array, queries: int, cache: Any, index: jax.Array | int, kernel: Kernel
) -> Masks:
    """Every query sees the real keys up to its own place.

    Args:
      key_mask: [B, S] bool, real tokens by key position.
      queries: T, of them at key positions index...
      cache: None if there is none.
      index: key position of the first query.
      kernel: without a cache.
    """
    real = _from(key_mask, queries, index)
    if not _read(cache, index):
        return Masks(real, True, None, kernel)
    before = jnp.arange(key_mask.shape[1]) < index
    return Masks(real, True, (key_mask & before)[:, None, None, :], kernel)


def padding_masks(
    key_mask: jax.Array, queries: int, cache: Any, index: jax.Array | int, kernel: Kernel
) -> Masks:
    """Every query sees every real key; those that are computed stand for the cached ones."""
    real = _from(key_mask, queries, index)
    if not _read(cache, index) and queries == key_mask.shape[1]:
        return Masks(real, False, None, kernel)
    position = jnp.arange(key_mask.shape[1])
    replaced = (position >= index) & (position < index + queries)
    return Masks(real, False, (key_mask & ~replaced)[:, None, None, :], kernel)


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
        out = _KERNELS[_kind(q, masks.kernel)](q, k, v, masks)
        return out.reshape(*out.shape[:2], -1), None
    new = cache_lib.entries(k, v, like=cache)
    parts = [(new, masks.new)] if masks.old is None else [(cache, masks.old), (new, masks.new)]
    # The cache is written once it has been read, in place.
    return jax.lax.optimization_barrier((_grouped_attention(q, parts), new))


def _kind(q: jax.Array, kernel: Kernel) -> str:
    """The kernel that "auto" stands for, for queries [B, T, H, h]."""
    if kernel.kind != "auto":
        return kernel.kind
    length, size = q.shape[1], q.shape[3]
    platform = mesh_lib.platform_of(kernel.mesh)
    if platform == "tpu" and length >= _FLASH_FROM and size % _LANES == 0:
        return "splash"
    if platform == "gpu" and length >= _FLASH_FROM and q.dtype != jnp.float32:
        return "cudnn"
    return "whole" if length**2 <= _MOST_SCORES else "chunked"


def _whole(q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks) -> jax.Array:
    """[B, T, H, h], like the other kernels."""
    return jax.nn.dot_product_attention(q, k, v, mask=masks.new, scale=q.shape[-1] ** -0.5)


def _chunked(
    q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, chunk: int | None = None
) -> jax.Array:
    """A chunk of queries at a time; the backward pass computes its scores again."""
    length = q.shape[1]
    chunk = chunk or max(_MOST_SCORES // length // _LANES, 1) * _LANES
    count = -(-length // chunk)
    padded = jnp.pad(q, ((0, 0), (0, count * chunk - length), (0, 0), (0, 0)))
    chunks = padded.reshape(q.shape[0], count, chunk, *q.shape[2:]).swapaxes(0, 1)

    def one(keys, part):
        start, queries = part
        seen = masks.real[:, None, None, :keys]
        if masks.causal:
            seen &= jnp.arange(keys) <= start + jnp.arange(chunk)[:, None]
        scale = q.shape[-1] ** -0.5
        return jax.nn.dot_product_attention(
            queries, k[:, :keys], v[:, :keys], mask=seen, scale=scale
        )

    # Of causal ones those in the first quarter see a quarter of the keys, and so on.
    ends = [-(-count * quarter // 4) for quarter in range(1, 5)] if masks.causal else [count]
    outs, begin = [], 0
    for end in ends:
        if end > begin:
            keys = min(end * chunk, length)
            part = jnp.arange(begin, end) * chunk, chunks[begin:end]
            outs.append(jax.lax.map(jax.checkpoint(functools.partial(one, keys)), part))
            begin = end
    out = jnp.concatenate(outs).swapaxes(0, 1)
    return out.reshape(padded.shape)[:, :length]


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks) -> jax.Array:
    """cuDNN's flash attention; where there is none for it, `_chunked`."""
    try:
        return _aligned(q, k, v, masks, "cudnn")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        warnings.warn(f"attention goes without cuDNN, in chunks: {error}", stacklevel=2)
        return _chunked(q, k, v, masks)


def _aligned(q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, implementation) -> jax.Array:
    """By lengths instead of a mask [T, T]: every row's padding is moved to its end, and back."""
    real, place = masks.real, jnp.arange(q.shape[1])
    padding = jnp.argmax(real, axis=1)[:, None]
    lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)

    def rolled(x, by):
        return jnp.take_along_axis(x, ((place + by) % len(place))[:, :, None, None], axis=1)

    out = jax.nn.dot_product_attention(
        *(rolled(x, padding) for x in (q, k, v)),
        scale=q.shape[-1] ** -0.5,
        is_causal=masks.causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    return rolled(out, -padding)


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, masks: Masks, interpret: bool = False
) -> jax.Array:
    """Splash attention, a Pallas kernel of TPUs; padding is a segment of its own."""
    mesh, length = masks.kernel.mesh, q.shape[1]
    whole = -(-length // _LANES) * _LANES
    block = math.gcd(whole, 512)

    def one_row(q, k, v, real):
        kernel = _splash_kernel(q.shape[0], whole, masks.causal, block, interpret)
        segments = real.astype(jnp.int32)
        return kernel(q, k, v, segment_ids=_segments(segments))

    def all_rows(q, k, v, real):
        return jax.vmap(one_row)(q, k, v, real)

    def laid(x):
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, whole - length), (0, 0)))

    real = jnp.pad(masks.real, ((0, 0), (0, whole - length)))
    inputs = laid(q * q.shape[-1] ** -0.5), laid(k), laid(v), real
    if mesh is not None and mesh.size > 1:
        rows = mesh_lib.BATCH_AXES if q.shape[0] % mesh_lib.batch_devices(mesh) == 0 else None
        heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
        spec = PartitionSpec(rows, heads)
        all_rows = jax.shard_map(
            all_rows,
            mesh=mesh,
            in_specs=(spec, spec, spec, PartitionSpec(rows)),
            out_specs=spec,
            check_vma=False,
        )
    return all_rows(*inputs)[:, :, :length].swapaxes(1, 2)


def _segments(ids: jax.Array) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention.SegmentIds(ids, ids)


def _splash_kernel(heads: int, length: int, causal: bool, block: int, interpret: bool) -> Any:
    from jax.experimental.pallas.ops.tpu import splash_attention

    mask = splash_attention.CausalMask if causal else splash_attention.FullMask
    sizes: Any = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block)
    sizes |= dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"), block)
    sizes |= dict.fromkeys(("block_q_dq", "block_kv_dq"), block)
    return splash_attention.make_splash_mha(
        mask=splash_attention.MultiHeadMask([mask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention.BlockSizes(**sizes),
        interpret=interpret,
    )


_KERNELS = {"whole": _whole, "chunked": _chunked, "cudnn": _cudnn, "splash": _splash}


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
