"""Checkpoints by Orbax: all that a run needs to go on as if it had not stopped is saved as one.

A checkpoint holds the train state and `host`, what the host knows: position of the data iterator,
lengths of the metrics' files, guards, settings. Orbax writes it beside the training, into a folder
that gets its name when all is there, so a killed run leaves whole checkpoints only. Damage done
later is found by digests.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import pathlib
import shutil
import uuid
import zlib
from collections.abc import Callable
from concurrent import futures
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from ais_jax import distributed
from ais_jax.errors import UserError
from ais_jax.models import Params
from ais_jax.train.state import TrainState

T = TypeVar("T")

_READERS = 16  # arrays that are read at the same time


class Saved(NamedTuple):
    """A run after `step` steps."""

    step: int
    state: TrainState
    host: dict[str, Any]  # what JSON can hold; whole numbers also of NumPy


def manager(directory: pathlib.Path, keep: int = 2) -> ocp.CheckpointManager:
    """Saves into `directory`/<step>, atomically, keeping the newest `keep`.

    What a killed run has left half-written is removed.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager(directory.absolute(), options=options)


def _reader(directory: pathlib.Path) -> ocp.CheckpointManager:
    """Reads in this process alone: Orbax waits for all, and one that finds damage never comes."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read{me}"
    )
    options = ocp.CheckpointManagerOptions(create=False, multiprocessing_options=alone)
    return ocp.CheckpointManager(pathlib.Path(directory).absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, saved: Saved) -> None:
    """Begins to save; returns when the state may be given away again."""
    host = json.loads(json.dumps(saved.host, default=int))  # NumPy integers become numbers
    meta = {"host": host, "shapes": _shapes(saved.state), "digests": _digests(saved.state)}
    meta["crc"] = _crc(meta)
    checkpoints.save(
        saved.step,
        args=ocp.args.Composite(
            state=ocp.args.StandardSave(saved.state), meta=ocp.args.JsonSave(meta)
        ),
    )


class Keeper:
    """Saves checkpoints while a run trains. A save that fails is told, and the run goes on."""

    def __init__(self, checkpoints: ocp.CheckpointManager, warn: Callable[[str], None]):
        self._checkpoints, self._warn = checkpoints, warn
        self._saving: int | None = None
        logging.getLogger("asyncio").addFilter(_said_once)

    def save(self, saved: Saved) -> None:
        """Begins to save, unless that step is saved or being saved."""
        if self._saving == saved.step or saved.step in self._checkpoints.all_steps():
            return
        self.finish()
        try:
            self._saving = saved.step
            save(self._checkpoints, saved)
        except Exception as error:
            self._tell(error)

    def look(self) -> None:
        """Tells whether a save that has ended has failed; waits for none."""
        if self._saving is not None and not self._checkpoints.is_saving_in_progress():
            self.finish()

    def finish(self) -> None:
        """Waits for the save that goes on, if one does."""
        if self._saving is not None:
            try:
                self._checkpoints.wait_until_finished()
                self._saving = None
            except Exception as error:
                self._tell(error)

    def _tell(self, error: Exception) -> None:
        """Says that a save has failed, and gives back the room that its beginning takes."""
        step, self._saving = self._saving, None
        directory = pathlib.Path(self._checkpoints.directory)
        if distributed.first():
            for path in directory.glob(f"{step}.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)
        self._checkpoints.reload()
        newest = self._checkpoints.latest_step()
        left = "there is none before" if newest is None else f"the newest is of step {newest}"
        self._warn(
            f"THE CHECKPOINT OF STEP {step} WAS NOT SAVED, {left}: {_short(error)}; "
            f"the run goes on, look after {directory}"
        )


def _said_once(record: logging.LogRecord) -> bool:
    """Without the pages on every array that a failed save has not written."""
    return "orbax-checkpoint-tmp" not in record.getMessage()


def restore(
    checkpoints: ocp.CheckpointManager, like: TrainState, warn: Callable[[str], None]
) -> Saved | None:
    """The newest checkpoint that is whole, in the shardings of `like`; None where there is none.

    Damaged ones that are newer are renamed, so that their steps can be saved again.

    Args:
      like: the configured state, or its shapes with shardings.
      warn: is told of damaged checkpoints.

    Raises:
      UserError: the checkpoint does not fit the configured model or optimizer, or all are damaged.
    """
    # A shared folder may look older from one host than from another.
    steps = json.loads(distributed.agreed(json.dumps(sorted(checkpoints.all_steps()))))
    for step in reversed(steps):
        path = pathlib.Path(checkpoints.directory) / str(step)
        try:
            return _read(checkpoints, step, like)
        except _Damaged as error:
            target = _set_aside(path)
            checkpoints.reload()
            warn(
                f"checkpoint {path} is damaged: {error}; it is kept as {target.name}, and "
                "the one before is taken"
            )
    if steps:
        raise UserError(
            f"no checkpoint in {checkpoints.directory} can be read; start again with --no-resume, "
            "or in another output_dir"
        )
    return None


class _Damaged(Exception):
    """A checkpoint that cannot be used; all processes say so of the same one."""


def _read(checkpoints: ocp.CheckpointManager, step: int, like: TrainState) -> Saved:
    """A checkpoint. Each process reads its part; what one of them cannot read, none takes.

    Raises:
      _Damaged: it cannot be read, or holds other numbers than were saved.
      UserError: it does not fit.
    """
    own = distributed.together(_read_own, checkpoints, step, like)
    damaged = distributed.gather(np.array([isinstance(own, Exception)]))
    if isinstance(own, Exception):
        raise _Damaged(_short(own)) from own
    if damaged.any():
        raise _Damaged(f"process {int(np.argmax(damaged))} cannot read its part")
    meta, state = own
    changed = _changed(meta["digests"], _digests(state))  # of all devices: every process sees it
    if changed:
        raise _Damaged(f"other numbers in {changed[0]} than were saved")
    return Saved(step, state, meta["host"])


def _read_own(
    checkpoints: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[dict, TrainState] | Exception:
    """(metadata, state) as this process finds them, or in what way they are damaged."""
    try:
        with _reader(checkpoints.directory) as alone:
            meta = _meta(alone, step)
            _check_shapes(meta["shapes"], _shapes(like), alone.directory / str(step))
            return meta, _arrays(alone.directory / str(step) / "state", like)
    except Exception as error:
        _raise_unless_damage(error)
        return error


def check(checkpoints: ocp.CheckpointManager, like: TrainState) -> None:
    """Whether the newest checkpoint that says something of itself fits; says nothing of damage.

    Args:
      like: the configured state, or its shapes alone.

    Raises:
      UserError: it does not.
    """
    with _reader(checkpoints.directory) as alone:
        for step in sorted(alone.all_steps(), reverse=True):
            try:
                shapes = _meta(alone, step)["shapes"]
            except Exception as error:
                _raise_unless_damage(error)
                continue
            _check_shapes(shapes, _shapes(like), alone.directory / str(step))
            return


def load_trained(
    directory: pathlib.Path, like: Params, warn: Callable[[str], None] = lambda text: None
) -> Params:
    """What the newest whole checkpoint of a run has trained, without the optimizer's state.

    Args:
      directory: the run's checkpoints; nothing in it is changed.
      like: shapes, dtypes and shardings.
      warn: is told of damaged checkpoints, which are passed over.

    Raises:
      UserError: there is no checkpoint, or it does not fit.
    """
    with _reader(directory) as checkpoints:
        for step in sorted(checkpoints.all_steps(), reverse=True):
            path = checkpoints.directory / str(step)
            try:
                return _read_trained(checkpoints, step, like)
            except Exception as error:
                _raise_unless_damage(error)
                warn(f"checkpoint {path} is damaged: {_short(error)}; taking the one before")
    raise UserError(f"{directory} holds no finished checkpoint that can be read")


def _read_trained(checkpoints: ocp.CheckpointManager, step: int, like: Params) -> Params:
    meta = _meta(checkpoints, step)

    def stored(kind: str) -> dict:
        return {k: v for k, v in meta[kind].items() if k.startswith(".params")}

    expected = {f".params{k}": v for k, v in _shapes(like).items()}
    _check_shapes(stored("shapes"), expected, checkpoints.directory / str(step))
    params = _arrays(checkpoints.directory / str(step) / "state", {"params": like})["params"]
    changed = _changed(stored("digests"), {f".params{k}": v for k, v in _digests(params).items()})
    if changed:
        raise ValueError(f"other numbers in {changed[0]} than were saved")
    return params


def _arrays(path: pathlib.Path, like: T) -> T:
    """What Orbax has written into `path`, in the shapes and shardings of `like`.

    Not by Orbax: where one read fails, it leaves the others behind in an event loop that it has
    closed, and the process may hang when they are collected as garbage.
    """

    def read(name: str, leaf) -> jax.Array:
        base = {"driver": "file", "path": f"{path}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        # What is missing must not be read as zeros.
        spec = {"driver": "zarr", "fill_missing_data_reads": False, "kvstore": kvstore}
        store = ts.open(spec).result()
        if (store.shape, store.dtype.numpy_dtype) != (leaf.shape, leaf.dtype):
            raise ValueError(f"{name} is {store.dtype.name}{list(store.shape)}")
        return jax.make_array_from_callback(
            leaf.shape, leaf.sharding, lambda index: store[index].read().result()
        )

    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in leaves]
    with futures.ThreadPoolExecutor(_READERS) as pool:  # its end waits for all of them
        return jax.tree.unflatten(tree, pool.map(read, names, (leaf for _, leaf in leaves)))


def _meta(checkpoints: ocp.CheckpointManager, step: int) -> dict:
    meta = checkpoints.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
    if meta.pop("crc") != _crc(meta):
        raise ValueError("other metadata than was saved")
    return meta


def _crc(meta: dict) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _raise_unless_damage(error: Exception) -> None:
    """Damage shows as any exception: Orbax raises plain ones, too. A full memory says nothing."""
    if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):
        raise error


def _leaves(tree) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _shapes(tree) -> dict[str, str]:
    """Dtype and shape of each leaf. Orbax would convert another dtype, and all digests with it."""
    return {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in _leaves(tree).items()}


def _check_shapes(stored: dict, expected: dict, path) -> None:
    for name in [*expected, *stored]:
        if stored.get(name) != expected.get(name):
            raise UserError(
                f"checkpoint {path} does not fit the config: {name} is "
                f"{stored.get(name, 'absent')} there and {expected.get(name, 'absent')} here; use "
                "the config it was made with, or another output_dir"
            )


def _digests(tree) -> dict[str, int]:
    """A number for the bits of each leaf, the same on any mesh."""
    return {name: int(value) for name, value in jax.device_get(_digest(_leaves(tree))).items()}


@jax.jit
def _digest(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """[] uint32 by name: sum of (2 i + 1) times the bits of element i, modulo 2^32.

    The odd factors make every change of a single element, and most exchanges, change the sum, which
    integers let devices add up in any order.
    """

    def one(x: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}")
        index, stride = jnp.zeros(bits.shape, jnp.uint32), 1
        for axis in reversed(range(bits.ndim)):
            position = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
            index += jnp.uint32(stride % 2**32) * position
            stride *= bits.shape[axis]
        return jnp.sum((2 * index + 1) * bits.astype(jnp.uint32), dtype=jnp.uint32)

    return {name: one(x) for name, x in leaves.items()}


def _changed(stored: dict[str, int], found: dict[str, int]) -> list[str]:
    """The names of arrays whose bits are not those that were saved."""
    return [name for name, value in found.items() if stored[name] != value]


def _set_aside(path: pathlib.Path) -> pathlib.Path:
    """Renames a damaged checkpoint, out of Orbax' sight; returns where it is."""
    names = (path.with_name(f"{path.name}.damaged{i}") for i in itertools.count())
    target = next(name for name in names if not name.exists())

    def rename():
        if distributed.first():
            path.rename(target)

    try:
        distributed.together(rename)  # none may find it once more
    except OSError as error:
        raise UserError(
            f"checkpoint {path} is damaged and cannot be renamed: {error.strerror or error}"
        ) from error
    return target


