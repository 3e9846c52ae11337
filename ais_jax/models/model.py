"""A model's structure, whatever its architecture, as pure functions of its parameters."""

from __future__ import annotations

import dataclasses
import functools
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh

from ais_jax.linear import columns, wide_linear
from ais_jax.models import cache as cache_lib
from ais_jax.models import layers, llada, qwen3, qwen3_5
from ais_jax.models.blocks import Schedule, is_unstacked, unstack
from ais_jax.quantize import QuantArray

Params = dict[str, Any]
ModelConfig = qwen3.Qwen3Config | qwen3_5.Qwen3_5Config | llada.LladaConfig

# One module an architecture, each with
#   Network        the nnx module: hidden
#   empty_cache    what is kept of the tokens before
#   CACHE_AXES     names of its axes
#   MODEL_TYPES    the model_type of the published configs it reads
#   from_hf, to_hf between such a config.json and its dataclass
#   PREFIXES       of its tensors' names; text models and multimodal ones may differ
#   tensors        its tensors: published name, parameter, layout
#   STORED_DTYPE   names of parameters that are never rounded to bfloat16 when read
_FAMILIES: dict[type, ModuleType] = {
    qwen3.Qwen3Config: qwen3,
    qwen3_5.Qwen3_5Config: qwen3_5,
    llada.LladaConfig: llada,
}
FAMILIES = tuple(_FAMILIES.values())


