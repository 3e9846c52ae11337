"""Log-probs and sampling against NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ais_jax.sampling import DiffusionConfig, SamplingConfig
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


def in_batches(draw, rows, keys):
    """draw(rows, keys[i]) of every i, [n, B, ...]."""
    run = jax.jit(lambda rows, keys: jax.lax.map(lambda some: draw(rows, some), keys))
    return np.asarray(run(rows, keys))  # `rows` as a constant would be folded while compiling


@pytest.mark.slow
def test_very_rare_tokens_are_drawn_as_often_as_they_should():
    """Most of a large vocabulary is less probable than the spacing of uniform float32 below 1."""
    vocab, rare, batches = 32_768, 4e-8, 192
    law = np.full(vocab, rare)
    law[0] = 1 - rare * (vocab - 1)
    logps = jnp.broadcast_to(jnp.asarray(np.log(law), jnp.float32), (64, vocab))

    keys = jax.random.split(jax.random.key(0), (batches, 64))
    seen = int((in_batches(lambda x, keys: lp.sample(x, keys)[0], logps, keys) != 0).sum())
    expected = 64 * batches * rare * (vocab - 1)
    low, high = scipy.stats.poisson.ppf([1e-3, 1 - 1e-3], expected)
    assert low <= seen <= high


@pytest.mark.parametrize("vocab", [3, 1100])
def test_positions_of_a_row_draw_on_their_own(vocab):
    """Two positions with one law: all pairs of tokens, as often as the product says."""
    law, ids = np.array([0.5, 0.3, 0.2]), np.array([0, vocab // 2, vocab - 1])
    row = np.full(vocab, -1e30, np.float32)
    row[ids] = np.log(law)
    keys = jax.random.split(jax.random.key(5), 20_000).reshape(10, -1)
    rows = jnp.broadcast_to(row, (keys.shape[1], 2, vocab))
    tokens = in_batches(lambda x, keys: lp.sample(x, keys)[0], rows, keys)
    pairs = np.searchsorted(ids, tokens.reshape(-1, 2)) @ [3, 1]
    counts = np.bincount(pairs, minlength=9)
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


@pytest.mark.parametrize("vocab", [6, 1024])
def test_noise_of_a_small_vocabulary_is_one_number_a_token(vocab):
    """Runs of the past are repeated to the bit."""
    logps = jax.nn.log_softmax(jax.random.normal(jax.random.key(0), (9, vocab)))
    keys = jax.random.split(jax.random.key(1), 9)
    noise = jnp.stack([jax.random.gumbel(key, (vocab,), mode="low") for key in keys])
    tokens, chosen = jax.jit(lp.sample)(logps, keys)
    np.testing.assert_array_equal(tokens, np.argmax(logps + noise, axis=1))
    np.testing.assert_array_equal(chosen, np.asarray(logps)[np.arange(9), np.asarray(tokens)])


VOCAB = 3000  # no multiple of a block


def large_law():
    """A few dominant tokens, many that share a fifth, some rare ones, and forbidden ids."""
    kind = np.random.default_rng(0).choice(4, VOCAB, p=[0.002, 0.678, 0.3, 0.02])
    kind[-1], kind[0] = 1, 3
    law = np.zeros(VOCAB)
    for which, share in enumerate([0.79, 0.2, 0.01]):
        law[kind == which] = share / (kind == which).sum()
    return law / law.sum(), kind


@pytest.mark.parametrize("engine", ["draw", "sample"])
def test_a_large_vocabulary_is_drawn_by_its_law(engine):
    law, kind = large_law()
    allowed, temperature = jnp.asarray(kind != 3), 0.7
    # At a forbidden id stands the largest logit.
    logits = np.where(kind == 3, 50.0, temperature * np.log(np.where(law > 0, law, 1)) + 20)
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (4000, VOCAB))

    def batch(rows, keys):
        if engine == "draw":
            return lp.draw(rows, keys, temperature, allowed)[0]
        return lp.sample(lp.log_probs(rows, temperature, allowed), keys)[0]

    keys = jax.random.split(jax.random.key(1), (25, 4000))
    tokens = in_batches(batch, rows, keys).ravel()
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[kind == 3].sum() == 0

    def grouped(x):  # thirty rare tokens are one class
        rare = x[kind == 2]
        return np.concatenate([x[kind < 2], np.add.reduceat(rare, np.arange(0, len(rare), 30))])

    expected = grouped(len(tokens) * law)
    assert expected.min() > 5
    assert scipy.stats.chisquare(grouped(counts), expected).pvalue > 1e-4


@pytest.mark.smoke
@pytest.mark.parametrize("vocab", [24, 1025, VOCAB, 20_480])
def test_a_draw_is_a_sample_of_the_log_probs(vocab):
    logits = 6 * jax.random.normal(jax.random.key(0), (16, vocab)) + 30
    allowed = jnp.arange(vocab) % 5 != 0
    keys = jax.random.split(jax.random.key(1), 16)
    draw = jax.jit(lambda logits, keys: lp.draw(logits, keys, 0.8, allowed))
    tokens, logps = draw(logits, keys)
    law = lp.log_probs(logits, 0.8, allowed)
    assert (tokens.dtype, logps.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(tokens, jax.jit(lp.sample)(law, keys)[0])
    np.testing.assert_allclose(logps, lp.pick(law, tokens)[1], atol=1e-6)
    # Whatever rows stand beside it.
    order = np.random.default_rng(2).permutation(16)
    np.testing.assert_array_equal(tokens[order], draw(logits[order], keys[order])[0])
    alone = [int(draw(logits[i, None], keys[i, None])[0][0]) for i in range(4)]
    assert alone == tokens[:4].tolist()


def truncated(logps, top_k, top_p, min_p):
    """The law in float64, from a sorted list."""
    law = np.exp(np.asarray(logps, np.float64))
    kept = np.argsort(-law)[: top_k or None]
    mass = np.cumsum(law[kept]) / law[kept].sum()
    kept = kept[: int((mass < top_p).sum()) + 1]
    kept = kept[law[kept] >= min_p * law[kept[0]]]
    result = np.zeros_like(law)
    result[kept] = law[kept] / law[kept].sum()
    return result


@pytest.mark.parametrize(
    "settings",
    [
        (1, 1.0, 0.0),
        (7, 1.0, 0.0),
        (10_000, 1.0, 0.0),
        (0, 0.3, 0.0),
        (0, 0.999, 0.0),
        (0, 1e-9, 0.0),
        (0, 1.0, 0.2),
        (0, 1.0, 1.0),
        (20, 0.8, 0.0),
        (20, 0.9, 0.15),
        (0, 0.7, 0.3),
    ],
)
def test_truncation_keeps_what_a_sorted_list_keeps(settings):
    logits = 2 * jax.random.normal(jax.random.key(4), (6, 1500))
    law = lp.log_probs(logits, 0.9, jnp.arange(1500) % 7 != 0)
    result = np.exp(jax.jit(lambda x: lp.truncate(x, *settings))(law))
    expected = np.stack([truncated(row, *settings) for row in law])
    np.testing.assert_array_equal(result > 0, expected > 0)
    np.testing.assert_allclose(result, expected, rtol=2e-5)


def test_equals_of_the_last_token_kept_stay():
    logps = jnp.log(jnp.array([0.4, 0.2, 0.2, 0.1, 0.1]))
    for settings in ((2, 1.0, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.5)):
        np.testing.assert_allclose(
            np.exp(lp.truncate(logps, *settings)), [0.5, 0.25, 0.25, 0, 0], atol=1e-6
        )


def sampling(**changes):
    return SamplingConfig(max_new_tokens=4, pad_id=0, eos_ids=(1,), token_count=9, **changes)


@pytest.mark.parametrize("vocab", [50, 5000])
def test_next_token_records_the_law_it_drew_from(vocab):
    logits = 3 * jax.random.normal(jax.random.key(0), (40, vocab))
    allowed = jnp.arange(vocab) % 3 != 0
    keys = jax.random.split(jax.random.key(1), 40)

    def run(**changes):
        tokens, logps = lp.next_token(logits, keys, sampling(**changes), allowed)
        assert (tokens.dtype, logps.dtype) == (jnp.int32, jnp.float32)
        return np.asarray(tokens), np.asarray(logps)

    masked = np.where(allowed, logits, -np.inf)
    rows = np.arange(40)
    for changes in ({}, {"top_k": 5}):  # temperature 0 needs no truncation
        tokens, logps = run(temperature=0.0, **changes)
        np.testing.assert_array_equal(tokens, masked.argmax(axis=1))
        np.testing.assert_allclose(
            logps, -np.log(np.exp(masked - masked.max(1, keepdims=True)).sum(1)), atol=1e-5
        )
    law = lp.log_probs(logits, 1.3, allowed)
    tokens, logps = run(temperature=1.3)
    assert len(set(tokens - masked.argmax(axis=1))) > 1
    np.testing.assert_allclose(logps, np.asarray(law)[rows, tokens], atol=1e-6)
    tokens, logps = run(temperature=1.3, top_k=6, top_p=0.9, min_p=0.05)
    expected = np.stack([truncated(row, 6, 0.9, 0.05) for row in law])[rows, tokens]
    np.testing.assert_allclose(np.exp(logps), expected, rtol=2e-5)
    assert len(set(tokens - masked.argmax(axis=1))) > 1


def test_of_equal_logits_the_first_is_taken_and_broken_ones_stay_in_the_vocabulary():
    logits = jnp.array([[1.0, 3.0, 0.0, 3.0], [jnp.nan] * 4])
    tokens, _ = lp.next_token(
        logits, jax.random.split(jax.random.key(0)), sampling(temperature=0.0), jnp.ones(4, bool)
    )
    assert tokens[0] == 1 and 0 <= tokens[1] < 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 2.0}, "min_p=2.0"),
        ({"min_p": 0.1, "mask_id": 8, "diffusion": DiffusionConfig(4)}, "autoregressive"),
    ],
)
def test_impossible_truncations_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        sampling(temperature=1.0, **changes)
