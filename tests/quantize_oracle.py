"""Quantization in NumPy with ml_dtypes, for the tests of it."""

import ml_dtypes
import numpy as np

from ais_jax.recipes import RECIPES

INTEGERS = ("int8", "int4")
BITS = {"float8_e4m3fn": 8, "float8_e5m2": 8, "float4_e2m1fn": 4, "int8": 8, "int4": 4}
LARGEST = {"float8_e4m3fn": 448, "float8_e5m2": 57344, "float4_e2m1fn": 6, "int8": 127, "int4": 7}
FLOOR = np.float32(2.0**-100)


def oracle(x, fmt: str, axis: int):
    """(codes in their ml_dtypes dtype, scale) of float32 `x`, in NumPy."""
    largest = np.float32(LARGEST[fmt])
    amax = np.abs(x).max(axis=axis, keepdims=True)
    scale = np.maximum(amax * (np.float32(1) / largest), FLOOR)
    scaled = np.clip(x * (np.float32(1) / scale), -largest, largest)
    return (np.rint(scaled) if fmt in INTEGERS else scaled).astype(fmt), scale


def bfloat16(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)


def same_bits(got, want):
    got, want = np.asarray(got), np.asarray(want)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8))


def all_codes(fmt: str):
    """Every finite number of a format, once for each code that stands for it."""
    if fmt in INTEGERS:
        numbers = np.arange(-(2 ** (BITS[fmt] - 1)), 2 ** (BITS[fmt] - 1)).astype(fmt)
    else:
        numbers = np.arange(2 ** BITS[fmt], dtype=np.uint8).view(fmt)
    return numbers[np.isfinite(numbers.astype(np.float64))]


def normal(seed: int, *shape: int):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def product_oracle(x, w, recipe: str):
    """(exact product of the quantized numbers, sum of the magnitudes added up), float64."""
    rule = RECIPES[recipe]
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    if rule.weights:
        codes, scale = oracle(w, rule.weights, axis=-2)
        w64 = codes.astype(np.float64) * scale
    if rule.activations:
        codes, scale = oracle(x.astype(np.float32), rule.activations, axis=-1)
        x64 = codes.astype(np.float64) * scale
    return x64 @ w64, np.abs(x64) @ np.abs(w64)
