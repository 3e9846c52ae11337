"""How a process that works for a trainer lives and dies. No JAX in here."""

from __future__ import annotations

import os
import signal
import threading
import time


def live_with(parent: int) -> None:
    """Leaves Ctrl-C and preemption to the trainer, and ends when it does, however it ends.

    Where this process leads a group of its own, all that it has started ends with it.

    Args:
      parent: the trainer's process id.
    """
    # Both signals reach the whole group of processes; the trainer decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)
