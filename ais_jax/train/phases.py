"""What a run is doing: each phase has a name for the watchdog, and is open to SIGTERM or not."""

from __future__ import annotations

import contextlib
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ais_jax import distributed

_PACKAGE = str(pathlib.Path(__file__).parents[1])
_LONGEST_WAIT = 5.0  # seconds between two looks of the watchdog


class Preempted(SystemExit):
    """The run was told to leave by SIGTERM. Its code is the shell's for that, 128 + 15."""

    def __init__(self):
        super().__init__(128 + signal.SIGTERM)


class Phases:
    """The phases of the main thread, one inside the other.

    A phase that lasts too long is named by a watchdog. SIGTERM ends what is `interruptible` at
    once, by `Preempted`; in all else, where the train state is between two steps, it is kept in
    mind until `leave_if_told` is asked. Of several processes none may leave alone: there it is
    always kept in mind, and all ask together.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._stack: list[tuple[str, float]] = []
        self._open = False
        self._told = False

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Says that `name` is what is done now."""
        self._stack.append((name, self._clock()))
        try:
            yield
        finally:
            self._stack.pop()

    @contextlib.contextmanager
    def watched(self, seconds: float, warn: Callable[[str], None]) -> Iterator[None]:
        """Names every phase that lasts longer than `seconds`, again after every further `seconds`.

        `warn` is called from another thread. 0 seconds watch nothing.
        """
        if seconds == 0:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(
            target=self._watch,
            args=(done, seconds, warn, threading.get_ident()),
            name="watchdog",
            daemon=True,
        )
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _watch(self, done: threading.Event, seconds: float, warn, thread: int) -> None:
        seen, times = None, 0
        while not done.wait(min(seconds / 4, _LONGEST_WAIT)):
            phase = next(iter(self._stack[-1:]), None)  # the list may change at any moment
            if phase is None:
                continue
            if phase != seen:
                seen, times = phase, 0
            name, began = phase
            elapsed = self._clock() - began
            if elapsed // seconds > times:
                times = int(elapsed // seconds)
                warn(f"{name} has not ended for {elapsed:.0f} s; it is at {_position(thread)}")

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM. In the main thread alone, since no other one may."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _on_signal(self, *_) -> None:
        self._told = True
        if self._open and jax.process_count() == 1:
            self._open = False
            raise Preempted

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """What can be dropped at any moment: it changes nothing that is kept.

        To be entered by all processes.

        Raises:
          Preempted: SIGTERM came, before or meanwhile.
        """
        self._open = True
        try:
            self.leave_if_told()
            yield
        finally:
            self._open = False

    def leave_if_told(self) -> None:
        """To be called where all that is kept is whole, by all processes.

        Raises:
          Preempted: SIGTERM came to one of them.
        """
        if distributed.gather(np.array([self._told])).any():
            raise Preempted


def _position(thread: int) -> str:
    """Where a thread is: the innermost line of this package, and what it has called."""
    stack = traceback.extract_stack(sys._current_frames()[thread])
    ours = [frame for frame in stack if frame.filename.startswith(_PACKAGE)]
    places = [f"{pathlib.Path(f.filename).name}:{f.lineno} ({f.name})" for f in (*ours, stack[-1])]
    return ", in ".join(dict.fromkeys(places[-2:]))
