"""Log-probs and sampling against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

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


def bfloat16_noise(logps, keys):
    """`lp.sample` with noise of too few bits."""
    draw = jax.vmap(lambda key: jax.random.gumbel(key, logps.shape[1:], jnp.bfloat16))
    return jnp.argmax(logps + draw(keys).astype(jnp.float32), axis=-1)


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """A few dominant tokens, sixty rare ones; noise that is rounded to bfloat16 loses these."""
    rows, length, vocab = 3125, 32, 64
    law = np.array([0.6, 0.25, 0.1, 0.02] + [0.03 / 60] * 60)
    logps = jnp.broadcast_to(jnp.asarray(np.log(law), jnp.float32), (rows, length, vocab))
    keys = jax.random.split(jax.random.key(11), rows)

    def statistic(tokens):
        counts = np.bincount(np.asarray(tokens).ravel(), minlength=vocab)
        expected = rows * length * law
        return ((counts - expected) ** 2 / expected).sum()

    limit = scipy.stats.chi2.ppf(1 - 1e-4, vocab - 1)
    assert statistic(jax.jit(lp.sample)(logps, keys)[0]) < limit
    assert statistic(jax.jit(bfloat16_noise)(logps, keys)) > 10 * limit


@pytest.mark.slow
def test_very_rare_tokens_are_drawn_as_often_as_they_should():
    """Most of a large vocabulary is less probable than the spacing of uniform float32 below 1."""
    vocab, rare, batches = 32_768, 4e-8, 192
    law = np.full(vocab, rare)
    law[0] = 1 - rare * (vocab - 1)
    logps = jnp.broadcast_to(jnp.asarray(np.log(law), jnp.float32), (64, vocab))

    def draw(key):
        return lp.sample(logps, jax.random.split(key, 64))[0]

    keys = jax.random.split(jax.random.key(0), batches)
    seen = int((jax.jit(lambda keys: jax.lax.map(draw, keys))(keys) != 0).sum())
    expected = 64 * batches * rare * (vocab - 1)
    low, high = scipy.stats.poisson.ppf([1e-3, 1 - 1e-3], expected)
    assert low <= seen <= high


def test_positions_of_a_row_draw_on_their_own():
    """Two positions with one law: all pairs of tokens, as often as the product says."""
    law = np.array([0.5, 0.3, 0.2])
    logps = jnp.broadcast_to(jnp.log(jnp.asarray(law, jnp.float32)), (20_000, 2, 3))
    tokens, _ = jax.jit(lp.sample)(logps, jax.random.split(jax.random.key(5), 20_000))
    counts = np.bincount(np.asarray(tokens) @ [3, 1], minlength=9)
    assert scipy.stats.chisquare(counts, 20_000 * np.outer(law, law).ravel()).pvalue > 1e-4


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
