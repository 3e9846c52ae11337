"""Checkpoints by Orbax: the train state, the data iterator and the step are saved as one."""

from __future__ import annotations

import json
import pathlib
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from ais_jax.errors import UserError
from ais_jax.models import Params
from ais_jax.train.state import TrainState


class Restored(NamedTuple):
    """A checkpoint's content."""

    step: int
    state: TrainState
    iterator: dict


def manager(directory: pathlib.Path, keep: int = 2) -> ocp.CheckpointManager:
    """Saves into `directory`/<step>, atomically, keeping the newest `keep`."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(directory.absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, step: int, state: TrainState, iterator: dict) -> None:
    """Saves after `step` steps; returns when the state may be changed again."""
    checkpoints.save(
        step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(state), iterator=ocp.args.JsonSave(_plain(iterator))
        ),
    )


def restore(checkpoints: ocp.CheckpointManager, like: TrainState) -> Restored | None:
    """The newest checkpoint, in the shardings of `like`; None where there is none.

    Raises:
      UserError: the checkpoint does not fit the configured model or optimizer.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        restored = checkpoints.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(target), iterator=ocp.args.JsonRestore()
            ),
        )
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        path = checkpoints.directory / str(step)
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"checkpoint {path} cannot be restored into the configured model ({reason}); "
            "use the config it was made with, or another output_dir"
        ) from error
    return Restored(step, restored.state, restored.iterator)


def exists(path: pathlib.Path) -> bool:
    """Whether `save_params` has finished at `path`."""
    return path.is_dir()


def save_params(path: pathlib.Path, params: Params) -> None:
    """Saves parameters alone; Orbax renames the finished folder into place."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.absolute(), params, force=True)


def load_params(path: pathlib.Path, like: Params) -> Params:
    """Parameters saved by `save_params`, in the shapes and shardings of `like`."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(
            path.absolute(), jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        )


def _plain(state: dict) -> dict:
    """The iterator's state as JSON holds it (NumPy integers become numbers)."""
    return json.loads(json.dumps(state, default=int))
