"""Several processes that run one program together, each with devices of its own.

All of them call the same compiled programs in the same order, over one mesh. What the host reads
of a result is whole on every device, so all decide alike. Text is each process's own: it poses,
decodes and rewards its share of the rows, and `gather` puts the numbers together. Process 0 alone
writes and prints. With one process nothing here does anything.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from ais_jax.errors import UserError

T = TypeVar("T")

# Set where jax can find out by itself who takes part: by SLURM, Open MPI, an indexed Kubernetes
# job, and on TPU slices.
_LAUNCHERS = (
    "SLURM_STEP_NODELIST",
    "OMPI_MCA_orte_hnp_uri",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "MEGASCALE_COORDINATOR_ADDRESS",
)
_COUNTS = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
_PATIENCE = 300.0  # seconds that a process waits for process 0, as jax does


def start(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes, if there are any. To be called before jax is first used.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and
    what is not there either jax finds out from its surroundings. Does nothing in a process that
    nothing of all that speaks of, and where jax has been told already.

    Args:
      coordinator: "host:port" of process 0, the same in all processes.
      processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UserError: the three do not fit together, or the others cannot be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    processes = _number(processes, "JAX_NUM_PROCESSES")
    process_id = _number(process_id, "JAX_PROCESS_ID")
    told = coordinator, processes, process_id
    launched = _launched()
    alone = told == (None, None, None) and not launched
    if alone or processes == 1 or jax.distributed.is_initialized():
        return
    _check(coordinator, processes, process_id, launched)
    if coordinator is not None and process_id:
        _wait_for(coordinator)  # jax would end the process without a word that helps
    _join(told, launched)
    if jax.distributed.is_initialized() and not first():
        logging.getLogger("ais_jax").setLevel(logging.ERROR)


def _join(told: tuple[str | None, int | None, int | None], launched: bool) -> None:
    """Lets jax join the others, where there are any."""
    method = None if launched else "deactivate"
    # SIGTERM is the run's own business; jax's service hears one that came before the first of a
    # resumed run's steps, and lets it wait for a step that never comes.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(*told, cluster_detection_method=method)
    except ValueError as error:
        if told != (None, None, None) or "coordinator_address" not in str(error):
            raise UserError(f"several processes: {_line(error)}") from error
        if os.environ.get("JOB_COMPLETION_INDEX"):
            raise UserError(
                "jax cannot find the other pods of this indexed job: pip install 'jax[k8s]', or "
                "say --processes 1"
            ) from error
        # Nobody is there: a TPU library without a TPU.
    except RuntimeError as error:
        raise UserError(f"this process cannot join the others: {_line(error)}") from error


def _launched() -> bool:
    """Whether something speaks of several processes, or may: a TPU is asked by jax."""
    if any(os.environ.get(name) == "1" for name in _COUNTS):
        return False  # jax would leave a single task no more than one of its GPUs
    return any(map(os.environ.get, _LAUNCHERS)) or importlib.util.find_spec("libtpu") is not None


def _number(given: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if given is not None or not text:
        return given
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{variable}={text!r} is no whole number; correct or unset it") from None


def _check(
    coordinator: str | None, processes: int | None, process_id: int | None, launched: bool
) -> None:
    names = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    missing = [name for name, value in names.items() if value is None]
    if missing and not launched:
        raise UserError(
            f"of several processes each needs all of {', '.join(names)} (or JAX_COORDINATOR_"
            f"ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID); {' and '.join(missing)} missing"
        )
    port = "1" if coordinator is None else coordinator.rpartition(":")[2]
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator={coordinator} must be host:port of process 0")
    if processes is not None and processes < 1:
        raise UserError(f"--processes={processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        raise UserError(f"--process-id={process_id} must be from 0 to --processes - 1")


def _wait_for(coordinator: str) -> None:
    """Returns once process 0 listens."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 cannot be reached at --coordinator={coordinator}: {_line(error)}; "
                    "is it running, and is the port open?"
                ) from error
        time.sleep(0.2)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def first() -> bool:
    """Whether this is the process that writes and prints."""
    return jax.process_index() == 0


def share(total: int) -> slice:
    """This process's part of `total` rows: consecutive ones, in the order of the processes.

    Raises:
      UserError: they cannot be shared out evenly.
    """
    count = jax.process_count()
    if total % count:
        raise UserError(f"{total} rows cannot be shared out evenly among {count} processes")
    size = total // count
    return slice(jax.process_index() * size, (jax.process_index() + 1) * size)


def gather(tree: T) -> T:
    """Arrays [n, ...] of all processes as [processes * n, ...] NumPy arrays, in their order.

    All processes must call it, with the same shapes and dtypes.
    """
    if jax.process_count() == 1:
        return tree
    return multihost_utils.process_allgather(tree, tiled=True)


def together(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)`, which is about this process's own rows; if it fails in one, all stop.

    The others would wait for ever for a process that has left.

    Raises:
      UserError: it failed in another process.
      Exception: what `function` raised here.
    """
    error: Exception | None = None
    try:
        result = function(*args)
    except Exception as raised:
        error = raised
    failed = gather(np.array([error is not None]))
    if error is not None:
        raise error
    if failed.any():
        raise UserError(f"process {int(np.argmax(failed))} has failed; its own output says why")
    return result


def agreed(text: str) -> str:
    """Process 0's `text`. All processes must call it."""
    if jax.process_count() == 1:
        return text
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    data = data if first() else np.zeros(size, np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(data)).decode()


def put(x: Any, sharding: Sharding) -> jax.Array:
    """An array that every process holds whole on its host, as one array over the devices of all.

    Args:
      x: array of NumPy or jax, PRNG keys included, the same in all processes.
      sharding: where it goes; each process copies the parts of its own devices.
    """
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = put(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
