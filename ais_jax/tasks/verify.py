"""Whether an answer is a gold answer in another form, as math-verify finds in another process."""

from __future__ import annotations

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np

from ais_jax import child
from ais_jax.errors import UserError

TIMEOUT = 5.0
"""Seconds that a comparison may take; after that the answer is wrong."""

MAX_LENGTH = 1000
"""Characters of an answer that is read at all."""

_STARTUP = 120.0  # seconds to import sympy on a busy machine
_REMEMBERED = 20_000
_MOST_LOST = 12  # so that a batch ends well within train.reward_timeout


def equal(golds: Sequence[str], answers: Sequence[str | None]) -> np.ndarray:
    """Whether math-verify takes each answer for its gold answer: `verify(gold, answer)`.

    Both are put into \\boxed{} first. An answer that is None, blank or longer than 1000 characters
    is wrong, and so is one that takes longer than `TIMEOUT` or more than 2 GiB. Equal pairs are
    compared once, since the samples of a problem repeat their answers. Once 12 answers of a call
    have ended the process, which a policy could learn to do for hours, the others are not compared
    and wrong.

    Args:
      golds: B right answers.
      answers: B answers, as a model gave them.

    Returns:
      [B] bool.

    Raises:
      ValueError: the lengths differ.
      UserError: math-verify cannot be started.
    """
    if len(golds) != len(answers):
        raise ValueError(f"{len(answers)} answers for {len(golds)} golds; they must pair up")
    lost = _process.lost
    return np.array(
        [
            _equal(gold, answer, _process.lost - lost < _MOST_LOST)
            for gold, answer in zip(golds, answers, strict=True)
        ],
        bool,
    )


def _equal(gold: str, answer: str | None, ask: bool) -> bool:
    if answer is None or not answer.strip() or len(answer) > MAX_LENGTH:
        return False
    with _lock:
        pair = (gold, answer)
        if pair not in _known and not ask:
            return False
        if pair not in _known:
            if len(_known) >= _REMEMBERED:
                _known.clear()
            _known[pair] = _process.compare(gold, answer)
        return _known[pair]


class _Process:
    """The process of `ais_jax.verify_worker`, started at first use."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self.lost = 0  # how often a comparison has ended it

    def compare(self, gold: str, answer: str) -> bool:
        if self._process is not None and self._process.poll() is not None:
            self.close()  # it has died of something else than this pair
        if self._process is None:
            self._start()
        found = self._ask([gold, answer, TIMEOUT], TIMEOUT)
        self.lost += found is None
        return found or False

    def _start(self) -> None:
        # Of the same group of processes: who ends its user's group, ends it too.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ais_jax.verify_worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # sympy orders terms by their hashes: the same pair shall always be judged the same.
            env=child.environment(PYTHONHASHSEED="0"),
        )
        if not self._ask(None, _STARTUP):
            raise UserError(
                "math-verify, which compares answers, does not start: see what `python -m "
                f"ais_jax.verify_worker {os.getpid()}` says; it needs the package math-verify"
            )

    def _ask(self, request: list | None, timeout: float) -> bool | None:
        """The next answer; None where there is none in time, and the process is gone."""
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            if request is not None:
                process.stdin.write(json.dumps(request).encode() + b"\n")
                process.stdin.flush()
            line = _line(process.stdout.fileno(), timeout)
        except BrokenPipeError:
            line = b""
        except BaseException:  # an alarm or Ctrl-C: what comes now would answer the next pair
            self.close()
            raise
        if line.endswith(b"\n"):
            return json.loads(line)
        self.close()
        return None

    def close(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            child.bury(process)


def _line(file: int, timeout: float) -> bytes:
    """A line from a pipe, or less of it where time is up or the pipe has ended."""
    end, line = time.monotonic() + timeout, b""
    ready = select.poll()  # select.select() knows the first 1024 files alone
    ready.register(file, select.POLLIN)
    while not line.endswith(b"\n"):
        left = end - time.monotonic()
        if left <= 0 or not ready.poll(1000 * left):
            break
        more = os.read(file, 4096)
        if not more:
            break
        line += more
    return line


def close() -> None:
    """Ends the process, if there is one; a further comparison starts another."""
    with _lock:
        _process.close()


_lock = threading.Lock()
_known: dict[tuple[str, str], bool] = {}
_process = _Process()
atexit.register(close)
