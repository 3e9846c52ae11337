"""From one kind of checkpoint to another: what `ais-jax convert` does."""

from __future__ import annotations

import os
import pathlib

from ais_jax import policies
from ais_jax.errors import UserError
from ais_jax.models import save_orbax, save_pretrained
from ais_jax.peft import save_adapter


def convert(
    source: str | os.PathLike, target: str | os.PathLike, kind: str, dtype: str
) -> pathlib.Path:
    """Writes what `source` holds to the folder `target`.

    Args:
      source: a checkpoint folder, a GGUF file, or the folder of a run, whose newest checkpoint is
        taken with adapters merged in.
      target: absent or empty.
      kind: "hf" for a folder that transformers and vLLM read, "orbax" for the same with parameters
        that each host reads in part, "adapter" for the adapters of a run as peft reads them.
      dtype: of the parameters, "bfloat16" or "float32".

    Raises:
      UserError: the source is unusable, or the target is not empty.
    """
    policy = policies.load_policy(source, dtype)
    target = pathlib.Path(target)
    if kind == "adapter":
        if policy.adapters is None or policy.run is None:
            raise UserError(f"{source} has no adapters; only a run with model.lora has")
        config = policy.run.config.model
        assert config.lora is not None
        save_adapter(policy.model, policy.adapters, config.lora, config.checkpoint, target)
        return target
    save = save_pretrained if kind == "hf" else save_orbax
    save(policy.model, policy.params, target)
    policies.save_tokenizer(policy, target)
    return target
