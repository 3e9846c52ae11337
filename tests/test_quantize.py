"""Codes, scales and products against NumPy with ml_dtypes; trees, transforms, bad input."""

import functools

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from quantize_oracle import (
    BITS,
    INTEGERS,
    LARGEST,
    all_codes,
    bfloat16,
    normal,
    oracle,
    product_oracle,
    same_bits,
)

from ais_jax.errors import UserError
from ais_jax.linear import linear
from ais_jax.quantize import (
    LINEAR_NAMES,
    QuantArray,
    bytes_of,
    changed_fraction,
    prepare,
    quantize,
)
from ais_jax.recipes import FORMATS, RECIPES, Recipe

# Of linears alone; those with the output layer are in test_quantize_layout.py.
LINEARS = [name for name in RECIPES if not RECIPES[name].head]
QUANTIZED = [name for name in LINEARS if name != "none"]
product = jax.jit(linear)


def kernel_of(w, recipe, dtype=jnp.float32) -> QuantArray:
    return quantize({"q_proj": w}, recipe, dtype)["q_proj"]


FLOATS = st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127)
TOKENS = st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100)
MATRICES = hnp.arrays(np.float32, (2, 5, 4), elements=FLOATS)


@pytest.mark.smoke
@pytest.mark.parametrize("fmt", FORMATS)
@given(w=MATRICES, narrow=st.booleans())
@settings(deadline=None, max_examples=60)
def test_codes_and_scales_equal_numpy_at_any_magnitude(fmt, w, narrow):
    got = kernel_of(w, Recipe(fmt), jnp.bfloat16 if narrow else jnp.float32)
    codes, scale = oracle(bfloat16(w) if narrow else w, fmt, axis=-2)
    same_bits(got.values, codes)
    same_bits(got.scale, scale)
    assert np.isfinite(got.dequantize()).all()