def _short(error: Exception) -> str:
    """An error in a line: Orbax and tensorstore write pages."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def save_params(path: pathlib.Path, params: Params, warn: Callable[[str], None]) -> None:
    """Saves parameters alone, unless another run was faster. A failure is told, nothing more."""
    path = path.absolute()
    # Runs that save the same at the same time must not meet in one folder.
    own = path.with_name(f"{path.name}.{distributed.agreed(uuid.uuid4().hex)}")
    try:
        distributed.together(functools.partial(path.parent.mkdir, parents=True, exist_ok=True))
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(own, args=ocp.args.StandardSave(params))
        if distributed.first() and not path.exists():
            own.rename(path)
    except Exception as error:
        warn(f"the warm-up is not kept in {path}: {_short(error)}")
    finally:
        if distributed.first():
            for rest in path.parent.glob(f"{own.name}*"):
                shutil.rmtree(rest, ignore_errors=True)


def load_params(path: pathlib.Path, like: Params, warn: Callable[[str], None]) -> Params | None:
    """Parameters saved by `save_params`; None where there are none, or damaged ones, which go.

    Args:
      path: where.
      like: of their shapes and shardings.
      warn: is told of damage.
    """
    if distributed.agreed(str(path.is_dir())) == "False":
        return None
    own = distributed.together(_load_own, path.absolute(), like)
    damaged = distributed.gather(np.array([isinstance(own, Exception)])).any()
    if not isinstance(own, Exception) and not damaged:
        return own
    told = _short(own) if isinstance(own, Exception) else "another process cannot read its part"
    warn(f"the warm-up in {path} is damaged: {told}; it is done again")
    if distributed.first():
        shutil.rmtree(path, ignore_errors=True)
    return None


def _load_own(path: pathlib.Path, like: Params) -> Params | Exception:
    """The parameters as this process finds them, or in what way they are damaged."""
    try:
        return _arrays(path, like)
    except Exception as error:
        _raise_unless_damage(error)
        return error
