"""How a process that works for another begins, lives and ends. No JAX in here."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time


def environment(**changes: str) -> dict[str, str]:
    """That of a child that finds the modules found here, and takes no accelerator away."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", **changes}


def bury(process: subprocess.Popen) -> None:
    """Waits for a child that has been killed, and closes what it was spoken to by."""
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def live_with(parent: int) -> None:
    """Leaves Ctrl-C and preemption to the trainer, and ends when it does, see `die_with`.

    Args:
      parent: the trainer's process id.
    """
    # Both signals reach the whole group of processes; the trainer decides what follows. They are
    # not ignored, since what this process starts would ignore them, too, and could not be ended.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    os.register_at_fork(after_in_child=_listen)
    die_with(parent)


def die_with(parent: int) -> None:
    """Ends when the parent does, however it ends.

    Where this process leads a group of its own, all that it has started ends with it.

    Args:
      parent: its process id.
    """
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _listen() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
