"""Where compiled programs and warm-ups are kept from run to run."""

from __future__ import annotations

import os
import pathlib


def keep(least_seconds: float = 1.0) -> None:
    """A second run starts without compiling, unless JAX is told another place.

    Args:
      least_seconds: what took less to compile is not kept.
    """
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least_seconds)


def cache_directory() -> pathlib.Path:
    """Where warm-ups are kept: $XDG_CACHE_HOME/ais_jax, by default ~/.cache/ais_jax."""
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "ais_jax"
