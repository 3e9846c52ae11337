"""Quantizing parameters that are split over 8 devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ais_jax.linear import linear
from ais_jax.quantize import changed_fraction, prepare, quantize
from ais_jax.recipes import RECIPES

# Axes of the kernel [layers, in, out] over the mesh, and what the scale [layers, 1, out] keeps.
SPECS = {
    P(None, "a", "b"): P(None, None, "b"),
    P(None, "b"): P(None, None, None),
    P(None, ("a", "b"), None): P(None, None, None),
    P("a", None, "b"): P("a", None, "b"),
    P(): P(None, None, None),
}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def weights():
    rng = np.random.default_rng(0)
    return {
        "down_proj": rng.normal(size=(2, 16, 32)).astype(np.float32),
        "embed_tokens": rng.normal(size=(8, 12)).astype(np.float32),
    }


def swapped(spec):
    layers, rows, columns = (*spec, None, None, None)[:3]
    return P(layers, columns, rows)


def equal_bits(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize(
    ("spec", "recipe"),
    [(P(None, "a", "b"), recipe) for recipe in RECIPES] + [(spec, "fp8") for spec in SPECS],
    ids=str,
)
def test_same_bits_and_same_places_as_on_one_device(mesh, spec, recipe):
    params = weights()
    placed = {
        "down_proj": jax.device_put(params["down_proj"], NamedSharding(mesh, spec)),
        "embed_tokens": jax.device_put(params["embed_tokens"], NamedSharding(mesh, P("b", "a"))),
    }
    alone = quantize(params, recipe)
    copy = quantize(placed, recipe)
    equal_bits(copy, alone)
    equal_bits(jax.jit(lambda p: quantize(p, recipe))(placed), alone)

    def lies(x, spec):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), x.sharding

    lies(copy["embed_tokens"], P("b", "a"))
    kernel = copy["down_proj"]
    if recipe == "none":
        lies(kernel, spec)
    else:
        lies(kernel.values, spec)
        lies(kernel.scale, SPECS[spec])
        lies(prepare(copy, "tpu")["down_proj"].values, spec)
        lies(prepare(copy, "cpu")["down_proj"].values, swapped(spec))
    if RECIPES[recipe].head:  # the embedding transposed; nothing moves
        head = prepare(copy, "cpu")["lm_head"]
        lies(head.values, P("b", "a"))
        lies(head.scale, P(None, "b"))


@pytest.mark.smoke
@pytest.mark.parametrize("recipe", ["none", "fp8", "int8"])
def test_products_and_counts_agree_with_one_device(mesh, recipe):
    params = weights()
    spec = NamedSharding(mesh, P(None, "a", "b"))
    placed = {**params, "down_proj": jax.device_put(params["down_proj"], spec)}
    x = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)

    def outputs(params, x):
        copy = prepare(quantize(params, recipe), "cpu")
        other = prepare(quantize(jax.tree.map(lambda w: w * 1.1, params), recipe), "cpu")
        first = jax.tree.map(lambda a: a[0], copy["down_proj"])
        return linear(x, first), changed_fraction(copy, other)

    alone = jax.jit(outputs)(params, x)
    split = jax.jit(outputs)(placed, jax.device_put(x, NamedSharding(mesh, P("b", "a"))))
    np.testing.assert_allclose(split[0], alone[0], rtol=1e-5, atol=1e-5)
    assert split[1] == alone[1]
    assert alone[1] > 0
