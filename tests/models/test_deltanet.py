"""The gated delta rule: both forms against a float64 loop, and against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax.models import deltanet

ROWS, HEADS, KEY, VALUE = 2, 3, 8, 5
recurrent, chunked = jax.jit(deltanet.recurrent), jax.jit(deltanet.chunked)


def problem(length, decay=1.0, seed=0, zero_state=False):
    rng = np.random.default_rng(seed)
    q, k = (rng.normal(size=(ROWS, length, HEADS, KEY)) for _ in range(2))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    v = rng.normal(size=(ROWS, length, HEADS, VALUE))
    g = -decay * rng.exponential(size=(ROWS, length, HEADS))
    beta = rng.uniform(size=(ROWS, length, HEADS))
    state = rng.normal(size=(ROWS, HEADS, KEY, VALUE)) * (not zero_state)
    return tuple(x.astype(np.float32) for x in (q, k, v, g, beta, state))


def oracle(q, k, v, g, beta, state):
    """Line by line in float64, a row and a head at a time."""
    q, k, v, g, beta, state = (np.array(x, np.float64) for x in (q, k, v, g, beta, state))
    out = np.zeros(v.shape)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            s = state[b, h]
            for t in range(q.shape[1]):
                s = s * np.exp(g[b, t, h])
                s = s + np.outer(k[b, t, h], beta[b, t, h] * (v[b, t, h] - k[b, t, h] @ s))
                out[b, t, h] = q[b, t, h] @ s
            state[b, h] = s
    return out, state


@pytest.mark.smoke
@pytest.mark.parametrize("form", [recurrent, chunked])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_each_form_is_the_rule(form, length):
    inputs = problem(length, decay=0.1)
    for got, expected in zip(form(*inputs), oracle(*inputs), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [0.0, 1e-4, 1.0, 50.0])
def test_decays_from_none_to_total(decay):
    """Keys that are all alike, written at full strength, make the hardest triangular systems."""
    q, k, v, g, beta, state = problem(130, decay)
    k = np.broadcast_to(k[:, :1], k.shape)
    inputs = (q, k, v, g, np.ones_like(beta), state)
    for got, expected in zip(chunked(*inputs), oracle(*inputs), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("decay", [0.05, 200.0])
def test_gradients_agree_and_are_finite(decay):
    inputs = problem(70, decay, seed=1)

    def loss(form):
        def f(*inputs):
            out, state = form(*inputs)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

        return jax.jit(jax.grad(f, argnums=range(6)))

    for a, b in zip(
        loss(deltanet.chunked)(*inputs), loss(deltanet.recurrent)(*inputs), strict=True
    ):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_a_sequence_can_be_cut_anywhere():
    inputs = problem(150, 0.1, seed=2)
    whole, end = chunked(*inputs)
    first, state = chunked(*(x[:, :37] for x in inputs[:5]), inputs[5])
    second, state = chunked(*(x[:, 37:] for x in inputs[:5]), state)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=0, atol=1e-5)
    np.testing.assert_allclose(state, end, rtol=0, atol=1e-5)


def test_positions_without_decay_and_strength_change_nothing():
    q, k, v, g, beta, state = problem(80, 0.1, seed=3)
    mask = np.arange(80) % 3 == 0
    masked = (q, k, v, g * mask[None, :, None], beta * mask[None, :, None], state)
    out, end = chunked(*masked)
    kept = [x[:, mask] for x in masked[:5]]
    expected, expected_end = oracle(*kept, state)
    np.testing.assert_allclose(out[:, mask], expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(end, expected_end, rtol=1e-4, atol=1e-4)
