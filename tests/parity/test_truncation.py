"""Truncated laws against the warpers of transformers."""
# ruff: noqa: E402

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity")

from transformers import generation

from ais_jax.sampling import logps as lp

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        (12, 1.0, 0.0),
        (0, 0.85, 0.0),
        (0, 1.0, 0.1),
        (40, 0.9, 0.0),
        (40, 0.95, 0.05),
        (0, 0.8, 0.2),
    ],
)
def test_the_same_tokens_stay_with_the_same_probabilities(top_k, top_p, min_p):
    logits = np.array(3 * jax.random.normal(jax.random.key(0), (5, 2000)))
    warpers = [generation.TemperatureLogitsWarper(0.7)]
    if top_k:
        warpers.append(generation.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(generation.TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(generation.MinPLogitsWarper(min_p))
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(None, scores)
    theirs = torch.softmax(scores.double(), -1).numpy()
    law = lp.log_probs(jnp.asarray(logits), 0.7, jnp.ones(2000, bool))
    ours = np.exp(lp.truncate(law, top_k, top_p, min_p))
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
