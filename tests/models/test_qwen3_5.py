"""Invariances of the hybrid architecture; test_goldens.py compares it with the reference."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import Qwen3_5TextConfig

from ais_jax.errors import UserError
from ais_jax.models import Model, Qwen3_5Config, build, positions_of, qwen3_5
from ais_jax.quantize import QuantArray, quantize

TINY = Qwen3_5Config(
    vocab_size=23,
    hidden_size=24,
    intermediate_size=32,
    num_hidden_layers=6,
    full_attention_interval=3,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=4,
    linear_value_head_dim=6,
)
MODEL = build(TINY, "float32")


@pytest.fixture(scope="module")
def params():
    """Weights large enough for states and gates to matter, not so large that rounding explodes."""
    rng = np.random.default_rng(0)

    def one(path, x):
        name = path[-1].key
        noise = rng.normal(size=x.shape)
        if "norm" in name or name in ("A_log", "dt_bias"):
            return jnp.asarray(x + 0.3 * noise, jnp.float32)
        return jnp.asarray(0.6 * noise * x.shape[-2] ** -0.5, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, MODEL.init(jax.random.key(0)))


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 23, (2, 70))


@pytest.fixture(scope="module")
def logits(params, tokens):
    result = np.asarray(MODEL.logits(params, tokens))
    assert result.std() > 0.3
    return result


def prefill(params, tokens, mask, room):
    """(logits, cache of `room` further positions, mask of keys)."""
    rows, width = tokens.shape
    key_mask = np.concatenate([mask, np.ones((rows, room), bool)], axis=1)
    cache = MODEL.empty_cache(rows, width + room)
    hidden, cache = MODEL.hidden(params, tokens, positions_of(mask), key_mask, cache, 0)
    return MODEL.unembed(params, hidden), cache, key_mask


def test_axes_and_shapes_describe_the_same_tree():
    shapes, axes = MODEL.abstract_params(), MODEL.param_axes()
    assert jax.tree.map(lambda x: x.ndim, shapes) == jax.tree.map(
        len, axes, is_leaf=lambda x: isinstance(x, tuple)
    )


@pytest.mark.smoke
def test_left_padding_changes_nothing(params, tokens, logits):
    padded = np.pad(tokens, ((0, 0), (5, 0)), constant_values=9)
    mask = np.broadcast_to(np.arange(75) >= 5, padded.shape)
    shifted = MODEL.logits(params, padded, mask)
    np.testing.assert_allclose(shifted[:, 5:], logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 3, 66])
def test_right_padding_changes_neither_logits_nor_what_follows(params, tokens, logits, cut):
    """Row 0 ends early, with fewer tokens than the convolution is wide, or in another chunk."""
    lengths = np.array([cut, 68])
    mask = np.arange(68)[None] < lengths[:, None]
    given = np.where(mask, tokens[:, :68], 11)
    prefix, cache, key_mask = prefill(params, given, mask, 2)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prefix[row, :length], logits[row, :length], rtol=0, atol=1e-4)
    following = np.take_along_axis(tokens, lengths[:, None], axis=1)
    hidden, _ = MODEL.hidden(params, following, lengths[:, None], key_mask, cache, 68)
    expected = np.take_along_axis(logits, lengths[:, None, None], axis=1)
    np.testing.assert_allclose(MODEL.unembed(params, hidden), expected, rtol=0, atol=1e-4)


def test_a_prefill_in_parts_and_decoding_equal_one_forward(params, tokens, logits):
    step = jax.jit(MODEL.hidden)
    rows, length = tokens.shape
    cache = MODEL.empty_cache(rows, length)
    key_mask = np.ones((rows, length), bool)
    start, found = 0, []
    for size in (20, 2, 40, 1, 1, 1, 1, 1, 1, 1, 1):
        part = tokens[:, start : start + size]
        positions = np.broadcast_to(np.arange(start, start + size), part.shape)
        hidden, cache = step(params, part, positions, key_mask, cache, start)
        found.append(MODEL.unembed(params, hidden))
        start += size
    np.testing.assert_allclose(jnp.concatenate(found, 1), logits, rtol=0, atol=1e-4)
    assert cache.state.dtype == jnp.float32


def test_how_blocks_are_run_keeps_the_gradient(params, tokens):
    def grad(**schedule):
        model = Model(TINY, "float32", **schedule)
        return jax.grad(lambda p: model.logits(p, tokens[:, :9]).var())(params)

    for a, b in zip(*map(jax.tree.leaves, (grad(), grad(remat=True, unroll=True))), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 * np.abs(b).max())


def test_what_is_quantized(params):
    copy = quantize(params, "fp8")
    linear, full = copy["layers"]["linear"], copy["layers"]["full"]
    quantized = {k for k, v in (linear | full).items() if isinstance(v, QuantArray)}
    attention = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj_qkv", "in_proj_z", "out_proj"}
    assert quantized == attention | {"gate_proj", "up_proj", "down_proj"}
    for name in ("A_log", "dt_bias", "conv1d", "linear_norm", "input_layernorm"):
        np.testing.assert_array_equal(linear[name], params["layers"]["linear"][name])


def test_quantized_weights_are_used_as_what_they_stand_for(params, tokens):
    copy = quantize(params, "int8_weight_only")
    whole = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, QuantArray) else x,
        copy,
        is_leaf=lambda x: isinstance(x, QuantArray),
    )
    got = MODEL.logits(copy, tokens[:, :9])
    np.testing.assert_allclose(got, MODEL.logits(whole, tokens[:, :9]), rtol=0, atol=1e-4)
    assert np.abs(got - MODEL.logits(params, tokens[:, :9])).max() > 1e-3


def test_transformers_reads_the_config_back():
    raw = qwen3_5.to_hf(TINY)
    theirs = Qwen3_5TextConfig(**{k: v for k, v in raw.items() if k != "architectures"})
    for name in (field.name for field in dataclasses.fields(TINY)):
        if name == "rope_theta" or name == "partial_rotary_factor":
            assert theirs.rope_parameters[name] == getattr(TINY, name)
        elif name != "full_attention_interval":
            assert getattr(theirs, name) == getattr(TINY, name), name
    assert theirs.layer_types == (["linear_attention"] * 2 + ["full_attention"]) * 2
    assert qwen3_5.from_hf(theirs.to_dict()) == TINY
    multimodal = {"model_type": "qwen3_5", "text_config": raw, "tie_word_embeddings": True}
    assert qwen3_5.from_hf(multimodal) == TINY


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer_types": ["full_attention", "linear_attention"] * 3}, "layer_types"),
        ({"attn_output_gate": False}, "attn_output_gate=False"),
        ({"linear_key_head_dim": None}, "linear_key_head_dim is missing"),
        ({"num_hidden_layers": 7, "layer_types": None}, "full_attention_interval=3.*=7"),
        ({"linear_num_value_heads": 3}, "linear_num_key_heads=2.*linear_num_value_heads=3"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
        ({"rope_parameters": {"partial_rotary_factor": 0.2, "rope_theta": 1e4}}, "3 rotating"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, words):
    raw = qwen3_5.to_hf(TINY)
    with pytest.raises(UserError, match=words):
        qwen3_5.from_hf({**raw, **changes})
