"""Runs what a study still lacks, in parallel processes, and writes down what it has come to."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import filelock

from ais_jax import child, settings
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.study import config as config_lib
from ais_jax.study import outcomes
from ais_jax.study.config import Plan, Study
from ais_jax.train.display import Column, Progress
from ais_jax.train.metrics import read_json, write_json

_PATIENCE = 120.0  # seconds that a process has to save what it has done
_COLUMNS = (
    Column("accuracy", "accuracy", lambda x: f"{100 * x:.1f} %"),
    Column("seconds", "seconds", "{:.0f}".format),
)


class Unit(NamedTuple):
    """A training run, or the measurement of gradients along one."""

    arm: str
    seed: int
    folder: pathlib.Path
    request: dict[str, Any]  # what a worker is told

    @property
    def trains(self) -> bool:
        """Whether it is a training run."""
        return "config" in self.request


def compare(
    path: str | os.PathLike,
    overrides: Sequence[str] = (),
    output: str | os.PathLike | None = None,
    jobs: int = 1,
    minutes: float | None = None,
    arms: Sequence[str] = (),
    only: str | None = None,
) -> outcomes.Outcomes:
    """Runs a study's arms and seeds, those that are not done yet, and writes its results.

    Args:
      path: the study's YAML file.
      overrides: such as "seeds=[5,6]".
      output: the study's folder, which goes on where it was stopped; None is runs/<file's name>.
      jobs: processes at a time; the cores are shared out among them.
      minutes: begin nothing new after this long.
      arms: train these, and measure gradients along these, alone; none is all.
      only: "runs" or "gradients"; None is both.

    Returns:
      What all runs in the folder have come to.

    Raises:
      UserError: the study cannot be, or the folder holds another one, runs with other settings or
        files that are damaged, or another process is at work in it.
      SystemExit: SIGTERM came; what was done is saved, and the code is 143.
    """
    plan = config_lib.load(path, overrides)
    for name in arms:
        if name not in plan.arms:
            raise UserError(f"{name!r} is no arm of {path}; they are {', '.join(plan.arms)}")
    if jobs < 1:
        raise UserError(f"--jobs {jobs} must be at least 1")
    if minutes is not None and not minutes > 0:
        raise UserError(f"--minutes {minutes:g} must be above 0")
    folder = default_folder(path) if output is None else pathlib.Path(output)
    units = [] if only == "gradients" else [*_runs(plan, folder, arms)]
    if only != "runs":
        units += _gradients(plan, path, overrides, folder, arms)
    with _held(folder):
        try:
            _check_study(folder / "study.yaml", plan.study)
            todo = [unit for unit in units if not _is_done(unit, plan)]
            settings.save_yaml(plan.study, folder / "study.yaml")
        except OSError as error:
            raise UserError(f"{folder} cannot be used: {error.strerror or error}") from error
        todo.sort(key=lambda unit: unit.trains)  # what takes longest first
        _work(todo, len(units), folder, jobs, minutes)
        return outcomes.write(plan, folder)


def default_folder(path: str | os.PathLike) -> pathlib.Path:
    """Where a study goes that is told no other place."""
    return pathlib.Path("runs", pathlib.Path(path).stem)


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    """Keeps a second process out of the folder, where its file system knows locks."""
    lock = filelock.FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(NotImplementedError):
            lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(
            f"another process is at work in {folder}; wait for it, or take another --output"
        ) from error
    except OSError as error:
        raise UserError(f"{folder} cannot be used: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _check_study(path: pathlib.Path, study: Study) -> None:
    """Raises UserError where the folder is one of a study over another base."""
    if not path.exists():
        return
    before = settings.load(Study, path)
    found = {"base": before.base, "settings": before.settings}
    wanted = {"base": study.base, "settings": study.settings}
    _refuse(path.parent, "made", settings.changed_keys(found, wanted))


def _runs(plan: Plan, folder: pathlib.Path, arms: Sequence[str]) -> Iterator[Unit]:
    """A seed of all arms before the next, so that half a study compares them, too."""
    for seed in plan.study.seeds:
        for name, arm in plan.arms.items():
            if arm.train and (not arms or name in arms):
                place = outcomes.run_folder(folder, name, seed)
                tree = settings.to_dict(plan.config(name, seed, place.resolve()))
                yield Unit(name, seed, place, {"config": tree})


def _gradients(
    plan: Plan, path, overrides: Sequence[str], folder: pathlib.Path, arms: Sequence[str]
) -> Iterator[Unit]:
    wanted = plan.study.gradients
    if wanted is None:
        return
    chosen = [along for along in wanted.along if not arms or along in arms]
    for along, seed in itertools.product(chosen, wanted.seeds):
        place = outcomes.gradient_folder(folder, along, seed)
        request = {
            "study": str(pathlib.Path(path).resolve()),
            "overrides": list(overrides),
            "along": along,
            "seed": seed,
            "folder": str(place.resolve()),
        }
        yield Unit(along, seed, place, request)


def _is_done(unit: Unit, plan: Plan) -> bool:
    """Raises UserError where the unit's folder holds something else."""
    if unit.trains:
        _check_same(unit.folder / "config.yaml", unit.request["config"])
        return (unit.folder / "summary.json").exists()
    assert plan.study.gradients is not None
    _check_measured(unit.folder / "settings.json", plan, unit.seed)
    return all((unit.folder / f"step_{x}.json").exists() for x in plan.study.gradients.steps)


