"""What the machine can do, measured beside what is done: a contestant, see peers/worker.py.

A request is answered with the bytes a second of reading and copying a large array, and the
operations a second of a large product in each format, each the fastest of several goes.
"""

from __future__ import annotations

import functools
import os
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from peers.worker import serve

GOES = 3


def fastest(run: Callable) -> float:
    """Seconds of the fastest go."""
    seconds = []
    for _ in range(GOES):
        began = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def host_memory(count: int) -> dict[str, Callable[[], float]]:
    """Bytes a second of reading, and of copying (read and written), with a thread a core."""
    threads = os.cpu_count() or 1
    sources = np.split(np.ones(count, np.float32), threads)
    targets = np.split(np.zeros(count, np.float32), threads)

    def together(function, *parts):
        workers = [
            threading.Thread(target=function, args=part) for part in zip(*parts, strict=True)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    array = jnp.ones(count, jnp.float32)
    reduce = jax.jit(jnp.max)
    jax.block_until_ready(reduce(array))
    return {
        "read": lambda: (
            4
            * count
            / min(fastest(lambda: reduce(array)), fastest(lambda: together(np.max, sources)))
        ),
        "copy": lambda: 8 * count / fastest(lambda: together(np.copyto, targets, sources)),
    }


def device_memory(count: int) -> dict[str, Callable[[], float]]:
    """The same of an accelerator's memory."""
    array = jnp.ones(count, jnp.float32)
    reduce, add = jax.jit(jnp.max), jax.jit(lambda x: x + 1)
    jax.block_until_ready((reduce(array), add(array)))
    return {
        "read": lambda: 4 * count / fastest(lambda: reduce(array)),
        "copy": lambda: 8 * count / fastest(lambda: add(array)),
    }


def products(size: int, formats: tuple[str, ...]) -> dict[str, Callable[[], float]]:
    """Operations a second of the product of two square matrices, in the faster of two layouts."""

    def rate(name: str) -> Callable[[], float]:
        integer = name.startswith("int")
        x, w = (jax.random.normal(jax.random.key(i), (size, size)) for i in range(2))
        x, w = ((a * (32 if integer else 1)).astype(name) for a in (x, w))
        dots = [
            functools.partial(jax.jit(_dot, static_argnums=(2, 3)), x, w, axis, integer)
            for axis in (0, 1)
        ]
        jax.block_until_ready([dot() for dot in dots])
        return lambda: 2 * size**3 / min(fastest(dot) for dot in dots)

    return {name: rate(name) for name in formats}


def _dot(x: jax.Array, w: jax.Array, axis: int, integer: bool) -> jax.Array:
    exact = jnp.int32 if integer else jnp.float32
    return jax.lax.dot_general(x, w, (((1,), (axis,)), ((), ())), preferred_element_type=exact)


def load(job: dict):
    if jax.default_backend() == "cpu":
        formats = ("float32", "bfloat16", "int8")
        rates = {**host_memory(2**27), **products(2048, formats)}
    else:
        formats = ("bfloat16", "int8", "float8_e4m3fn")
        rates = {**device_memory(2**30), **products(8192, formats)}
    return lambda request: {name: rate() for name, rate in rates.items()}, {}


if __name__ == "__main__":
    serve(load)
