"""Parameter counts of the published sizes; nothing is allocated."""

import math

import jax
import pytest

from ais_jax.models import LladaConfig, Qwen3_5Config, build
from ais_jax.models.checkpoint import tensors_of
from ais_jax.models.published import PUBLISHED

# As their model cards and indices say, or from their published sizes by hand.
KNOWN = {
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3.5-0.8B": 752_393_024,
    "Qwen3.5-4B": 4_205_751_296,
    "Qwen3.5-9B": 8_953_803_264,
    "Qwen3.5-27B": 26_895_998_464,
    "LLaDA-8B-Base": 8_015_581_184,
    "LLaDA-8B-Instruct": 8_015_581_184,
    "SmolLM2-135M-Instruct": 134_515_008,
}
TENSORS = {"Qwen3-8B": 399, "LLaDA-8B-Instruct": 291, "SmolLM2-135M-Instruct": 272}


def count_by_hand(c):
    """Numbers in the matrices and vectors of an architecture, from its description."""
    if isinstance(c, LladaConfig):
        block = 4 * c.d_model**2 + 3 * c.d_model * c.mlp_hidden_size + 2 * c.d_model
        return 2 * c.vocab_size * c.d_model + c.n_layers * block + c.d_model
    d, h = c.hidden_size, c.head_dim
    q, kv = c.num_attention_heads * h, c.num_key_value_heads * h
    shared = 3 * d * c.intermediate_size + 2 * d
    outside = (1 if c.tie_word_embeddings else 2) * c.vocab_size * d + d
    if not isinstance(c, Qwen3_5Config):
        norms = 2 * h if c.qk_norm else 0
        return outside + c.num_hidden_layers * (shared + 2 * d * q + 2 * d * kv + norms)
    keys = c.linear_num_key_heads * c.linear_key_head_dim
    values = c.linear_num_value_heads * c.linear_value_head_dim
    linear = d * (2 * keys + values) + (2 * keys + values) * c.linear_conv_kernel_dim
    linear += 2 * d * values + 2 * d * c.linear_num_value_heads
    linear += 2 * c.linear_num_value_heads + c.linear_value_head_dim
    full = 3 * d * q + 2 * d * kv + 2 * h
    groups = c.num_hidden_layers // c.full_attention_interval
    inside = (c.num_hidden_layers - groups) * linear + groups * full
    return outside + c.num_hidden_layers * shared + inside


@pytest.mark.smoke
@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts(name):
    config = PUBLISHED[name]
    sizes = [math.prod(x.shape) for x in jax.tree.leaves(build(config).abstract_params())]
    assert sum(sizes) == count_by_hand(config)
    if name in KNOWN:  # Qwen3.5-2B's count was not to be had
        assert sum(sizes) == KNOWN[name]
    tensors = tensors_of(config)
    assert len({t.name for t in tensors}) == len(tensors) == TENSORS.get(name, len(tensors))
