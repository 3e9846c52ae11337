"""The architecture against reference logits, against NumPy, and its invariances."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from ais_jax.models import Qwen3Config, build, positions_of

TINY = Qwen3Config(
    vocab_size=23,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e4,
)


def golden(shared_file, name):
    config = json.loads(shared_file(f"goldens/{name}.config.json").read_text())
    tensors = load_file(shared_file(f"goldens/{name}.safetensors"))
    qk_norm = "model.layers.0.self_attn.q_norm.weight" in tensors
    names = {field for field in Qwen3Config.__dataclass_fields__ if field in config}
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    sizes = {"head_dim": head_dim, **{name: config[name] for name in names}}
    model = build(Qwen3Config(**sizes, qk_norm=qk_norm), "float32")

    def stack(part, transpose):
        rows = [
            tensors[f"model.layers.{i}.{part}.weight"] for i in range(config["num_hidden_layers"])
        ]
        return np.stack([row.T if transpose else row for row in rows])

    blocks = {f"{p}_proj": stack(f"self_attn.{p}_proj", True) for p in "qkvo"}
    blocks |= {f"{p}_proj": stack(f"mlp.{p}_proj", True) for p in ("gate", "up", "down")}
    norms = ["input_layernorm", "post_attention_layernorm"]
    blocks |= {name: stack(name, False) for name in norms}
    if qk_norm:
        blocks |= {name: stack(f"self_attn.{name}", False) for name in ("q_norm", "k_norm")}
    params = {
        "embed_tokens": tensors["model.embed_tokens.weight"],
        "norm": tensors["model.norm.weight"],
        "layers": blocks,
    }
    if not model.config.tie_word_embeddings:
        params["lm_head"] = tensors["lm_head.weight"].T
    reference = {k[4:]: v for k, v in tensors.items() if k.startswith("ref.")}
    return model, jax.tree.map(jnp.asarray, params), reference


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["qwen3_tiny", "llama_tiny"])
def test_logits_equal_the_reference(shared_file, name):
    model, params, ref = golden(shared_file, name)
    logits = model.logits(params, ref["input_ids"])
    np.testing.assert_allclose(logits, ref["logits"], atol=2e-5)

    mask = ref["left_pad_mask"].astype(bool)
    padded = model.logits(params, ref["left_pad_ids"], mask)
    np.testing.assert_allclose(padded[mask], ref["left_pad_logits"][mask], atol=2e-5)


@pytest.mark.parametrize("name", ["qwen3_tiny", "llama_tiny"])
def test_a_cached_step_equals_the_reference(shared_file, name):
    model, params, ref = golden(shared_file, name)
    ids, mask = ref["left_pad_ids"], jnp.asarray(ref["left_pad_mask"].astype(bool))
    rows, width = ids.shape
    key_mask = jnp.concatenate([mask, jnp.ones((rows, 2), bool)], axis=1)
    cache = model.empty_cache(rows, width + 2)
    _, cache = model.hidden(params, ids, positions_of(mask), key_mask, cache, 0)
    position = mask.sum(axis=1, dtype=jnp.int32)[:, None]
    hidden, _ = model.hidden(params, ref["decode_token"], position, key_mask, cache, width)
    np.testing.assert_allclose(
        model.unembed(params, hidden)[:, 0], ref["decode_logits"].reshape(rows, -1), atol=2e-5
    )


def test_axes_and_shapes_describe_the_same_tree():
    model = build(TINY)
    shapes, axes = model.abstract_params(), model.param_axes()
    assert jax.tree.map(lambda x: x.ndim, shapes) == jax.tree.map(
        len, axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    created = jax.eval_shape(model.init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), created) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )


def test_left_padding_changes_nothing():
    model = build(TINY, "float32")
    params = model.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 23)
    plain = model.logits(params, tokens)
    padded = jnp.pad(tokens, ((0, 0), (5, 0)), constant_values=9)
    mask = jnp.arange(12)[None] >= 5
    shifted = model.logits(params, padded, jnp.broadcast_to(mask, padded.shape))
    np.testing.assert_allclose(shifted[:, 5:], plain, atol=2e-5)


def test_rematerialisation_keeps_the_gradient():
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 23)
    params = build(TINY).init(jax.random.key(0))

    def grad(remat):
        model = build(TINY, "float32", remat)
        return jax.grad(lambda p: model.logits(p, tokens).var())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), grad(False), grad(True)
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", 3), ("head_dim", 15), ("num_hidden_layers", 0), ("hidden_size", -1)],
)
def test_impossible_sizes_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Qwen3Config(**{field: value})
