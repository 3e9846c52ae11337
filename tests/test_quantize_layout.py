"""How a kernel is held, slices of it, the output layer, and codes of keys and values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quantize_oracle import BITS, bfloat16, normal, oracle, product_oracle, same_bits

from ais_jax import mesh as mesh_lib
from ais_jax.linear import LoraArray, columns, linear, wide_linear
from ais_jax.quantize import (
    QuantArray,
    bytes_of,
    changed_fraction,
    copy_axes,
    kv_codes,
    prepare,
    quantize,
)
from ais_jax.recipes import FORMATS, KV_FORMATS, RECIPES

HEADS = [name for name, recipe in RECIPES.items() if recipe.head]
WEIGHT_ONLY = ["fp8_weight_only", "int8_weight_only"]


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_a_layout_changes_nothing_but_the_order_in_memory(fmt, platform):
    values = normal(0, 3, 5, 7).astype(fmt)
    plain = QuantArray(jnp.asarray(values), jnp.asarray(normal(1, 3, 1, 7)), fmt)
    held = prepare(plain, platform)
    assert held.transposed == (platform in ("cpu", "gpu"))
    assert held.values.shape == ((3, 7, 5) if held.transposed else (3, 5, 7))
    assert held.shape == plain.shape == (3, 5, 7) and held.ndim == 3
    same_bits(held.scale, plain.scale)
    same_bits(held.dequantize(), plain.dequantize())
    # Prepared once more, or for another platform after all.
    again = prepare(held, platform)
    same_bits(again.values, held.values)
    assert again.transposed == held.transposed
    other = prepare(held, "tpu")
    assert not other.transposed
    same_bits(other.dequantize(), plain.dequantize())
    width = {"cpu": {"float": 2}}.get(platform, {}).get(fmt[:5], 1)
    assert bytes_of(held) == width * 3 * 5 * 7 + 4 * 3 * 7


def test_changed_fraction_of_two_copies_in_either_layout():
    old = {"q_proj": normal(2, 5, 7)}
    new = {"q_proj": old["q_proj"] + 0.02 * normal(3, 5, 7)}
    copies = [quantize(p, "int8") for p in (old, new)]
    want = np.mean(np.asarray(copies[0]["q_proj"].values) != np.asarray(copies[1]["q_proj"].values))
    assert 0 < want < 1
    assert changed_fraction(*copies) == np.float32(want)
    assert changed_fraction(*(prepare(c, "cpu") for c in copies)) == np.float32(want)


@pytest.mark.parametrize("recipe", WEIGHT_ONLY)
@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_the_gradient_through_a_frozen_kernel(recipe, platform):
    w, x, g = normal(4, 12, 8), normal(5, 2, 3, 12), normal(6, 2, 3, 8)
    kernel = prepare(quantize({"q_proj": w}, recipe, jnp.float32), platform)["q_proj"]
    (dx,) = jax.vjp(lambda x: linear(x, kernel), x)[1](g)
    codes, scale = oracle(w, RECIPES[recipe].weights, axis=-2)
    want = g.astype(np.float64) @ (codes.astype(np.float64) * scale).T
    np.testing.assert_allclose(dx, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("platform", [None, "cpu", "tpu"])
@pytest.mark.parametrize("recipe", ["none", "fp8", "fp8_weight_only", "int8"])
def test_wide_linear_is_not_rounded(recipe, platform):
    w = bfloat16(normal(7, 48, 24))
    x = np.asarray(jnp.asarray(normal(8, 2, 3, 48), jnp.bfloat16))
    copy = quantize({"q_proj": w}, recipe)
    got = wide_linear(x, (prepare(copy, platform) if platform else copy)["q_proj"])
    assert got.dtype == jnp.float32
    want, magnitude = product_oracle(x, w, recipe)
    assert (np.abs(np.asarray(got, np.float64) - want) <= 52 * 2.0**-24 * magnitude).all()
    same_bits(
        linear(jnp.asarray(x), copy["q_proj"]), wide_linear(x, copy["q_proj"]).astype(x.dtype)
    )


def kernels():
    """Kernels [12, 40] in every form."""
    w = normal(9, 12, 40)
    for recipe in ("none", "int8", "fp8_weight_only", "int4"):
        copy = quantize({"q_proj": w}, recipe, jnp.float32)
        yield recipe, copy["q_proj"]
        for platform in ("cpu", "tpu"):
            yield f"{recipe} {platform}", prepare(copy, platform)["q_proj"]
    base = quantize({"q_proj": w}, "int8_weight_only", jnp.float32)["q_proj"]
    a, b = jnp.asarray(normal(10, 12, 3)), jnp.asarray(normal(11, 3, 40))
    yield "lora", LoraArray(jnp.asarray(w), a, b, 2.0)
    yield "lora int8", LoraArray(base, a, b, 2.0)
    yield "lora int8 cpu", LoraArray(prepare(base, "cpu"), a, b, 2.0)


KERNELS = dict(kernels())


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize(("start", "size"), [(0, 8), (13, 8), (32, 8), (0, 40), (5, 1)])
def test_columns_are_columns_of_the_product(name, start, size):
    kernel, x = KERNELS[name], jnp.asarray(normal(12, 4, 12))
    whole = np.asarray(wide_linear(x, kernel))

    @functools.partial(jax.jit, static_argnums=2)
    def part(kernel, start, size):
        cut = columns(kernel, start, size)
        assert cut.shape == (12, size)
        return wide_linear(x, cut)

    got = np.asarray(part(kernel, start, size))
    np.testing.assert_allclose(got, whole[:, start : start + size], rtol=1e-5, atol=1e-5)


def test_columns_of_stacked_kernels_and_too_many():
    stacked = prepare(quantize({"q_proj": normal(13, 3, 12, 40)}, "int8"), "cpu")["q_proj"]
    cut = columns(stacked, 7, 5)
    assert cut.shape == (3, 12, 5)
    same_bits(cut.dequantize(), stacked.dequantize()[..., 7:12])
    with pytest.raises(ValueError, match="size=41 is more than the 40 columns"):
        columns(stacked, 0, 41)


def policy(tied: bool):
    params = {
        "embed_tokens": normal(14, 40, 12),
        "layers": {"q_proj": normal(15, 2, 12, 20), "q_norm": np.ones((2, 12), np.float32)},
    }
    return params if tied else params | {"lm_head": normal(16, 12, 40)}


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("platform", [None, "cpu", "gpu", "tpu"])
def test_the_output_layer_is_quantized(recipe, tied, platform):
    params, rule = policy(tied), RECIPES[recipe]
    copy = quantize(params, recipe)
    copy = prepare(copy, platform) if platform else copy
    same_bits(copy["embed_tokens"], jnp.asarray(params["embed_tokens"], jnp.bfloat16))
    head = copy["lm_head"]
    table = params["embed_tokens"].T if tied else params["lm_head"]
    codes, scale = oracle(bfloat16(table), rule.weights, axis=-2)
    assert head.shape == (12, 40) and head.activation == rule.activations
    np.testing.assert_array_equal(head.dequantize(), codes.astype(np.float32) * scale)
    same_bits(head.scale, scale)
    want, magnitude = product_oracle(normal(17, 3, 12), bfloat16(table), recipe)
    got = np.asarray(wide_linear(jnp.asarray(normal(17, 3, 12)), head), np.float64)
    assert (np.abs(got - want) <= 16 * 2.0**-24 * magnitude).all()


@pytest.mark.parametrize("recipe", HEADS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_other_layers_are_those_of_the_recipe_without_the_output_layer(recipe, tied):
    copy, plain = (quantize(policy(tied), r) for r in (recipe, recipe.removesuffix("_head")))
    jax.tree.map(same_bits, copy["layers"], plain["layers"])
    added = bytes_of(copy) - bytes_of(plain)
    assert added == 40 * 12 + 4 * 40 - (0 if tied else 2 * 40 * 12)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("tied", [False, True])
def test_axes_of_a_copy_follow_its_layout(platform, tied):
    axes = {
        "embed_tokens": ("vocab", "embed"),
        "layers": {"q_proj": ("layers", "embed", "heads"), "q_norm": ("layers", "norm")},
    }
    if not tied:
        axes["lm_head"] = ("embed", "vocab")
    copy = prepare(quantize(policy(tied), "int8_head"), platform)
    got = copy_axes(axes, copy)
    swap = platform == "cpu"
    assert got["embed_tokens"] == ("vocab", "embed")
    assert got["layers"]["q_norm"] == ("layers", "norm")
    assert got["layers"]["q_proj"].values == (
        ("layers", "heads", "embed") if swap else ("layers", "embed", "heads")
    )
    assert got["layers"]["q_proj"].scale == ("layers", "embed", "heads")
    assert got["lm_head"].values == (("vocab", "embed") if swap else ("embed", "vocab"))
    # Slices of a stack, in the place of the stack, lack its axis.
    first = jax.tree.map(lambda x: x[0], copy["layers"]["q_proj"])
    apart = copy_axes(axes, copy | {"layers": copy["layers"] | {"q_proj": [first, first]}})
    assert apart["layers"]["q_proj"][1].values == (
        ("heads", "embed") if swap else ("embed", "heads")
    )
    mesh = jax.make_mesh((1, 2, 4), mesh_lib.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    places = mesh_lib.param_shardings(got, copy, mesh, mesh_lib.ROLLOUT_RULES)
    split = jax.device_put(copy, places)["layers"]["q_proj"]
    assert split.values.sharding.shard_shape((2, 20, 12) if swap else (2, 12, 20)) == (
        (2, 5, 12) if swap else (2, 12, 5)
    )
    assert split.scale.sharding.shard_shape((2, 1, 20)) == (2, 1, 5)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_codes_of_keys_and_values_equal_numpy(kv_format, dtype):
    x = jnp.asarray(normal(18, 2, 3, 5, 16) * 10.0 ** np.arange(-2, 3)[:, None], dtype)
    x = x.at[0, 0, 0].set(0)
    values, scale = jax.jit(functools.partial(kv_codes, kv_format=kv_format))(x)
    fmt = KV_FORMATS[kv_format]
    codes, want = oracle(np.asarray(x, np.float32), fmt, axis=-1)
    same_bits(values, codes)
    same_bits(scale, want)
    assert scale.shape == (2, 3, 5, 1) and BITS[fmt] == 8
    assert not np.asarray(values[0, 0, 0]).astype(np.float32).any()
