"""Rewards that may fail: a reward function that raises, hangs or dies costs rows, not the run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ais_jax import child, distributed
from ais_jax.errors import UserError
from ais_jax.tasks.rewards import Composition, Judged, RewardFn
from ais_jax.train.phases import Phases

_MOST_HANGS = 8  # rows of a batch; each costs the whole timeout
_MOST_WARNINGS = 5
_STARTUP_SECONDS = 60.0  # that a worker has to import what it needs


class _Failed(Exception):
    """There are no rewards for these completions."""


class _Hung(BaseException):
    """Time is up. No Exception, which a reward function might catch."""


class Rewarder:
    """Rewards of completions, as a context manager.

    A composition, or any function named as "module:name", is computed by a process of its own. It
    never imports jax, and is killed and started again where it hangs. A function object cannot be
    sent there: it runs here, and an alarm ends it, if this is the main thread and the function runs
    Python (the alarm waits for other code to return).

    Where a batch fails, its rows are asked one by one.
    """

    def __init__(
        self,
        function: RewardFn | str | Composition,
        group_size: int,
        timeout: float,
        phases: Phases,
        warn: Callable[[str], None],
    ):
        """Prepares; nothing is started yet.

        Args:
          function: (completions, examples) -> float rewards [B], the name of such a function, or
            a composition, which gives columns [B, K].
          group_size: completions of the same prompt, in consecutive rows.
          timeout: seconds that a call may take.
          phases: told while rewards are computed.
          warn: is given what to say to the person, of the first failures.
        """
        self._group_size, self._timeout = group_size, timeout
        self._phases, self._warn = phases, warn
        self._function = function
        self._composition = function if isinstance(function, Composition) else None
        self._worker = _Worker(function) if isinstance(function, str | Composition) else None
        self._warnings = self._failed = 0

    def __enter__(self) -> Rewarder:
        if self._worker is not None:
            distributed.together(self._worker.check)
        return self

    def __exit__(self, *exc_info) -> None:
        if self._worker is not None:
            self._worker.close()

    def take_failed(self) -> int:
        """Rows without a reward since the last call."""
        failed, self._failed = self._failed, 0
        return failed

    def judge(
        self, completions: Sequence[str], examples: Sequence[dict], score: RewardFn
    ) -> Judged:
        """Rewards, scores and terms; `score` is asked where the reward is not a composition.

        The score of a row that has failed is NaN.

        Raises like a call.
        """
        found = self(completions, examples)
        if self._composition is not None:
            return self._composition.judged(found)
        return Judged(found, np.asarray(score(completions, examples), np.float32), {})

    def __call__(self, completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
        """Rewards [B] or columns [B, K] float32. A row that failed has its group's mean.

        Its advantage then is 0 but for rounding, and the mean of its group is that of the others.

        Raises:
          UserError: nothing at all was rewarded, too many rows hang, or the function returned
            something else than finite numbers, one a completion.
        """
        with self._phases.phase("reward"):
            try:
                return self._call(completions, examples)
            except _Failed as error:
                rewards, errors = self._row_by_row(completions, examples)
                if not errors:
                    self._say(f"the reward function failed for a batch, not for its rows: {error}")
                    return rewards
        if len(errors) == len(completions):
            row, first = next(iter(errors.items()))
            raise UserError(
                f"the reward function failed for all {len(completions)} completions, "
                f"for completion {row} by {first}"
            )
        self._failed += len(errors)
        row, first = next(iter(errors.items()))
        self._say(
            f"the reward function failed for {len(errors)} of {len(completions)} completions, "
            f"for completion {row} by {first}"
        )
        failed = np.isin(np.arange(len(rewards)), list(errors))
        filled = fill(rewards, failed, self._group_size)
        if self._composition is not None:
            filled[failed, -1] = np.nan  # a score is measured or unknown
        return filled

    def _row_by_row(self, completions, examples) -> tuple[np.ndarray, dict[int, str]]:
        """Rewards [B] or [B, K], 0 where there is none, and why there is none by row."""
        rewards = np.zeros((len(completions), *self._columns), np.float32)
        errors: dict[int, str] = {}
        hangs = 0
        for row, (completion, example) in enumerate(zip(completions, examples, strict=True)):
            try:
                rewards[row] = self._call([completion], [example])[0]
            except _Failed as error:
                errors[row] = str(error)
                hangs += isinstance(error.__cause__, _Hung)
            if hangs >= _MOST_HANGS:
                raise UserError(
                    f"the reward function hangs: {hangs} completions of a batch were not rewarded "
                    f"within train.reward_timeout={self._timeout:g} s each"
                )
        return rewards, errors

    def _call(self, completions, examples) -> np.ndarray:
        """What a function answers, float32; `_Failed` if it does not, of `_Hung` if time is up."""
        try:
            rewards: Any
            if self._worker is not None:
                rewards = self._worker.rewards(completions, examples, self._timeout)
            else:
                with _alarm(self._timeout):
                    rewards = self._function(completions, examples)  # type: ignore[operator]
        except _Hung as error:
            raise _Failed(f"taking longer than {self._timeout:g} s") from error
        except _Failed:
            raise
        except Exception as error:
            if self._worker is not None:
                raise
            raise _Failed(f"{type(error).__name__}: {error}") from error
        if self._composition is not None:
            names = [name for name, _ in self._composition.terms]
            _check_finite(rewards := np.array(rewards, np.float32), [*names, "the task's score"])
            return rewards
        return checked_rewards(rewards, len(completions))

    @property
    def _columns(self) -> tuple[int, ...]:
        return () if self._composition is None else (len(self._composition.terms) + 1,)

    def _say(self, text: str) -> None:
        self._warnings += 1
        if self._warnings <= _MOST_WARNINGS:
            last = "; no more is said of this" if self._warnings == _MOST_WARNINGS else ""
            self._warn(text + last)


class _Worker:
    """The process of `ais_jax.reward_worker` and how it is spoken to."""

    def __init__(self, function: str | Composition):
        self._reward = function if isinstance(function, str) else dataclasses.astuple(function)
        self._name = self._reward if isinstance(self._reward, str) else "rewards"
        self._process: subprocess.Popen | None = None

    def check(self) -> None:
        """Starts the process, and raises UserError if it has no such function."""
        try:
            self._ask({}, _STARTUP_SECONDS)
        except (_Hung, _Failed) as error:
            raise UserError(
                f"the process that computes {self._name} does not start: "
                f"{error or 'it takes too long'}"
            ) from error

    def rewards(self, completions, examples, timeout: float) -> list[float]:
        """Raises _Failed, or _Hung where the process had to be killed."""
        if self._process is None:
            self.check()  # so that the imports of a new process are not counted
        answer = self._ask({"completions": list(completions), "examples": list(examples)}, timeout)
        return answer["rewards"]

    def _ask(self, request: dict, timeout: float) -> dict:
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        late = threading.Event()

        def kill():
            late.set()
            _kill(process)

        timer = threading.Timer(timeout, kill)
        timer.daemon = True
        timer.start()
        line = json.dumps({"reward": self._reward, **request})
        try:
            process.stdin.write(line + "\n")
            process.stdin.flush()
            answer = process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            timer.cancel()
        if not answer.endswith("\n"):  # it has died, perhaps in the middle of its answer
            code = process.wait()
            self.close()
            if late.is_set():
                raise _Hung
            raise _Failed(f"the end of its process with code {code}")
        found = json.loads(answer)
        if "malformed" in found:
            raise UserError(found["malformed"])
        if "failed" in found:
            raise _Failed(found["failed"])
        return found

    def _started(self) -> subprocess.Popen:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ais_jax.reward_worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=child.environment(),
                encoding="ascii",
                start_new_session=True,
            )
        return self._process

    def close(self) -> None:
        """Ends the process, whatever it does."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            child.bury(process)


