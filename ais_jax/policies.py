"""Any model that a person can point at: a checkpoint, a GGUF file, or the folder of a run."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from typing import Any

import jax

from ais_jax import config as config_lib
from ais_jax import lora
from ais_jax.errors import UserError
from ais_jax.models import Model, Params, from_pretrained
from ais_jax.models.checkpoint import tokenizer_of
from ais_jax.models.tokenizers import CharTokenizer, Tokenizer, save_char_tokenizer
from ais_jax.train import checkpoint as run_checkpoint
from ais_jax.train.setup import Run, build_run, initial_params


@dataclasses.dataclass(frozen=True)
class LoadedPolicy:
    """A model with its parameters and its tokenizer.

    Attributes:
      model: structure; of a checkpoint it knows where it came from, as `save_pretrained` wants it.
      params: adapters are merged in.
      tokenizer: None where there is none.
      run: the run that it was trained by, and `adapters` what it trained, if there are any.
    """

    model: Model
    params: Params
    tokenizer: Tokenizer | None
    run: Run | None = None
    adapters: Params | None = None

    @property
    def structure(self) -> Model:
        """The model without arrays, for jit."""
        return Model(self.model.config, self.model.dtype, self.model.remat)


def load_policy(path: str | os.PathLike, dtype: str = "bfloat16") -> LoadedPolicy:
    """Reads a checkpoint folder, a GGUF file, or the newest checkpoint of a run.

    Raises:
      UserError: nothing usable is there.
    """
    folder = pathlib.Path(path)
    if is_run(folder):
        return _load_run(folder, dtype)
    model = from_pretrained(folder, dtype)
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
      UserError: it has none.
    """
    if policy.tokenizer is None:
        checkpoint = getattr(policy.model, "checkpoint", None)
        if checkpoint is not None:
            return tokenizer_of(checkpoint)  # says what is wrong
        raise UserError(f"{path} has no tokenizer")
    return policy.tokenizer


def _load_run(folder: pathlib.Path, dtype: str) -> LoadedPolicy:
    config = config_lib.load(folder / "config.yaml")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, dtype=dtype))
    run = build_run(config, folder)
    like = jax.eval_shape(run.programs.init_trainable, jax.random.key(0))
    shardings = run.programs.trainable_shardings
    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings
    )
    trained = run_checkpoint.load_trained(folder / "checkpoints", like)
    model: Any = run.policy.model
    if run.source is not None:
        model = run.source.pretrained(model)
    if run.policy.lora is None:
        params = jax.tree.map(lambda x: x.astype(dtype), trained)
        return LoadedPolicy(model, params, run.prompter.tokenizer, run)
    _, frozen = initial_params(run)
    run = dataclasses.replace(run, frozen=frozen)
    params = lora.merge(run.join(trained), dtype)
    return LoadedPolicy(model, params, run.prompter.tokenizer, run, trained)


def save_tokenizer(policy: LoadedPolicy, directory: pathlib.Path) -> None:
    """Writes the tokenizer of a tiny model; that of a checkpoint is copied with it."""
    if isinstance(policy.tokenizer, CharTokenizer):
        save_char_tokenizer(policy.tokenizer, directory)
