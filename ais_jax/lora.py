"""Low-rank adapters: the base stays as it is, and a few numbers beside each kernel are trained.

Adapters are a nested dict that mirrors the parameters, {"a": ..., "b": ...} in place of each
adapted kernel (LoRA, arXiv 2106.09685). `join` puts them beside their kernels; the model computes
with what comes out as with any parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from ais_jax import quantize as quantize_lib
from ais_jax.errors import UserError
from ais_jax.linear import LoraArray
from ais_jax.models.checkpoint import leaf, tensors_of
from ais_jax.models.model import Model, Params
from ais_jax.models.naming import Path, Tensor
from ais_jax.settings import at_least, positive, setting

# These leave activations alone, so there is a gradient.
BASE_RECIPES = ("none", "fp8_weight_only", "int8_weight_only")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Adapters beside a frozen base."""

    rank: int = setting(16, "inner size of the adapters")
    alpha: float = setting(32.0, "the adapters' product is multiplied by alpha / rank")
    targets: tuple[str, ...] = setting(
        (), "linears that get adapters, by their published names (q_proj...); [] takes all"
    )
    base_recipe: str = setting(
        "none", "quantization in which the frozen base is held", choices=BASE_RECIPES
    )

    def __post_init__(self):
        at_least(self, 1, "rank")
        positive(self, "alpha")

    @property
    def scale(self) -> float:
        """What the product of the adapters is multiplied by."""
        return self.alpha / self.rank


def targets(
    config: LoraConfig, model: Model, names: Iterable[str] = ()
) -> dict[Path, list[Tensor]]:
    """The kernels that get adapters: parameter -> its published tensors, one a layer.

    Args:
      config: names wanted.
      model: structure.
      names: tensors of the checkpoint it came from, where their prefix matters.

    Raises:
      UserError: a name is none of the model's linears.
    """
    found: dict[Path, list[Tensor]] = {}
    known: set[str] = set()
    for tensor in tensors_of(model.config, set(names)):
        if tensor.layout != "transposed" or not tensor.index:
            continue
        known.add(tensor.module)
        if not config.targets or tensor.module in config.targets:
            found.setdefault(tensor.path, []).append(tensor)
    for name in config.targets:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)[0]
            raise UserError(
                f"lora.targets: {name!r} is no linear of this model; did you mean {near!r}? "
                f"(one of {', '.join(sorted(known))})"
            )
    return found


def init(config: LoraConfig, model: Model, key: jax.Array) -> Params:
    """Adapters that change nothing yet: `a` uniform within 1 / sqrt(in), `b` zero; float32."""
    paths = sorted(targets(config, model))
    shapes = model.abstract_params()
    flat = {}
    for path, k in zip(paths, jax.random.split(key, len(paths)), strict=True):
        *stack, rows, columns = leaf(shapes, path).shape
        bound = rows**-0.5
        a = jax.random.uniform(k, (*stack, rows, config.rank), jnp.float32, -bound, bound)
        flat[(*path, "a")] = a
        flat[(*path, "b")] = jnp.zeros((*stack, config.rank, columns), jnp.float32)
    return unflatten_dict(flat)


def param_axes(config: LoraConfig, model: Model) -> Params:
    """Logical axis names of each adapter, a tuple a leaf; the rank is not split."""
    axes = model.param_axes()
    flat = {}
    for path in targets(config, model):
        *stack, rows, columns = leaf(axes, path)
        flat[(*path, "a")] = (*stack, rows, "lora_rank")
        flat[(*path, "b")] = (*stack, "lora_rank", columns)
    return unflatten_dict(flat)


def join(adapters: Params, base: Params, scale: float) -> Params:
    """`base` with a `LoraArray` in place of each adapted kernel; copies nothing."""

    def one(adapter: Any, part: Any) -> Any:
        if not isinstance(part, dict):
            return LoraArray(part, adapter["a"], adapter["b"], scale)
        return {k: one(adapter[k], v) if k in adapter else v for k, v in part.items()}

    return one(adapters, base)


def merge(params: Params, dtype=jnp.float32) -> Params:
    """Ordinary parameters that compute the same.

    Each `LoraArray` becomes its kernel, and so does a `QuantArray`, worked out in float32 and cast
    to `dtype`; other leaves stay as they are.
    """

    def one(x):
        if isinstance(x, LoraArray):
            return x.merge().astype(dtype)
        return x.dequantize(dtype) if isinstance(x, quantize_lib.QuantArray) else x

    kinds = (LoraArray, quantize_lib.QuantArray)
    return jax.tree.map(one, params, is_leaf=lambda x: isinstance(x, kinds))


def hold(base: Params, config: LoraConfig, dtype) -> Params:
    """The frozen base as `config.base_recipe` says; what is not quantized is cast to `dtype`."""
    return quantize_lib.quantize(base, config.base_recipe, dtype)