def near_ties(fmt: str):
    """[tokens, in]: a format's ties and their neighbours, at scales near powers of two."""
    numbers = np.unique(all_codes(fmt).astype(np.float32))
    numbers = numbers[np.abs(numbers) <= LARGEST[fmt]]
    ties = (numbers[1:] + numbers[:-1]) / 2
    away = [ties * np.float32(1 + i * 2.0**-13) for i in (-2, -1, 1, 2)]
    near = [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    row = np.concatenate([[LARGEST[fmt]], *near, *away]).astype(np.float32)
    return row * np.exp2(np.arange(-3, 4, dtype=np.float32))[:, None]


@pytest.mark.smoke
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("scanned", [False, True])
def test_ties_and_their_neighbours_round_once(fmt, scanned):
    w = near_ties(fmt).T
    stacked = np.stack([w, -w, 3 * w])

    def values(w):
        return kernel_of(w, Recipe(fmt)).values

    got = jax.jit(functools.partial(jax.lax.map, values) if scanned else values)(stacked)
    same_bits(got, oracle(stacked, fmt, axis=-2)[0])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("prepared", [False, True])
def test_tokens_round_as_kernels_do(fmt, prepared):
    tokens = near_ties(fmt)
    size = tokens.shape[1]
    unit = QuantArray(jnp.eye(size, dtype=jnp.float32).astype(fmt), jnp.ones((1, size)), fmt)
    unit = prepare(unit) if prepared else unit
    got = jax.jit(lambda x, w: jax.lax.map(lambda row: linear(row, w), x))(tokens, unit)
    codes, scale = oracle(tokens, fmt, axis=-1)
    np.testing.assert_array_equal(got, codes.astype(np.float32) * scale)


@pytest.mark.parametrize("fmt", FORMATS)
def test_error_stays_within_half_a_step_and_reaches_it(fmt):
    w = np.concatenate(
        [normal(0, 300, 40), np.zeros((1, 40), np.float32), normal(1, 20, 40) * 1e-4]
    )
    got = kernel_of(w, Recipe(fmt))
    scale = np.asarray(got.scale, np.float64)
    error = np.abs(np.asarray(got.values).astype(np.float64) * scale - w)
    if fmt in INTEGERS:
        bound = np.broadcast_to(scale / 2, w.shape)
    else:
        info = ml_dtypes.finfo(fmt)
        relative = np.abs(w) / (2.0 ** (info.nmant + 1) + 1)
        bound = np.maximum(relative, float(info.smallest_subnormal) / 2 * scale)
    assert (error <= bound * (1 + 1e-6)).all()
    assert (error / bound).max() > 0.95


@pytest.mark.parametrize("fmt", FORMATS)
def test_extremes_stay_finite_and_zero_stays_zero(fmt):
    column = np.float32(10.0) ** np.arange(-45, 39, dtype=np.float64)
    w = np.stack([column, column[::-1] * 1e-38, -column, 0 * column], axis=1).astype(np.float32)
    w[3] = 0
    got = kernel_of(np.stack([w, 0 * w, w]), Recipe(fmt))
    dequantized = np.asarray(got.dequantize())
    assert np.isfinite(dequantized).all() and np.isfinite(got.scale).all()
    assert (np.asarray(got.scale) > 0).all()
    assert (
        not dequantized[1].any() and not dequantized[0, 3].any() and not dequantized[0, :, 3].any()
    )
    np.testing.assert_allclose(dequantized[0, -1, 0], w[-1, 0], rtol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("magnitude", [1e-35, 1.0, 1e35])
def test_quantizing_what_was_quantized_changes_no_code(fmt, dtype, magnitude):
    w = normal(2, 64, 50) * np.float32(magnitude)
    w[:, 7] = 0
    once = kernel_of(w, Recipe(fmt), dtype)
    twice = kernel_of(once.dequantize(dtype), Recipe(fmt), dtype)
    same_bits(twice.values, once.values)
    np.testing.assert_allclose(twice.scale, once.scale, rtol=1e-6)


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantizes_the_weights_that_the_trainer_multiplies(fmt):
    w = normal(3, 400, 16)
    narrow = kernel_of(w, Recipe(fmt), jnp.bfloat16)
    same_bits(narrow.values, kernel_of(bfloat16(w), Recipe(fmt), jnp.bfloat16).values)
    assert (np.asarray(narrow.scale) != np.asarray(kernel_of(w, Recipe(fmt)).scale)).any()


def tree(layers=2, d=128, f=384):
    shapes = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (layers, d, d))
    shapes |= {"gate_proj": (layers, d, f), "up_proj": (layers, d, f), "down_proj": (layers, f, d)}
    shapes |= dict.fromkeys(("in_proj_qkv", "in_proj_z", "out_proj"), (layers, d, d))
    kernels = {name: jnp.asarray(normal(i, *s)) for i, (name, s) in enumerate(shapes.items())}
    return {
        "embed_tokens": jnp.asarray(normal(20, 512, d)),
        "lm_head": jnp.asarray(normal(21, d, 512)),
        "layers": {**kernels, "q_norm": jnp.ones((layers, d)), "steps": jnp.arange(3)},
        "norm": jnp.asarray(normal(22, d)),
        "key": jax.random.key(0),
    }


@pytest.mark.parametrize("recipe", ["none", "fp8", "fp8_weight_only", "int4"])
def test_only_the_linears_are_quantized(recipe):
    params = tree(d=32, f=48)
    copy = quantize(params, recipe)
    for name in ("embed_tokens", "lm_head"):
        same_bits(copy[name], params[name].astype(jnp.bfloat16))
    same_bits(copy["norm"], params["norm"])
    same_bits(copy["layers"]["steps"], params["layers"]["steps"])
    same_bits(copy["layers"]["q_norm"], params["layers"]["q_norm"])
    assert copy["key"] == params["key"]
    for name in LINEAR_NAMES:
        kernel = copy["layers"][name]
        if recipe == "none":
            same_bits(kernel, params["layers"][name].astype(jnp.bfloat16))
        else:
            assert kernel.shape == params["layers"][name].shape and kernel.ndim == 3
            assert kernel.values.dtype == np.dtype(RECIPES[recipe].weights)
            assert kernel.scale.shape == (2, 1, kernel.shape[-1])
            assert kernel.activation == RECIPES[recipe].activations


def test_kernels_are_found_at_any_depth_but_not_biases_or_vectors():
    linears = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4)), "gain": jnp.ones(4)}
    copy = quantize({"blocks": [{"q_proj": linears}, {"other": linears}]}, "int8")
    quantized, other = copy["blocks"][0]["q_proj"], copy["blocks"][1]["other"]
    assert isinstance(quantized["kernel"], QuantArray)
    assert quantized["bias"].dtype == quantized["gain"].dtype == jnp.bfloat16
    assert not any(isinstance(x, QuantArray) for x in other.values())
    chosen = quantize({"blocks": {"other": linears}}, "int8", targets=["other"])
    assert isinstance(chosen["blocks"]["other"]["kernel"], QuantArray)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_bytes(recipe):
    kernels = {name: tree()["layers"][name] for name in LINEAR_NAMES}
    copy, plain = (jax.eval_shape(lambda r=r: quantize(kernels, r)) for r in (recipe, "none"))
    elements = sum(x.size for x in kernels.values())
    channels = sum(2 * x.shape[-1] for x in kernels.values())
    bits = BITS[RECIPES[recipe].weights]
    assert bytes_of(copy) == elements * bits // 8 + 4 * channels
    assert bytes_of(copy) <= (0.55 if bits == 8 else 0.28) * bytes_of(plain)
    assert bytes_of(kernels) == 4 * elements


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu", None])
@pytest.mark.parametrize("fmt", FORMATS)
def test_prepare_keeps_every_number(fmt, platform):
    codes = all_codes(fmt)
    array = QuantArray(jnp.asarray(codes[:, None]), jnp.ones((1, 1)), fmt)
    held = jax.jit(functools.partial(prepare, platform=platform))({"a": array, "b": jnp.ones(2)})
    values = np.asarray(held["a"].values)
    assert held["a"].transposed == (platform != "tpu") and held["a"].shape == array.shape
    np.testing.assert_array_equal(values.ravel().astype(np.float64), codes.astype(np.float64))
    others = {"int4": "int8", "float4_e2m1fn": "float8_e4m3fn"}
    on_cpu = dict.fromkeys(("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn"), "bfloat16")
    table = {**others, **on_cpu} if platform in ("cpu", None) else others
    assert values.dtype == np.dtype(table.get(fmt, fmt))
    assert held["a"].activation == fmt and held["b"].dtype == jnp.float32


