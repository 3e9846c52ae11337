"""Log-probs and sampling against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax.sampling import logps as lp

ALLOWED = np.array([False, True, True, True, True, False])


def oracle(logits, temperature):
    x = np.asarray(logits, np.float64)[..., ALLOWED] / temperature
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_log_probs_equal_the_oracle(temperature):
    logits = 10 * jax.random.normal(jax.random.key(0), (5, 6))
    result = lp.log_probs(logits, temperature, jnp.asarray(ALLOWED))
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result[:, ALLOWED], oracle(logits, temperature), atol=1e-5)
    assert np.exp(result[:, ~ALLOWED]).max() == 0


def test_samples_follow_the_law():
    logits = jax.random.normal(jax.random.key(3), (6,))
    n = 100_000
    logps = lp.log_probs(logits, 0.7, jnp.asarray(ALLOWED))
    rows = jnp.broadcast_to(logps, (n, 6))
    tokens, chosen = jax.jit(lp.sample)(rows, jax.random.split(jax.random.key(4), n))
    counts = np.bincount(np.asarray(tokens), minlength=6)
    expected = n * np.exp(oracle(logits, 0.7))
    assert counts[~ALLOWED].sum() == 0
    # The 0.9999 quantile of chi-square with 3 degrees of freedom.
    assert ((counts[ALLOWED] - expected) ** 2 / expected).sum() < 21.1
    np.testing.assert_array_equal(chosen, np.asarray(logps)[np.asarray(tokens)])


@pytest.mark.smoke
@pytest.mark.parametrize("chunk", [1, 3, 4, 11, 50])
def test_chunks_change_neither_value_nor_gradient(chunk):
    hidden = jax.random.normal(jax.random.key(0), (2, 11, 8))
    kernel = jax.random.normal(jax.random.key(1), (8, 6))
    tokens = jax.random.randint(jax.random.key(2), (2, 11), 1, 5)

    def run(kernel, chunk):
        return lp.token_logps(
            hidden, lambda h: h @ kernel, tokens,
            temperature=0.8, allowed=jnp.asarray(ALLOWED), chunk=chunk,
        )  # fmt: skip

    logps, entropy = run(kernel, chunk)
    full = oracle(np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64), 0.8)
    picked = np.take_along_axis(full, np.asarray(tokens)[..., None] - 1, axis=-1)[..., 0]
    np.testing.assert_allclose(logps, picked, atol=2e-5)
    np.testing.assert_allclose(entropy, -(np.exp(full) * full).sum(-1), atol=2e-5)

    def grad(chunk):
        return jax.grad(lambda k: sum(x.sum() for x in run(k, chunk)))(kernel)

    np.testing.assert_allclose(grad(chunk), grad(50), rtol=1e-4, atol=1e-5)
