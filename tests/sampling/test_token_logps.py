"""Log-probs of given tokens by slices of the vocabulary, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ais_jax.mesh import MeshConfig, batch_sharding, make_mesh
from ais_jax.sampling import logps as lp

# Whole slices of it are forbidden.
SLICED = 300
REAL = (np.arange(SLICED) >= 70) & (np.arange(SLICED) < 290) & (np.arange(SLICED) % 11 != 0)
ROWS, LENGTH, DEPTH = 2, 11, 8


def problem():
    """Hidden states, a kernel, allowed tokens, and slopes of log-probs and entropy."""
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (ROWS, LENGTH)
    hidden = jax.random.normal(keys[0], (*shape, DEPTH))
    kernel = 2 * jax.random.normal(keys[1], (DEPTH, SLICED))
    tokens = jax.random.choice(keys[2], jnp.asarray(np.flatnonzero(REAL), jnp.int32), shape)
    # Ends of the vocabulary, and of slices.
    tokens = tokens.at[0, :4].set(jnp.array([71, 127, 128, 289]))
    return hidden, kernel, tokens, jax.random.normal(keys[3], (2, *shape))


def head(kernel):
    def unembed(hidden, start=None, size=None):
        part = kernel
        if start is not None:
            part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
        return jnp.matmul(hidden, part.astype(hidden.dtype), preferred_element_type=jnp.float32)

    return unembed


def run_sliced(unembed, hidden, tokens, chunk=4, vocab_chunk=SLICED):
    return lp.token_logps(
        hidden, unembed, tokens,
        temperature=0.8, allowed=jnp.asarray(REAL), chunk=chunk, vocab_chunk=vocab_chunk,
    )  # fmt: skip


def by_hand(hidden, kernel, tokens, slopes, temperature=0.8):
    """Log-probs, entropy and the gradients of their sum with slopes, in float64."""
    hidden, kernel, slopes = (np.asarray(x, np.float64) for x in (hidden, kernel, slopes))
    scores = hidden @ kernel / temperature
    scores[..., ~REAL] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    probs = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    logs = np.log(np.where(probs > 0, probs, 1))
    entropy = -(probs * logs).sum(axis=-1)
    of_logps, of_entropy = slopes[..., None]
    one_hot = np.arange(SLICED) == np.asarray(tokens)[..., None]
    back = of_logps * (one_hot - probs) - of_entropy * probs * (logs + entropy[..., None])
    back /= temperature
    logps = (logs * one_hot).sum(axis=-1)
    return logps, entropy, back @ kernel.T, np.einsum("btd,btv->dv", hidden, back)


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [4, 50])
@pytest.mark.parametrize("vocab_chunk", [1, 7, 64, 128, 299, 300])
def test_slices_of_the_vocabulary_change_neither_value_nor_gradient(chunk, vocab_chunk):
    hidden, kernel, tokens, slopes = problem()

    @jax.jit
    def run(hidden, kernel):
        def total(hidden, kernel):
            found = run_sliced(head(kernel), hidden, tokens, chunk, vocab_chunk)
            return jnp.sum(jnp.stack(found) * slopes), found

        return jax.grad(total, (0, 1), has_aux=True)(hidden, kernel)

    (of_hidden, of_kernel), (logps, entropy) = run(hidden, kernel)
    expected = by_hand(hidden, kernel, tokens, slopes)
    for ours, theirs in zip((logps, entropy, of_hidden, of_kernel), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=3e-5)


def test_one_slice_is_the_same_program_as_before():
    """A small vocabulary asks for all logits at once, and never for a slice of them."""
    hidden, kernel, tokens, _ = problem()
    logps, entropy = run_sliced(lambda hidden: hidden @ kernel, hidden, tokens, LENGTH)
    law = lp.log_probs(hidden @ kernel, 0.8, jnp.asarray(REAL))
    np.testing.assert_array_equal(logps, lp.pick(law, tokens)[1])
    np.testing.assert_array_equal(entropy, -jnp.sum(jnp.exp(law) * law, axis=-1))


def test_large_logits_and_low_precision():
    hidden, kernel, tokens, slopes = problem()
    hidden = (300 * hidden).astype(jnp.bfloat16)

    def total(hidden, kernel, vocab_chunk):
        found = run_sliced(head(kernel), hidden, tokens, 4, vocab_chunk)
        return jnp.sum(jnp.stack(found) * slopes), found

    run = jax.jit(jax.grad(total, (0, 1), has_aux=True), static_argnums=2)
    (of_hidden, of_kernel), found = run(hidden, kernel, 64)
    (_, whole_kernel), whole = run(hidden, kernel, SLICED)
    assert (of_hidden.dtype, of_kernel.dtype) == (jnp.bfloat16, jnp.float32)
    for ours, theirs in zip(found, whole, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    scale = float(jnp.abs(whole_kernel).max())
    np.testing.assert_allclose(of_kernel, whole_kernel, atol=1e-2 * scale)


def test_whatever_the_output_layer_closes_over_has_its_gradient():
    """Two output layers combined, a scale before them, codes that have none, all under remat."""
    hidden, kernel, tokens, slopes = problem()
    gain = 1 + jax.random.uniform(jax.random.key(8), (DEPTH,))
    codes = jnp.round(20 * kernel).astype(jnp.int8)

    @functools.partial(jax.jit, static_argnames="vocab_chunk")
    def grads(kernel, gain, codes, vocab_chunk):
        @jax.checkpoint
        def total(total, inputs):
            hidden, kernel, gain, codes = inputs

            def unembed(hidden, start=None, size=None):
                given = head(kernel)(hidden * gain, start, size)
                free = head(codes)(hidden, start, size) / 20
                return free + 1.5 * (given - free)

            found = run_sliced(unembed, hidden, tokens, 4, vocab_chunk)
            return total + jnp.sum(jnp.stack(found) * slopes), None

        def twice(kernel, gain):
            both = jax.tree.map(lambda x: jnp.stack([x, x]), (hidden, kernel, gain, codes))
            return jax.lax.scan(total, 0.0, both)[0]

        return jax.value_and_grad(twice, (0, 1))(kernel, gain)

    sliced, whole = grads(kernel, gain, codes, 64), grads(kernel, gain, codes, SLICED)
    for ours, theirs in zip(jax.tree.leaves(sliced), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 4), (2, 2, 2), (1, 8, 1)])
def test_slices_of_a_vocabulary_that_is_spread_over_devices(shape):
    hidden, kernel, tokens, slopes = problem()
    hidden, tokens = (jnp.tile(x, (4, *[1] * (x.ndim - 1))) for x in (hidden, tokens))
    slopes = jnp.tile(slopes, (1, 4, 1))

    def total(hidden, kernel):
        found = run_sliced(head(kernel), hidden, tokens, 4, 128)
        return jnp.sum(jnp.stack(found) * slopes)

    run = jax.value_and_grad(total, (0, 1))
    expected = jax.jit(run)(hidden, kernel)
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    rows = batch_sharding(mesh)
    weights = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    placed = jax.device_put(hidden, rows), jax.device_put(kernel, weights)
    result = jax.jit(run, out_shardings=(None, (rows, weights)))(*placed)
    for ours, theirs in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
