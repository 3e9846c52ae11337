"""What the benchmarks share: variants that take turns, tables, and the machine they ran on."""

from __future__ import annotations

import os
import pathlib
import platform
import re
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleave(variants: Mapping[Any, Callable], repeats: int) -> tuple[dict, dict]:
    """(seconds [repeats], the last result) of each; the variants take turns, after one go each."""
    results = {name: jax.block_until_ready(run()) for name, run in variants.items()}
    seconds: dict[Any, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            began = time.perf_counter()
            results[name] = jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return {name: np.array(s) for name, s in seconds.items()}, results


def spread(values: np.ndarray, digits: int) -> str:
    """Median (least to largest)."""
    middle, least, most = (f"{f(values):,.{digits}f}" for f in (np.median, np.min, np.max))
    return f"{middle} ({least} to {most})"


def table(*rows: tuple) -> list[str]:
    """A Markdown table; the first row is its head."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def show(title: str, command: str, figures: Mapping[str, float]) -> None:
    """Prints figures of a command, milliseconds but for the last one, which is a share."""
    rows = ((name, f"{value:.2f}") for name, value in figures.items())
    lines = [f"# {title}", "", f"    python {command}", "", f"{machine()}. {load()}.", ""]
    print("\n".join([*lines, *table(("", "ms (last row: %)"), *rows)]))


def machine() -> str:
    """Date, devices, processor and versions."""
    device = jax.devices()[0]
    devices = f"{jax.device_count()} x {device.device_kind}; {os.cpu_count()} cores of {_cpu()}"
    versions = f"Python {platform.python_version()}, jax {jax.__version__}"
    return f"{time.strftime('%Y-%m-%d')}; {devices}; {versions}"


# What products of low precision are fast by, the best first.
_INSTRUCTIONS = ("amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", "avx2")


def _cpu() -> str:
    """Its name, and the best of its instructions: clouds give a processor of any age one name."""
    info = pathlib.Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    names = re.findall("model name\\s*: (.*)", text)
    flags = set(text.partition("flags")[2].partition("\n")[0].split())
    best = next((x for x in _INSTRUCTIONS if x in flags), None)
    name = names[0] if names else platform.machine()
    return f"{name} ({best})" if best else name


def load() -> str:
    """How busy the machine is."""
    return f"Load average {os.getloadavg()[0]:.1f}"
