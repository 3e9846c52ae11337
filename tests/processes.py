"""Whether other processes are still there."""

import os
import pathlib
import time

import pytest


def alive(pid: int) -> bool:
    try:
        status = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


def gone(pid: int) -> None:
    """Waits for the end of a process; fails if it does not come."""
    for _ in range(300):
        if not alive(pid):
            return
        time.sleep(0.1)
    os.kill(pid, 9)
    pytest.fail("the process lives on")
