"""Processes that take turns: each does one run a request, and only one of them runs at a time.

Each has a process of its own, so that its peak memory is its own, whatever it is written in, and
so that what differs between two of them is never what a third one has left behind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

HERE = pathlib.Path(__file__).parent
# Taken as it is needed, and nearly all of it if need be: others may be there too.
_GPU_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
}


class Failed(Exception):
    """A contestant could not do what it was asked for; the message fits into a table."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """Who takes part.

    Attributes:
      script: in this folder; speaks the language of peers/worker.py.
      job: what it is to load.
      python: of the environment that it needs.
    """

    script: str
    job: Mapping[str, Any]
    python: str = sys.executable


class Contestant:
    """A running process. `about` is what it says of what it has loaded."""

    def __init__(self, entry: Entry, timeout: float):
        self._timeout = timeout
        self._folder = tempfile.TemporaryDirectory()
        self._errors = pathlib.Path(self._folder.name) / "stderr"
        job = pathlib.Path(self._folder.name) / "job.json"
        job.write_text(json.dumps(entry.job))
        environment = {**os.environ, **_GPU_MEMORY}
        try:
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    [entry.python, str(HERE / entry.script), str(job)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=environment,
                    bufsize=0,
                )
        except OSError as error:
            raise Failed(f"{entry.python}: {error.strerror}") from None
        self._buffer = b""
        try:
            self.about = self._answer()
        except Failed:
            self.close()
            raise

    def ask(self, request: Mapping[str, Any]) -> dict:
        """The answer to a request. Raises Failed."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError:
            raise Failed(self._last_words()) from None
        return self._answer()

    def close(self) -> None:
        """Ends the process; more than once does no harm."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def _answer(self) -> dict:
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                self._process.kill()
                raise Failed(f"no answer within {self._timeout:.0f} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise Failed(self._last_words())
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\n", 1)
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        lines = self._errors.read_text(errors="replace").strip().splitlines()
        return f"ended with {code}: {lines[-1][:200] if lines else 'no message'}"


Requests = Callable[[str, Any], Sequence[Mapping[str, Any]]]


@dataclasses.dataclass
class Turns:
    """What came of it.

    Attributes:
      about: what each contestant says of itself.
      rounds: by (name, case), a list a round of the answers to its requests.
      last: answers to the last requests, by name.
      failures: by (name, case), or (name, None) where it failed in all of them.
    """

    about: dict[str, dict] = dataclasses.field(default_factory=dict)
    rounds: dict[tuple[str, Any], list[list[dict]]] = dataclasses.field(default_factory=dict)
    last: dict[str, list[dict]] = dataclasses.field(default_factory=dict)
    failures: dict[tuple[str, Any], str] = dataclasses.field(default_factory=dict)

    def failure(self, name: str, case: Any) -> str | None:
        """Why there are no rounds of a contestant in a case."""
        return self.failures.get((name, case)) or self.failures.get((name, None))


def take_turns(
    entries: Mapping[str, Entry],
    cases: Sequence[Any],
    requests: Requests,
    repeats: int,
    *,
    last: Callable[[str], Sequence[Mapping[str, Any]]] = lambda name: (),
    alone: bool = False,
    timeout: float = 1800.0,
) -> Turns:
    """Lets contestants do `requests(name, case)`, in turns and `repeats` times, for each case.

    Before that each does them once for nothing, which compiles. At the end come `last(name)`.

    Args:
      entries: by name.
      cases: one after the other.
      requests: those of a round.
      repeats: rounds.
      last: requests that are made once.
      alone: only one process exists at a time, where memory has no room for all.
      timeout: seconds that an answer may take.
    """
    turns = Turns()
    groups = [[name] for name in entries] if alone else [list(entries)]
    for group in groups:
        running: dict[str, Contestant] = {}
        try:
            for name in group:
                with _noted(turns, name, None):
                    running[name] = Contestant(entries[name], timeout)
                    turns.about[name] = running[name].about
                    _say(f"{name}: loaded")
            for case in cases:
                for round_ in range(repeats + 1):
                    _round(turns, running, case, requests, round_)
            for name, contestant in running.items():
                with _noted(turns, name, "last"):
                    turns.last[name] = [contestant.ask(request) for request in last(name)]
        finally:
            for contestant in running.values():
                contestant.close()
    return turns


def _round(turns: Turns, running, case, requests: Requests, round_: int) -> None:
    """Round 0 is not counted."""
    for name, contestant in running.items():
        if turns.failure(name, case) is not None:
            continue
        with _noted(turns, name, case):
            answers = [contestant.ask(request) for request in requests(name, case)]
            _say(f"{name}, {case}, round {round_}: {[a.get('seconds') for a in answers]}")
            if round_:
                turns.rounds.setdefault((name, case), []).append(answers)


@contextlib.contextmanager
def _noted(turns: Turns, name: str, case: Any):
    """Keeps a failure instead of raising it."""
    try:
        yield
    except Failed as failure:
        _say(f"{name}, {case}: {failure}")
        turns.failures[name, case] = str(failure)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
