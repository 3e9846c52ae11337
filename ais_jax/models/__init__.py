"""Models: flax.nnx modules, used functionally.

`build(config)` splits a module once into its structure and its parameters; everything above this
package passes `params`, a nested dict of arrays (or `QuantArray`s), and calls the pure functions
of `Model`. `from_pretrained` and `save_pretrained` read and write published checkpoints.
"""

from __future__ import annotations

from ais_jax.models.cache import KVCache
from ais_jax.models.llada import LladaConfig
from ais_jax.models.model import Model, ModelConfig, Params, build, positions_of
from ais_jax.models.pretrained import (
    PretrainedModel,
    cast_params,
    from_pretrained,
    load_params,
    save_orbax,
    save_pretrained,
    shardings_of,
)
from ais_jax.models.qwen3 import Qwen3Config
from ais_jax.models.qwen3_5 import Qwen3_5Config

__all__ = [
    "KVCache",
    "LladaConfig",
    "Model",
    "ModelConfig",
    "Params",
    "PretrainedModel",
    "Qwen3Config",
    "Qwen3_5Config",
    "build",
    "cast_params",
    "from_pretrained",
    "load_params",
    "positions_of",
    "save_orbax",
    "save_pretrained",
    "shardings_of",
]
