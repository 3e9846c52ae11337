"""Every scorer against completions that mean harm: no crash, no hang, no memory, no file.

One process judges them and is watched from here, so that a hang ends a test and not the run. Set
AIS_FUZZ_SEED for other completions.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from ais_jax import tasks

SEED = int(os.environ.get("AIS_FUZZ_SEED", "20260513"))
BUDGET = 60  # seconds a completion may take at most: each scorer is asked, math-verify among them
HERE = pathlib.Path(__file__).parent


def fuzz(count: int, folder: pathlib.Path) -> dict:
    """What the process finds of `count` completions, each judged for every task."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "hostile_worker.py"), str(SEED), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
    )
    out, errors = process.communicate(timeout=600 + count)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


def check(found: dict, count: int, folder: pathlib.Path) -> None:
    assert found["judged"] == {name: count for name in tasks.TASKS}
    assert found["wrong"] == []
    assert found["opened"] == []
    assert list(folder.iterdir()) == []
    assert found["slowest"] < BUDGET, found["slowest_text"]
    assert found["grown"] < 300 * 2**20


def test_hostile_completions(tmp_path):
    check(fuzz(2000, tmp_path), 2000, tmp_path)


@pytest.mark.slow
def test_many_hostile_completions(tmp_path):
    check(fuzz(100_000, tmp_path), 100_000, tmp_path)
