"""Runs that are killed at any moment, and go on as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_job import QWEN3, one_device

from ais_jax import config as config_lib
from ais_jax import settings
from ais_jax.train import checkpoint
from ais_jax.train.metrics import read_metrics

HERE = pathlib.Path(__file__).parent
STEPS = 40
CLOCKED = ("_seconds", "_per_second", "_gib")
PATIENCE = 300  # seconds that anything may take on a busy machine before the test gives up
SCRIPT = """
import sys
import ais_jax
from ais_jax import config
ais_jax.train(config.load(sys.argv[1]), "reward_functions:slowly")
"""


class Job:
    """A training run of a very small model in processes of its own, and how they are killed."""

    def __init__(self, folder: pathlib.Path):
        self.run, self.file = folder / "run", folder / "config.yaml"
        self.torn = 0  # kills that have left a half-written checkpoint
        sections = {
            "model": {"qwen3": QWEN3},
            "task": {"train_examples": 64, "heldout_examples": 8},
            "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 8},
            "grpo": {"batch_size": 16, "group_size": 4},
            "ais": {"severity_scale": "auto"},
            "train": {
                "steps": STEPS,
                "checkpoint_every": 2,
                "eval_every": 15,
                "eval_batch_size": 8,
                "samples_every": 7,
            },
            "output_dir": str(self.run),
        }
        folder.mkdir()
        settings.save_yaml(settings.build(config_lib.Config, sections), self.file)

    def start(self) -> subprocess.Popen:
        paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
        environment = {"PYTHONPATH": paths, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        return subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(self.file)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=one_device() | environment,
        )

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate(timeout=PATIENCE)
        assert process.returncode == 0, output
        return output

    def steps(self) -> int:
        """Lines of metrics.jsonl."""
        path = self.run / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def half_written(self) -> list[pathlib.Path]:
        return list((self.run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def kill_in_training(self, rng: random.Random) -> None:
        """At a random moment after a random number of further steps."""
        before = self.steps()
        process, further = self.start(), rng.randint(1, 5)
        # Steps after the last checkpoint are dropped first, and then done again.
        wait(lambda: self.steps() != before or process.poll() is not None)
        least = self.steps() + further
        wait(lambda: self.steps() >= least or process.poll() is not None)
        time.sleep(rng.random() * 0.05)
        self.kill(process)

    def kill_in_a_save(self, rng: random.Random) -> None:
        """While the folder of a checkpoint that is being written is there."""
        before, process = self.half_written(), self.start()
        wait(lambda: process.poll() is not None or not any(path.exists() for path in before))
        wait(lambda: process.poll() is not None or self.half_written(), pause=0)
        time.sleep(rng.random() * 0.005)
        self.kill(process)
        self.torn += bool(self.half_written())

    def kill_at_the_start(self, rng: random.Random) -> None:
        """At a random moment of the first seconds: imports, compilation, reading the checkpoint."""
        process = self.start()
        time.sleep(rng.random() * 5)
        self.kill(process)

    def kill(self, process: subprocess.Popen) -> None:
        assert process.poll() is None, process.communicate()[0]
        process.kill()
        output, _ = process.communicate(timeout=PATIENCE)  # ends when its worker has ended too
        assert process.returncode == -signal.SIGKILL, output

    def metrics(self) -> list[dict]:
        rows = read_metrics(self.run / "metrics.jsonl")
        return [{k: v for k, v in row.items() if not k.endswith(CLOCKED)} for row in rows]

    def state(self):
        with checkpoint.manager(self.run / "checkpoints") as manager:
            assert manager.latest_step() == STEPS
            return manager.restore(STEPS).state


def wait(condition, pause: float = 0.002) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(pause)


def assert_equal(parts: Job, whole: Job) -> None:
    assert [row["step"] for row in whole.metrics()] == list(range(1, STEPS + 1))
    assert parts.metrics() == whole.metrics()
    assert all(row["grad_norm"] > 0 for row in whole.metrics())
    samples = [read_metrics(job.run / "samples.jsonl") for job in (parts, whole)]
    assert samples[0] == samples[1]
    jax.tree.map(np.testing.assert_array_equal, parts.state(), whole.state())
    assert parts.half_written() == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that is never interrupted."""
    job = Job(tmp_path_factory.mktemp("kill") / "whole")
    job.finish()
    return job


def test_killed_three_times_and_told_to_leave_once(whole, tmp_path):
    parts, rng = Job(tmp_path / "parts"), random.Random(0)
    parts.kill_in_training(rng)
    parts.kill_in_a_save(rng)
    parts.kill_in_training(rng)

    before, process = parts.steps(), parts.start()
    wait(lambda: parts.steps() != before or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 143, output
    done = parts.steps()
    assert 0 < done < STEPS
    assert f"told to leave: {done} steps are done" in output
    assert (parts.run / "checkpoints" / str(done)).is_dir()

    assert f"going on after step {done} " in parts.finish()
    assert_equal(parts, whole)


@pytest.mark.slow
def test_killed_ten_times(whole, tmp_path):
    parts, rng = Job(tmp_path / "parts"), random.Random(1)
    kinds = [parts.kill_in_training, parts.kill_in_a_save, parts.kill_at_the_start]
    for i in range(10):
        kinds[i % 3](rng)
    assert parts.torn > 0
    parts.finish()
    assert_equal(parts, whole)
