"""Adapters as a folder that the peft library reads."""

from __future__ import annotations

import functools
import os
import pathlib

import jax
import numpy as np

from ais_jax.lora import LoraConfig, targets
from ais_jax.models import Model, Params
from ais_jax.models.checkpoint import leaf
from ais_jax.models.pretrained import new_folder
from ais_jax.models.safetensors_io import Output, write_file, write_json


def save_adapter(
    model: Model,
    adapters: Params,
    config: LoraConfig,
    base: str | None,
    directory: str | os.PathLike,
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors.

    Args:
      model: structure, or what `from_pretrained` returned, whose names are then followed.
      adapters: as `lora.init` makes them.
      config: rank, alpha and targets.
      base: name or folder of the model that they belong to.
      directory: absent or empty.

    Raises:
      UserError: the folder is not empty or cannot be written.
    """
    checkpoint = getattr(model, "checkpoint", None)
    names = checkpoint.shapes if checkpoint else ()
    outputs = []
    modules = set()
    for path, tensors in targets(config, model, names).items():
        pair = jax.device_get(leaf(adapters, path))
        for tensor in tensors:
            module = tensor.name.removesuffix(".weight")
            modules.add(module)
            for letter in ("a", "b"):
                kernel = np.ascontiguousarray(pair[letter][tensor.index].T)
                name = f"base_model.model.{module}.lora_{letter.upper()}.weight"
                get = functools.partial(np.asarray, kernel)
                outputs.append(Output(name, kernel.dtype, kernel.shape, get))
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": _patterns(modules),
    }
    with new_folder(pathlib.Path(directory)) as folder:
        write_json(folder / "adapter_config.json", description)
        write_file(folder / "adapter_model.safetensors", outputs)


def _patterns(modules: set[str]) -> list[str]:
    """Endings that name these modules. Some families use a block's name elsewhere too, so that the
    last two parts are needed: "ff_out" alone would be LLaDA's output layer as well."""
    return sorted({".".join(module.split(".")[-2:]) for module in modules})
