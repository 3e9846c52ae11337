"""GRPO for language models with quantized rollouts, corrected by adaptive importance sampling.

Names are imported on first use, so that `import ais_jax.tasks` needs no jax.
"""

import importlib

_EXPORTS = {
    "AISConfig": "ais_jax.ais_config",
    "PRESETS": "ais_jax.ais_config",
    "AISResult": "ais_jax.ais",
    "Diagnostics": "ais_jax.ais",
    "ImportanceWeights": "ais_jax.ais",
    "aggregate": "ais_jax.ais",
    "ais_loss": "ais_jax.ais",
    "applied_reliability": "ais_jax.ais",
    "diagnose": "ais_jax.ais",
    "importance_weights": "ais_jax.ais",
    "loss_denominator": "ais_jax.ais",
    "mixing_coefficient": "ais_jax.ais",
    "token_weights": "ais_jax.ais",
    "QuantArray": "ais_jax.quantize",
}

__all__ = sorted([*_EXPORTS, "quantize", "tasks", "train"])


def __getattr__(name: str):
    if name in ("quantize", "tasks", "train"):
        return importlib.import_module(f"ais_jax.{name}")
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'ais_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