def family(config: ModelConfig) -> ModuleType:
    """The module of the architecture that a config is of."""
    return _FAMILIES[type(config)]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model's structure. Hashable, so a static argument; parameters are passed to each call.

    Attributes:
      config: sizes.
      dtype: dtype of activations, "bfloat16" or "float32"; parameters are cast where used.
      remat: recompute each block in the backward pass instead of storing its activations.
      remat_keeps: what is stored all the same, one of `blocks.KEPT`.
      unroll: compile every block instead of a loop over one: faster on a CPU.
      mesh: over which the rows of activations are spread; None leaves that to the inputs.
      attention: to whole sequences, one of `attention.KINDS`.
    """

    config: ModelConfig
    dtype: str = "bfloat16"
    remat: bool = False
    remat_keeps: str = "nothing"
    unroll: bool = False
    mesh: Mesh | None = None
    attention: str = "auto"

    @property
    def mask_id(self) -> int | None:
        """The id of a diffusion model's mask token; None for an autoregressive model."""
        return self.config.mask_token_id if isinstance(self.config, llada.LladaConfig) else None

    @functools.cached_property
    def _abstract(self):
        network = family(self.config).Network
        return nnx.split(nnx.eval_shape(lambda: network(self.config, rngs=nnx.Rngs(0))))

    def _module(self, params: Params) -> Any:
        """The module; of tied embeddings a quantized output layer stands beside, see `unembed`."""
        if self.tied:
            params = {name: x for name, x in params.items() if name != "lm_head"}
        return nnx.merge(self._abstract[0], params)

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output layer too."""
        return "lm_head" not in self._abstract[1]

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters; nothing is allocated."""
        return nnx.to_pure_dict(self._abstract[1])

    def param_axes(self) -> Params:
        """Logical axis names of each parameter, a tuple a leaf."""
        flat = nnx.to_flat_state(self._abstract[1])
        return unflatten_dict({path: v.get_metadata()["axes"] for path, v in flat})

    def init(self, key: jax.Array) -> Params:
        """Random float32 parameters. Jit it with `out_shardings` to create them in place."""
        network = family(self.config).Network
        return nnx.to_pure_dict(nnx.state(network(self.config, rngs=nnx.Rngs(params=key))))

    def hidden(
        self,
        params: Params,
        tokens: jax.Array,
        positions: jax.Array,
        key_mask: jax.Array,
        cache: Any = None,
        index: jax.Array | int = 0,
    ) -> tuple[jax.Array, Any]:
        """Final hidden states [B, T, D] in `dtype`, and the updated cache.

        Args:
          params: parameters, quantized or not.
          tokens: [B, T] int32.
          positions: [B, T] int32, position of each token in its own row.
          key_mask: [B, S] bool, real tokens among the keys; S is the cache's length, T without one.
          cache: what the architecture keeps of the tokens before (see `empty_cache`), or None.
          index: key position of the first of the T tokens. The integer 0 says that the cache is
            empty.
        """
        module = self._module(params)
        schedule = Schedule(self.remat, self.remat_keeps, self.unroll, self.mesh, self.attention)
        hidden, new = module.hidden(
            tokens, positions, key_mask, cache, index, jnp.dtype(self.dtype), schedule
        )
        if cache is None:
            return hidden, None
        return hidden, cache_lib.write(self.cache_axes, cache, new, index)

    def unembed(
        self,
        params: Params,
        hidden: jax.Array,
        start: jax.Array | int | None = None,
        size: int | None = None,
    ) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D].

        With `start` and `size` those of `size` ids from `start` on. A tied model whose copy has a
        quantized output layer of its own computes with that.
        """
        if "lm_head" not in params:
            table = params["embed_tokens"]
            if start is not None and size is not None:
                table = jax.lax.dynamic_slice_in_dim(table, start, size)
            # Not table.T, of which XLA:CPU makes a float32 copy.
            contract = (((hidden.ndim - 1,), (1,)), ((), ()))
            return jax.lax.dot_general(
                *(hidden, table.astype(hidden.dtype), contract), preferred_element_type=jnp.float32
            )
        weights = params["lm_head"]
        if start is not None and size is not None:
            weights = columns(weights, start, size)
        if isinstance(weights, QuantArray):
            return wide_linear(hidden, weights)
        return jnp.matmul(hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)

    def logits(
        self, params: Params, token_ids: jax.Array, mask: jax.Array | None = None
    ) -> jax.Array:
        """Logits [B, T, V] float32 of whole sequences [B, T]; `mask` [B, T] is 0 at padding."""
        token_ids = jnp.asarray(token_ids)
        mask = jnp.ones(token_ids.shape, bool) if mask is None else jnp.asarray(mask, bool)
        hidden, _ = self.hidden(params, token_ids, positions_of(mask), mask)
        return self.unembed(params, hidden)

    @property
    def cache_axes(self) -> Any:
        """Names of the axes of a cache, a tuple a leaf; see cache.py."""
        return family(self.config).CACHE_AXES

    def empty_cache(
        self, rows: int, length: int, kv_format: str = cache_lib.NONE, params: Params | None = None
    ) -> Any:
        """A cache for `rows` rows of up to `length` tokens.

        Args:
          rows: B.
          length: S.
          kv_format: of keys and values, one of `cache.FORMATS`; "none" is `dtype`.
          params: that it will be used with, if their blocks may be held apart (see `unstack`).
        """
        empty = family(self.config).empty_cache
        cache = empty(self.config, rows, length, jnp.dtype(self.dtype), kv_format)
        leaves = [] if params is None else jax.tree.leaves(params["layers"], is_leaf=is_unstacked)
        return unstack(cache, self.cache_axes) if any(map(is_unstacked, leaves)) else cache

    def unstack(self, params: Params) -> Params:
        """The parameters with every block's arrays apart, see blocks.py."""
        return params | {"layers": unstack(params["layers"], self.param_axes()["layers"])}

    def fuse(self, params: Params) -> Params:
        """The parameters with kernels that share their input put together, see `layers.fuse`."""
        return params | {"layers": layers.fuse(params["layers"])}


def positions_of(mask: jax.Array) -> jax.Array:
    """[B, T] int32: the position of each real token in its row; 0 at left padding."""
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def build(config: ModelConfig, dtype: str = "bfloat16", remat: bool = False) -> Model:
    """The model of `config`. Its parameters come from `Model.init` or a checkpoint."""
    return Model(config, dtype, remat)
