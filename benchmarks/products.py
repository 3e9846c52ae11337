"""Times of the products of a feed-forward block by recipe, as a rollout computes them.

    python benchmarks/products.py --recipes none,fp8,fp8_weight_only,int8 --rows 8,64

Kernels are random and as many as do not fit into a cache. A product's time has the quantization of
its activations in it. Says which libraries XLA chose.
"""

from __future__ import annotations

import argparse
import collections
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import machine, table

from ais_jax.linear import linear
from ais_jax.quantize import bytes_of, prepare, quantize

LOOPS, ROUNDS = 10, 5


def kernels(recipe: str, blocks: int, width: int, inner: int) -> list[dict]:
    """The kernels of each block, held as they sample."""

    @jax.jit
    def block(key):
        up, down = jax.random.split(key)
        params = {
            "up_proj": 0.02 * jax.random.normal(up, (width, inner)),
            "down_proj": 0.01 * jax.random.normal(down, (inner, width)),
        }
        return prepare(quantize(params, recipe), jax.default_backend())

    return [block(jax.random.key(i)) for i in range(blocks)]


def feed_forward(x: jax.Array, layers: list[dict]) -> jax.Array:
    for w in layers:
        x = linear(jax.nn.silu(linear(x, w["up_proj"])), w["down_proj"])
    return x


@jax.jit
def repeated(x: jax.Array, layers: list[dict]) -> jax.Array:
    return jax.lax.fori_loop(0, LOOPS, lambda _, x: 0.5 * feed_forward(x, layers), x)


def measure(layers: list[dict], rows: int, width: int) -> tuple[float, float, dict]:
    """(microseconds a product, GB/s of kernels, calls of libraries by name)."""
    x = jnp.ones((rows, width), jnp.bfloat16)
    program = repeated.lower(x, layers).compile()
    jax.block_until_ready(program(x, layers))
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        jax.block_until_ready(program(x, layers))
        seconds.append(time.perf_counter() - began)
    products = 2 * len(layers)
    each = float(np.min(seconds)) / LOOPS / products
    text = program.as_text()
    found = re.findall(r'custom_call_target="([^"]+)"|"kind":"(__[a-z_]+)"', text)
    calls = collections.Counter(target or kind for target, kind in found)
    return 1e6 * each, bytes_of(layers) / products / each / 1e9, dict(calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipes", default="none,fp8,fp8_weight_only,int8")
    parser.add_argument("--rows", default="8,64")
    parser.add_argument("--blocks", type=int, default=12)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--inner", type=int, default=12288)
    args = parser.parse_args()
    print(f"{machine()}.\n")
    rows_of_table: list[tuple] = [("recipe", "rows", "us a product", "GB/s", "calls")]
    for recipe in args.recipes.split(","):
        layers = kernels(recipe, args.blocks, args.width, args.inner)
        for rows in map(int, args.rows.split(",")):
            us, rate, calls = measure(layers, rows, args.width)
            rows_of_table.append((recipe, rows, f"{us:.1f}", f"{rate:.0f}", calls))
    print("\n".join(table(*rows_of_table)))


if __name__ == "__main__":
    main()
