"""From one kind of checkpoint to another: what `ais-jax convert` does."""

from __future__ import annotations

import os
import pathlib

from ais_jax import policies
from ais_jax.errors import UserError
from ais_jax.models import save_orbax, save_pretrained
from ais_jax.models.pretrained import check_free
from ais_jax.models.tokenizers import CharTokenizer
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
        kept by Orbax, "adapter" for the adapters of a run as peft reads them.
      dtype: of the parameters, "bfloat16" or "float32"; adapters stay float32.

    Raises:
      UserError: the source is unusable, or the target is not empty.
    """
    target = pathlib.Path(target)
    check_free(target)
    if kind == "adapter":
        _convert_adapter(pathlib.Path(source), target)
        return target
    policy = policies.load_policy(source, dtype)
    # That of a checkpoint is copied with it.
    tiny = policy.tokenizer if isinstance(policy.tokenizer, CharTokenizer) else None
    save = save_pretrained if kind == "hf" else save_orbax
    save(policy.model, policy.params, target, tokenizer=tiny)
    return target


def _convert_adapter(source: pathlib.Path, target: pathlib.Path) -> None:
    run = policies.open_run(source) if policies.is_run(source) else None
    if run is None or run.run.policy.lora is None:
        raise UserError(f"{source} has no adapters; only a run with model.lora has")
    base = run.run.config.model.checkpoint
    where = None if base is None else str(pathlib.Path(base).absolute())
    save_adapter(run.model, run.trained, run.run.policy.lora, where, target)
