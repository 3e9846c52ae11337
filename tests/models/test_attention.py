"""Kernels of attention against NumPy in float64, on rows with padding at both ends."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax import mesh as mesh_lib
from ais_jax.models import attention as lib

ROWS, LENGTH, HEADS, KEY_HEADS, SIZE = 4, 200, 4, 2, 128

KERNELS = {
    "whole": lib._whole,
    "chunked": functools.partial(lib._chunked, chunk=32),
    "one chunk": functools.partial(lib._chunked, chunk=256),
    "aligned": functools.partial(lib._aligned, implementation="xla"),
    "splash": functools.partial(lib._splash, interpret=True),
}


@pytest.fixture(scope="module")
def inputs():
    """(q, k, v, real): rows of one token, of a few, of nearly all, and of all."""
    rng = np.random.default_rng(0)
    shapes = (HEADS, KEY_HEADS, KEY_HEADS)
    q, k, v = (rng.normal(size=(ROWS, LENGTH, n, SIZE)).astype(np.float32) for n in shapes)
    begin, end = np.array([70, 30, 5, 0]), np.array([71, 100, 190, 200])
    place = np.arange(LENGTH)
    return q, k, v, (place >= begin[:, None]) & (place < end[:, None])


def reference(q, k, v, real, causal):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, HEADS // KEY_HEADS, axis=2) for x in (k, v))
    scores = np.einsum("bthd,bshd->bhts", q, k) / np.sqrt(SIZE)
    seen = real[:, None, None, :] & (np.tril(np.ones((LENGTH, LENGTH), bool)) | (not causal))
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - np.maximum(scores.max(axis=-1, keepdims=True), -1e30))
    total = weights.sum(axis=-1, keepdims=True)
    weights = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    return np.einsum("bhts,bshd->bthd", weights, v)


def masks_of(real, causal, mesh=None):
    return lib.Masks(jnp.asarray(real), causal, None, lib.Kernel(mesh=mesh))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_is_attention(name, causal, inputs):
    q, k, v, real = inputs
    run = jax.jit(lambda q, k, v, real: KERNELS[name](q, k, v, masks_of(real, causal)))
    out = np.asarray(run(q, k, v, real))
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out[real], reference(*inputs, causal)[real], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "whole"])
def test_gradients_are_those_of_all_scores_at_once(name, causal, inputs):
    """Of a sum over real queries; padding has none."""
    *arrays, real = inputs
    weights = np.random.default_rng(1).normal(size=arrays[0].shape).astype(np.float32)
    weights *= real[..., None, None]

    def total(kernel, q, k, v):
        return jnp.sum(kernel(q, k, v, masks_of(real, causal)) * weights)

    def gradients(kernel):
        return jax.jit(jax.grad(functools.partial(total, kernel), argnums=(0, 1, 2)))(*arrays)

    expected = gradients(lib._whole)
    for found, right in zip(gradients(KERNELS[name]), expected, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=2e-5)
        assert np.all(np.asarray(found)[~real] == 0)


def test_splash_attention_is_split_over_rows_and_heads(inputs):
    q, k, v, real = inputs
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))
    kernel = functools.partial(lib._splash, interpret=True)
    found = jax.jit(lambda *x: kernel(*x[:3], masks_of(x[3], True, mesh)))(q, k, v, real)
    assert found.sharding.shard_shape(found.shape) == (ROWS // 4, LENGTH, HEADS // 2, SIZE)
    right = reference(*inputs, True)
    np.testing.assert_allclose(np.asarray(found)[real], right[real], rtol=2e-5, atol=2e-6)


def test_long_sequences_hold_few_scores():
    """At 32k tokens all scores of a row and head would be 4 GiB."""
    length, heads = 32_768, 2
    shape = jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32)
    real = jax.ShapeDtypeStruct((1, length), bool)

    def total(q, k, v, real):
        out, _ = lib.attention(q, k, v, masks_of(real, True), None)
        return jnp.sum(jnp.square(out))

    step = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    plan = step.lower(shape, shape, shape, real).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 4 * heads * length**2 / 16


@pytest.mark.parametrize(
    ("platform", "dtype", "length", "size", "kind"),
    [
        ("cpu", "bfloat16", 2048, 128, "whole"),
        ("cpu", "bfloat16", 2049, 128, "chunked"),
        ("tpu", "bfloat16", 512, 128, "whole"),
        ("tpu", "bfloat16", 1024, 128, "splash"),
        ("tpu", "bfloat16", 4096, 64, "chunked"),
        ("gpu", "bfloat16", 1024, 128, "cudnn"),
        ("gpu", "float32", 4096, 128, "chunked"),
    ],
)
def test_auto_goes_by_device_and_length(platform, dtype, length, size, kind, monkeypatch):
    monkeypatch.setattr(mesh_lib, "platform_of", lambda mesh: platform)
    q = jax.ShapeDtypeStruct((1, length, 1, size), jnp.dtype(dtype))
    assert lib._kind(q, lib.Kernel()) == kind
    assert lib._kind(q, lib.Kernel("whole")) == "whole"


def test_without_cudnn_it_goes_in_chunks(inputs):
    q, k, v, real = inputs
    masks = masks_of(real, True)._replace(kernel=lib.Kernel("cudnn"))
    with pytest.warns(UserWarning, match="without cuDNN"):
        out, _ = lib.attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), masks, None)
    right = reference(*inputs, True).reshape(ROWS, LENGTH, -1)
    np.testing.assert_allclose(np.asarray(out, np.float32)[real], right[real], rtol=0.05, atol=0.05)