def close_product(got, want, magnitude, terms: int):
    """Within float32 accumulation of `terms` products, and the last rounding to bfloat16."""
    last = 2.0**-8 if got.dtype == ml_dtypes.bfloat16 else 0
    error = np.abs(got.astype(np.float64) - want)
    assert (error <= (terms + 4) * 2.0**-24 * magnitude * (1 + last) + last * np.abs(want)).all()


@pytest.mark.parametrize("platform", [None, "cpu", "gpu"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("recipe", LINEARS)
def test_linear_is_the_product_of_the_quantized_numbers(recipe, dtype, platform):
    w, x = bfloat16(normal(4, 48, 24)), np.array(normal(5, 2, 3, 48))
    x[..., :2] *= 30
    x[1, 2] = 0
    x = np.asarray(jnp.asarray(x, dtype))
    copy = quantize({"q_proj": w}, recipe)
    got = np.asarray(product(x, (prepare(copy, platform) if platform else copy)["q_proj"]))
    assert got.dtype == x.dtype
    close_product(got, *product_oracle(x, w, recipe), terms=48)


@pytest.mark.parametrize("recipe", ["none", "fp8", "fp8_weight_only", "int8"])
def test_leading_axes_are_rows(recipe):
    w, x = quantize({"q_proj": normal(4, 48, 24)}, recipe)["q_proj"], normal(5, 2, 3, 48)
    rows = np.asarray(product(x.reshape(6, 48), w))
    np.testing.assert_allclose(np.asarray(product(x, w)).reshape(6, 24), rows, atol=1e-5)
    np.testing.assert_allclose(product(x[1, 2], w), rows[5], atol=1e-5)


@pytest.mark.parametrize("recipe", QUANTIZED)
def test_linear_takes_tokens_of_any_magnitude(recipe):
    w = bfloat16(normal(6, 6, 4))
    copy = prepare(quantize({"q_proj": w}, recipe))["q_proj"]

    @given(x=hnp.arrays(np.float32, (3, 6), elements=TOKENS))
    @settings(deadline=None, max_examples=50)
    def check(x):
        want, magnitude = product_oracle(x, w, recipe)
        error = np.abs(np.asarray(product(x, copy)).astype(np.float64) - want)
        assert (error <= 10 * 2.0**-24 * magnitude + 2.0**-120).all()

    check()


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", LINEARS)
@pytest.mark.parametrize("prepared", [False, True])
def test_stacked_kernels_scan_and_vmap(recipe, prepared):
    # Odd sizes: two numbers of four bits share a byte on some versions.
    w, x = bfloat16(normal(7, 3, 33, 15) / 6), normal(8, 5, 33)
    copy = quantize({"q_proj": w}, recipe)
    stacked = (prepare(copy) if prepared else copy)["q_proj"]
    by_token = functools.partial(linear, x)
    for got in (jax.jit(functools.partial(jax.lax.map, by_token)), jax.jit(jax.vmap(by_token))):
        for result, layer in zip(np.asarray(got(stacked)), w, strict=True):
            close_product(result, *product_oracle(x, layer, recipe), terms=33)


def test_quantize_inside_jit_equals_quantize_outside():
    params = tree(d=32, f=48)
    inside = jax.jit(lambda p: quantize(p, "fp8"))(params)
    for got, want in zip(
        jax.tree.leaves(inside["layers"]),
        jax.tree.leaves(quantize(params, "fp8")["layers"]),
        strict=True,
    ):
        same_bits(got, want)


class Stack(nnx.Module):
    """Two stacked layers under a scan, as the models have them."""

    def __init__(self, w):
        self.q_proj = nnx.Param(jnp.asarray(w))

    def __call__(self, x):
        graphdef, stacked = nnx.split(self)

        def block(x, p):
            return linear(x, nnx.merge(graphdef, p).q_proj.get_value()), None

        return jax.lax.scan(block, x, stacked)[0]


def test_survives_flax_modules_and_checkpoints(tmp_path):
    w, x = normal(9, 2, 16, 16) / 4, normal(10, 4, 16)
    graphdef, state = nnx.split(Stack(w))
    for recipe in ("fp8", "int4", "fp4"):
        copy = quantize(nnx.to_pure_dict(state), recipe)
        got = jax.jit(lambda c: nnx.merge(graphdef, c)(x))(copy)
        layers = [jax.tree.map(lambda a, i=i: a[i], copy["q_proj"]) for i in range(2)]
        np.testing.assert_allclose(
            got, product(product(x, layers[0]), layers[1]), rtol=1e-5, atol=1e-5
        )
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / recipe, copy)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / recipe, jax.eval_shape(lambda c=copy: c))
        assert jax.tree.structure(restored) == jax.tree.structure(copy)
        jax.tree.map(same_bits, restored, copy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (9, 12), (2, 5, 12)])