def _check_measured(path: pathlib.Path, plan: Plan, seed: int) -> None:
    """Keeps what a measurement depends on, but for which states it is made at; as `_check_same`."""
    wanted = plan.study.gradients
    assert wanted is not None
    known: dict[str, Any] = {"batches": wanted.batches, "blocks": wanted.blocks}
    known["arms"] = {name: settings.to_dict(plan.config(name, seed)) for name in plan.arms}
    if path.exists():
        before = read_json(path)
        for name, tree in before.get("arms", {}).items():
            before["arms"][name] = settings.to_dict(settings.build(Config, tree, str(path)))
        _refuse(path.parent, "measured", settings.changed_keys(before, known))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, known)


def _check_same(path: pathlib.Path, wanted: dict[str, Any]) -> None:
    if not path.exists():
        return
    # Built anew, so that settings which are younger than the run have their defaults.
    before = settings.to_dict(settings.load(Config, path))
    changed = [key for key in settings.changed_keys(before, wanted) if key != "output_dir"]
    _refuse(path.parent, "run", changed)


def _refuse(folder: pathlib.Path, done: str, changed: list[str]) -> None:
    """Raises UserError where settings have changed."""
    if changed:
        raise UserError(
            f"{folder} was {done} with other settings ({', '.join(changed)}); take another "
            "--output, or remove it"
        )


def _work(
    todo: list[Unit], total: int, folder: pathlib.Path, jobs: int, minutes: float | None
) -> None:
    """Lets workers do what is to be done, as long as there is time."""
    waiting: queue.SimpleQueue[Unit] = queue.SimpleQueue()
    for unit in todo:
        waiting.put(unit)
    jobs = min(jobs, len(todo))
    workers = [_Worker(i, _cores(i, jobs), folder) for i in range(jobs)]
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    done = total - len(todo)
    with Progress(total, "study", columns=_COLUMNS, initial_step=done) as progress:
        board = _Board(progress, done)
        threads = [
            threading.Thread(target=_serve, args=(worker, waiting, deadline, board))
            for worker in workers
        ]
        with _sigterm_as_exit():
            try:
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            finally:
                for worker in workers:
                    worker.tell()
                for worker in workers:
                    worker.close()
                for thread in threads:
                    thread.join()
        if not waiting.empty():
            progress.message(f"{waiting.qsize()} parts are left; the same command goes on")


class _Board:
    """Shows what becomes of the units, from any thread."""

    def __init__(self, progress: Progress, done: int):
        self._progress, self._done, self._lock = progress, done, threading.Lock()

    def add(self, unit: Unit, answer: dict[str, Any], seconds: float) -> None:
        """One more has ended."""
        shown, what = {"seconds": seconds}, f"{unit.arm}, seed {unit.seed}"
        with self._lock:
            self._done += 1
            if "failed" in answer:
                self._progress.message(f"{what} failed: {answer['failed']}")
            if "summary" in answer:
                shown["accuracy"] = answer["summary"]["after"]["heldout_accuracy"]
                text = f"{what}: {100 * shown['accuracy']:.1f} % in {seconds:.0f} s"
                self._progress.message(text)
            self._progress.update(self._done, shown)


def _serve(worker: _Worker, waiting: queue.SimpleQueue[Unit], deadline: float, board: _Board):
    """Gives a worker one unit after the other."""
    while not worker.told and time.monotonic() < deadline:
        try:
            unit = waiting.get_nowait()
        except queue.Empty:
            return
        began = time.monotonic()
        answer = worker.ask(unit)
        if answer is None:
            return
        board.add(unit, answer, time.monotonic() - began)


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    def leave(*_) -> None:
        raise SystemExit(143)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cores(index: int, jobs: int) -> list[int]:
    """This process's share of the cores, empty where it is not to be told."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))
    return cores[index::jobs] if jobs <= len(cores) else []


class _Worker:
    """A process of `ais_jax.study.worker` and how it is spoken to."""

    def __init__(self, index: int, cores: list[int], folder: pathlib.Path):
        self._cores, self._log = cores, folder / f"worker_{index}.log"
        self._process: subprocess.Popen | None = None
        self.told = False

    def ask(self, unit: Unit) -> dict[str, Any] | None:
        """What became of a unit: its summary, or why it failed; None after `tell`."""
        failure = unit.folder / "failure.json"
        failure.unlink(missing_ok=True)
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(unit.request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (BrokenPipeError, ValueError):
            line = ""
        if self.told and not line:
            return None
        if line:
            answer: dict[str, Any] = json.loads(line)
        else:
            code = process.wait()
            self._process = None
            answer = {"failed": f"its process ended with code {code}, see {self._log}"}
        if "failed" in answer:
            unit.folder.mkdir(parents=True, exist_ok=True)
            write_json(failure, answer)
        return answer

    def _started(self) -> subprocess.Popen:
        if self._process is None:
            with open(self._log, "ab") as log:
                self._process = subprocess.Popen(
                    [
                        *(sys.executable, "-m", "ais_jax.study.worker", str(os.getpid())),
                        ",".join(map(str, self._cores)),
                    ],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=child.environment(JAX_PLATFORMS=os.environ.get("JAX_PLATFORMS", "")),
                    encoding="utf-8",
                    start_new_session=True,  # Ctrl-C is this process's, which then tells it
                )
            if self.told:  # while it was being started
                self._process.terminate()
        return self._process

    def tell(self) -> None:
        """Asks the process to save what it has done and to leave."""
        self.told = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def close(self) -> None:
        """Waits for it to leave, and ends it where it does not."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
        child.bury(process)
