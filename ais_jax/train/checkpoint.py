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
    position = json.loads(json.dumps(iterator, default=int))  # NumPy integers become numbers
    meta = {"iterator": position, "shapes": _shapes(state)}
    checkpoints.save(
        step,
        args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)),
    )


def restore(checkpoints: ocp.CheckpointManager, like: TrainState) -> Restored | None:
    """The newest checkpoint, in the shardings of `like`; None where there is none.

    Raises:
      UserError: the checkpoint does not fit the configured model or optimizer.
    """
    meta = check(checkpoints, like)
    step = checkpoints.latest_step()
    if meta is None or step is None:
        return None
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    restored = checkpoints.restore(
        step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
    )
    return Restored(step, restored.state, meta["iterator"])


def check(checkpoints: ocp.CheckpointManager, like: TrainState) -> dict | None:
    """What the newest checkpoint says of itself; None where there is none.

    Args:
      like: the configured state, or its shapes alone.

    Raises:
      UserError: the checkpoint does not fit it.
    """
    step = checkpoints.latest_step()
    if step is None:
        return None
    meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    _check_shapes(meta["shapes"], _shapes(like), checkpoints.directory / str(step))
    return meta


def _shapes(state: TrainState | Params) -> dict[str, list[int]]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in leaves}


def _check_shapes(stored: dict, expected: dict, path) -> None:
    for name in [*expected, *stored]:
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"checkpoint {path} does not fit the config: {name} is "
                f"{stored.get(name, 'absent')} there and {expected.get(name, 'absent')} here; use "
                "the config it was made with, or another output_dir"
            )


def load_trained(directory: pathlib.Path, like: Params) -> Params:
    """What the newest checkpoint of a run has trained, without the optimizer's state.

    Args:
      directory: the run's checkpoints.
      like: shapes, dtypes and shardings.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    with ocp.CheckpointManager(directory.absolute()) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            raise UserError(f"{directory} holds no finished checkpoint")
        meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
        item = {"params": like}
        expected = {f".params{k}": v for k, v in _shapes(like).items()}
        stored = {k: v for k, v in meta["shapes"].items() if k.startswith(".params")}
        _check_shapes(stored, expected, checkpoints.directory / str(step))
        restore = ocp.args.PyTreeRestore(
            item=item,
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
        )
        return checkpoints.restore(step, args=ocp.args.Composite(state=restore)).state["params"]


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