def _kill(process: subprocess.Popen) -> None:
    """Ends a worker and what it has started, which would keep its standard output open."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raises _Hung after `seconds`; where this is not the main thread, never."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise _Hung

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)


def fill(rewards: np.ndarray, failed: np.ndarray, group_size: int) -> np.ndarray:
    """Rewards [B] or [B, K] with its group's others' mean in each row of `failed` [B] bool.

    0 where a whole group has failed.
    """
    filled = rewards.reshape(-1, group_size, *rewards.shape[1:]).copy()
    for group, lost in zip(filled, failed.reshape(-1, group_size), strict=True):
        others = group[~lost]
        # Clipped, since the mean of equal numbers may differ from them in the last bit.
        group[lost] = np.clip(others.mean(0), others.min(0), others.max(0)) if others.size else 0
    return filled.reshape(rewards.shape)


def checked_rewards(rewards, count: int) -> np.ndarray:
    """Rewards [B] float32.

    Raises:
      UserError: the reward function returned something else, or a number that is not finite.
    """
    expected = f"the reward function must return {count} numbers, one a completion"
    try:
        array = np.asarray(rewards, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"{expected} ({error})") from error
    if array.shape != (count,):
        raise UserError(f"{expected}; it returned shape {array.shape}")
    _check_finite(array[:, None], ["the reward function"])
    return array


def _check_finite(columns: np.ndarray, names: Sequence[str]) -> None:
    """Raises UserError for the first number of [B, K] that is none, with the name of its column."""
    wrong = np.argwhere(~np.isfinite(columns))
    if len(wrong):
        row, column = wrong[0]
        raise UserError(f"{names[column]} returned {columns[row, column]} for completion {row}")
