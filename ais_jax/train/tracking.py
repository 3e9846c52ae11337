"""Where the metrics of a run go: files always, Weights & Biases if asked, and from one process."""

from __future__ import annotations

import contextlib
import math
import pathlib
import uuid
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Protocol

from ais_jax import distributed, settings
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.train.metrics import MetricsWriter, tensorboard_tag

_ID_FILE = "wandb_id"


class Writer(Protocol):
    """What the loop writes to, see `MetricsWriter`."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """The metrics of a step."""

    def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Some of its completions."""

    def lengths(self) -> dict[str, int]:
        """Bytes of the files, by name."""

    def close(self) -> None:
        """Writes out what is left."""


class Silent:
    """A `Writer` of a process that writes nothing."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Nothing."""

    def lengths(self) -> dict[str, int]:
        """Of no file."""
        return {}

    def close(self) -> None:
        """Nothing."""


class WandbLog:
    """A run of Weights & Biases. A run of the same folder goes on in the same one."""

    def __init__(self, project: str, directory: pathlib.Path, config: Config):
        """Begins or goes on.

        Args:
          project: name of the project.
          directory: the run's folder, which keeps the run's id and wandb's own files.
          config: shown beside the curves.

        Raises:
          UserError: wandb is absent, or does not let the run begin.
        """
        wandb = wandb_module(project)
        path = directory / _ID_FILE
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                id=path.read_text(encoding="utf-8").strip(),
                name=directory.name,
                dir=str(directory),
                config=settings.to_dict(config),
                resume="allow",
            )
        except wandb.Error as error:
            problem = " ".join(str(error).split()).rstrip(".")
            raise UserError(
                f"train.wandb={project}: {problem}; log in by `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        # Steps that a resumed run repeats are drawn at their own place, not refused.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """The metrics of a step, under the names that TensorBoard shows; None is left out."""
        known = {
            tensorboard_tag(name): value
            for name, value in metrics.items()
            if value is not None and math.isfinite(value)
        }
        self._run.log({"step": step, **known})

    def close(self) -> None:
        """Sends what is left."""
        self._run.finish()


def wandb_module(project: str) -> ModuleType:
    """The package wandb.

    Raises:
      UserError: it is absent. A folder of that name, such as it makes itself, is not the package.
    """
    try:
        import wandb

        if hasattr(wandb, "init"):
            return wandb
    except ImportError:
        pass
    raise UserError(
        f"train.wandb={project} needs the package wandb: pip install 'ais-jax[wandb]', or leave "
        "train.wandb out"
    )


def check(config: Config) -> None:
    """Refuses what `open_writer` could not do, before anything is computed.

    Raises:
      UserError: wandb is asked for and absent.
    """
    if config.train.wandb is not None:
        wandb_module(config.train.wandb)


@contextlib.contextmanager
def open_writer(
    config: Config,
    directory: pathlib.Path,
    start: int,
    lengths: Mapping[str, int] | None = None,
    warn: Callable[[str], None] = lambda text: None,
):
    """A `Writer` for the steps after `start`; of several processes the first one's alone writes.

    For `lengths` and `warn` see `MetricsWriter`.

    Raises:
      UserError: a file of the folder is malformed, or Weights & Biases cannot be used.
    """
    writer = distributed.together(_writer, config, directory, start, lengths, warn)
    try:
        yield writer
    finally:
        writer.close()


def _writer(config: Config, directory: pathlib.Path, start: int, lengths, warn) -> Writer:
    if not distributed.first():
        return Silent()
    project = config.train.wandb
    also = [] if project is None else [WandbLog(project, directory, config)]
    return MetricsWriter(directory, start, lengths, warn, also)
