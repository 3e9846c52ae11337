"""Memory of scoring at the vocabulary of an 8B model, as the compiler plans it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from ais_jax.models import Qwen3Config, build
from ais_jax.sampling import Policy, Rollout, SamplingConfig
from ais_jax.sampling import logps as lp

ROWS, PROMPT, LENGTH, CHUNK = 4, 16, 1024, 128
# One small block under the embedding and the output layer of an 8B model, in float32: XLA's
# programs for CPUs hold float32 copies of bfloat16 weights.
CONFIG = Qwen3Config(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    tie_word_embeddings=False,
)
LOGITS = 4 * ROWS * LENGTH * CONFIG.vocab_size  # bytes of what must never exist


def scoring(config, chunk, trained=()):
    """Scores, or the gradient of their sum for the parameters named; and shapes to call it with."""
    sampling = SamplingConfig(LENGTH, 1.0, 0, (1,), 151_669, score_chunk=chunk)
    policy = Policy(build(config, "float32"), sampling)

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct((ROWS, *sizes), dtype)

    ids, mask = shape(jnp.int32, LENGTH), shape(bool, LENGTH)
    prompts = shape(jnp.int32, PROMPT), shape(bool, PROMPT)
    rollout = Rollout(*prompts, ids, mask, shape(jnp.float32, LENGTH), shape(bool))

    def total(some, params, rollout):
        logps, entropy = policy.score({**params, **some}, rollout)
        return jnp.sum(logps) + jnp.sum(entropy)

    params = policy.model.abstract_params()
    run = jax.value_and_grad(total) if trained else total
    return run, ({name: params[name] for name in trained}, params, rollout)


def temporaries(chunk, trained):
    """Bytes that are needed beside inputs and results; nothing is allocated."""
    run, shapes = scoring(CONFIG, chunk, trained)
    return jax.jit(run).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


# What is trained, and a fraction of the bytes of all logits. The final norm stands for all that
# is below it, whose own gradients are no part of scoring.
BOUNDS = {(): 0.22, ("norm",): 0.5, ("norm", "lm_head"): 0.5}


@pytest.mark.parametrize("trained", BOUNDS)
def test_scoring_never_holds_all_logits(trained, monkeypatch):
    bound = BOUNDS[trained] * LOGITS
    assert temporaries(CHUNK, trained) < bound
    if trained == ("norm",):
        return  # a frozen output layer has no gradient that would take a place
    # Without chunks of positions, or slices of ids, it would not hold.
    assert temporaries(LENGTH, trained) > bound
    monkeypatch.setattr(lp, "vocab_chunk", lambda *args: CONFIG.vocab_size)
    assert temporaries(CHUNK, trained) > bound


def results_in_loops(jaxpr, inside=False):
    """Shapes of all that is computed in loops of a jaxpr, however deep."""
    for equation in jaxpr.eqns:
        if inside:
            yield from (getattr(x.aval, "shape", ()) for x in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from results_in_loops(inner, inside or equation.primitive.name == "scan")


@pytest.mark.parametrize("tied", [False, True])
def test_a_slice_adds_its_part_of_the_gradient_alone(tied):
    """Not a whole kernel's, a slice and chunk of positions: that would be most of the traffic."""
    name = "embed_tokens" if tied else "lm_head"
    run, shapes = scoring(dataclasses.replace(CONFIG, tie_word_embeddings=tied), CHUNK, (name,))
    found = set(results_in_loops(jax.make_jaxpr(run)(*shapes).jaxpr))
    size = 15_232  # ten slices, of a multiple of 128
    assert {(size, 4096), (4096, size)} & found
    assert not {(CONFIG.vocab_size, 4096), (4096, CONFIG.vocab_size)} & found