def test_a_plain_product_and_its_gradient(shape, dtype):
    x, w = jnp.asarray(normal(11, *shape), dtype), normal(12, 12, 8)
    g = jnp.asarray(normal(13, *shape[:-1], 8), dtype)
    y, pull = jax.vjp(jax.jit(linear), x, w)
    dx, dw = pull(g)
    x64, g64 = (np.asarray(a).astype(np.float64).reshape(-1, a.shape[-1]) for a in (x, g))
    w64 = np.asarray(jnp.asarray(w).astype(dtype)).astype(np.float64)
    y, magnitude = np.asarray(y).reshape(-1, 8), np.abs(x64) @ np.abs(w64)
    close_product(y, x64 @ w64, magnitude, terms=12)
    assert dx.dtype == y.dtype == dtype and dw.dtype == jnp.float32
    rtol = 2.0**-8 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(
        np.asarray(dx).astype(np.float64), (g64 @ w64.T).reshape(shape), rtol=rtol, atol=1e-5
    )
    # Not rounded to bfloat16 on its way to the float32 weights.
    np.testing.assert_allclose(dw, x64.T @ g64, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", QUANTIZED)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_weight_or_token_is_loud(recipe, bad):
    w, x = normal(14, 8, 3), normal(15, 2, 8)
    broken = w.copy()
    broken[4, 1] = bad
    out = np.asarray(product(x, kernel_of(broken, recipe)))
    assert not np.isfinite(out[:, 1]).any() and np.isfinite(out[:, [0, 2]]).all()
    x[1, 0] = bad
    out = np.asarray(product(x, kernel_of(w, recipe)))
    assert not np.isfinite(out[1]).any() and np.isfinite(out[0]).all()


@pytest.mark.parametrize(
    ("recipe", "prepared"),
    [("none", False), ("fp8", False), ("fp8", True), ("int4", True), ("fp4", False)],
)
def test_changed_fraction_counts_numbers(recipe, prepared):
    old, new = tree(d=32, f=48), tree(d=32, f=48)
    new["layers"]["o_proj"] = new["layers"]["o_proj"] + 0.05 * normal(16, 2, 32, 32)
    copies = [quantize(p, recipe) for p in (old, new)]
    a, b = (np.asarray(getattr(x, "values", x)) for x in (c["layers"]["o_proj"] for c in copies))
    counted = [x for x in jax.tree.leaves(old) if jnp.issubdtype(x.dtype, jnp.floating)]
    if recipe != "none":
        counted = [old["layers"][name] for name in LINEAR_NAMES]
    want = (a.astype(np.float32) != b.astype(np.float32)).sum() / sum(x.size for x in counted)
    if prepared:
        copies = [prepare(c) for c in copies]
    got = jax.jit(changed_fraction)(*copies)
    assert got.dtype == jnp.float32 and want > 0
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert changed_fraction(copies[0], copies[0]) == 0


def test_changed_fraction_of_nothing_and_of_more_than_float32_can_count():
    assert np.isnan(changed_fraction({"a": jnp.arange(3)}, {"a": jnp.arange(4)}))
    zeros, ones = (
        QuantArray(jnp.full((2, 4096, 4099), i, jnp.int8), jnp.ones((2, 1, 4099))) for i in (0, 1)
    )
    assert changed_fraction(zeros, ones) == 1
    # An 8B model has more codes than an int32 counts; this is only traced.
    large = QuantArray(
        jax.ShapeDtypeStruct((36, 4096, 24576), jnp.int8), jax.ShapeDtypeStruct((1,), jnp.float32)
    )
    assert jax.eval_shape(changed_fraction, large, large).dtype == jnp.float32


def test_bad_input():
    w = jnp.ones((4, 4))
    with pytest.raises(UserError, match=r"nothing to quantize to int8: no kernel is named q_proj"):
        quantize({"proj": w}, "int8")
    with pytest.raises(TypeError, match=r"layers\.q_proj is quantized already"):
        quantize(quantize({"layers": {"q_proj": w}}, "int8"), "int8")
    for x, kernel in [(w[:, :3], w), (w, w[None]), (w, kernel_of(w[None], "fp8"))]:
        with pytest.raises(ValueError, match=r"linear: x \(4, .\) and w \(.*4, 4\) must be"):
            linear(x, kernel)
