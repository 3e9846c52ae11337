"""Any model that a person can point at: a checkpoint, a GGUF file, or the folder of a run."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import NamedTuple

import jax

from ais_jax import config as config_lib
from ais_jax import lora
from ais_jax.errors import UserError
from ais_jax.mesh import MeshConfig, make_mesh
from ais_jax.models import Model, Params, cast_params, from_pretrained
from ais_jax.models.checkpoint import tokenizer_of
from ais_jax.models.tokenizers import Tokenizer, check_ids
from ais_jax.train import checkpoint as run_checkpoint
from ais_jax.train.display import console
from ais_jax.train.setup import Run, build_run, initial_params

_SPLIT = MeshConfig(data=1, fsdp=-1)


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A model with its parameters and its tokenizer.

    Attributes:
      model: structure; of a checkpoint it knows where it came from, as `save_pretrained` wants it.
      params: adapters are merged in.
      tokenizer: None where there is none.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer | None

    @property
    def structure(self) -> Model:
        """The model without arrays, for jit."""
        return Model(self.model.config, self.model.dtype, self.model.remat)


class TrainedRun(NamedTuple):
    """A run's fixed parts and what its newest checkpoint has trained: parameters or adapters."""

    run: Run
    trained: Params
    model: Model  # knows where it came from


def load_policy(
    path: str | os.PathLike, dtype: str = "bfloat16", layout: MeshConfig | None = None
) -> LoadedPolicy:
    """Reads a checkpoint folder, a GGUF file, or the newest checkpoint of a run.

    Args:
      path: where it is.
      dtype: of parameters and activations, "bfloat16" or "float32"; see `from_pretrained`.
      layout: devices over which the parameters are split; None is one, of a run all.

    Raises:
      UserError: nothing usable is there.
    """
    folder = pathlib.Path(path)
    if is_run(folder):
        return _load_run(folder, dtype, layout or _SPLIT)
    model = from_pretrained(folder, dtype, None if layout is None else make_mesh(layout))
    assert model.checkpoint is not None
    try:
        tokenizer: Tokenizer | None = tokenizer_of(model.checkpoint)
    except UserError:
        tokenizer = None  # who needs one, asks `need_tokenizer`
    return LoadedPolicy(model, model.params, tokenizer)


def is_run(folder: pathlib.Path) -> bool:
    """Whether `folder` is what a run wrote."""
    return (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir()


def need_tokenizer(policy: LoadedPolicy, path: str | os.PathLike) -> Tokenizer:
    """The policy's tokenizer.

    Raises:
      UserError: it has none, or one of another model.
    """
    tokenizer = policy.tokenizer
    if tokenizer is None:
        # Says what is wrong; only a checkpoint can lack one.
        tokenizer = tokenizer_of(policy.model.checkpoint)  # type: ignore[attr-defined]
    check_ids(tokenizer, policy.model.config.vocab_size, str(path))
    return tokenizer


def open_run(folder: pathlib.Path, layout: MeshConfig = _SPLIT) -> TrainedRun:
    """The newest checkpoint of a run, over the devices that are here, whatever it was trained on.

    Raises:
      UserError: there is no checkpoint, or its base cannot be used.
    """
    config = config_lib.load(folder / "config.yaml")
    run = build_run(dataclasses.replace(config, mesh=layout), folder)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(run.programs.init_trainable, jax.random.key(0)),
        run.programs.trainable_shardings,
    )
    warn = console(stderr=True).print
    trained = run_checkpoint.load_trained(folder / "checkpoints", like, warn)
    model = run.policy.model
    return TrainedRun(run, trained, run.source.pretrained(model) if run.source else model)


def _load_run(folder: pathlib.Path, dtype: str, layout: MeshConfig) -> LoadedPolicy:
    run, trained, model = open_run(folder, layout)
    params = trained
    if run.policy.lora is not None:
        # The base is held as it was in training, then merged.
        _, frozen = initial_params(run)
        params = lora.merge(run.policy.join(trained, frozen))
    params = cast_params(model, params, dtype)
    model = dataclasses.replace(model, dtype=dtype, remat=False, mesh=None)
    return LoadedPolicy(model, params, run.prompter.tokenizer)
