"""Invariances of the architecture; test_goldens.py compares its logits with the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax.models import Model, Qwen3Config, build

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


@pytest.mark.parametrize(
    "schedule",
    [
        {"remat": True},
        {"remat": True, "remat_keeps": "products"},
        {"unroll": True},
        {"attention": "chunked"},
    ],
    ids=str,
)
def test_how_blocks_are_run_keeps_the_gradient(schedule):
    tokens = jax.random.randint(jax.random.key(1), (2, 7), 0, 23)
    params = build(TINY).init(jax.random.key(0))

    def grad(**schedule):
        model = Model(TINY, "float32", **schedule)
        return jax.grad(lambda p: model.logits(p, tokens).var())(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        grad(),
        grad(**schedule),
    )


def test_what_remat_keeps_is_not_computed_again():
    """Products with weights, whose results take memory instead."""
    params = build(TINY).abstract_params()
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)

    def plan(**schedule):
        model = Model(TINY, "bfloat16", **schedule)
        grad = jax.jit(jax.grad(lambda p, t: model.logits(p, t).var()))
        compiled = grad.lower(params, tokens).compile()
        return compiled.cost_analysis()["flops"], compiled.memory_analysis().temp_size_in_bytes

    everything, least = plan(remat=True)
    some, more = plan(remat=True, remat_keeps="products")
    none, most = plan()
    assert none < some < everything
    assert least < more < most


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_key_value_heads", 3), ("head_dim", 15), ("num_hidden_layers", 0), ("hidden_size", -1)],
)
def test_impossible_sizes_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"{field}={value}"):
        Qwen3Config(**{field: value})
