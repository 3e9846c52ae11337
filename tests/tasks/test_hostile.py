"""Every scorer against completions that mean harm: no crash, no hang, no memory, no file.

One process judges them and is watched from here, so that a hang ends a test and not the run. Set
AIS_FUZZ_SEED for other completions.
"""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys

import hostile_worker
import pytest

from ais_jax import tasks

SEED = int(os.environ.get("AIS_FUZZ_SEED", "20260513"))
HERE = pathlib.Path(__file__).parent


def fuzz(count: int, folder: pathlib.Path) -> dict:
    """What the process finds of `count` completions, each judged for every task."""
    process = subprocess.run(
        [sys.executable, str(HERE / "hostile_worker.py"), str(SEED), str(count)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        timeout=600 + count,
    )
    *numbers, last = process.stdout.splitlines() or ["0"]
    if process.returncode:
        number = int(last if last.isdecimal() else numbers[-1])
        text = next(itertools.islice(hostile_worker.completions(SEED, count), number, None))
        hang = process.returncode == -signal.SIGALRM
        what = f"took more than {hostile_worker.BUDGET} s" if hang else process.stderr[-3000:]
        pytest.fail(f"completion {number} of seed {SEED}, {repr(text)[:1000]}: {what}")
    return json.loads(last)


def check(found: dict, count: int, folder: pathlib.Path) -> None:
    assert found["judged"] == {name: count for name in tasks.TASKS}
    assert found["wrong"] == []
    assert found["seen"] == []
    assert list(folder.iterdir()) == []
    assert found["certain"] > count  # of the answers that are counted as wrong without doubt
    assert found["grown"] < 300 * 2**20


def test_hostile_completions(tmp_path):
    check(fuzz(2000, tmp_path), 2000, tmp_path)


@pytest.mark.slow
def test_many_hostile_completions(tmp_path):
    check(fuzz(100_000, tmp_path), 100_000, tmp_path)


HARM = """
import hostile_worker, os
seen = []
hostile_worker.watch(seen)
open(os.__file__).close()
open(b"touched", "w").close()
open("/proc/self/status").close()
os.system("true")
eval(compile("str", "<string>", "eval"))
print(*(text.split()[0] for text in seen))
"""


def test_harm_is_noticed(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", HARM],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE}"},
        timeout=600,
    )
    assert process.stdout.split() == ["open", "open", "os.system", "exec"], process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["touched"]


def test_a_hang_is_told(tmp_path, monkeypatch):
    """Also where C is at work and no handler of a signal runs."""
    (tmp_path / "hostile_worker.py").write_text(
        "import signal\nprint(0, flush=True)\nprint(1, flush=True)\nsignal.alarm(1)\n9**9**9\n"
    )
    monkeypatch.setattr(sys.modules[__name__], "HERE", tmp_path)
    with pytest.raises(pytest.fail.Exception, match=r"completion 1 of seed .*, 3: took more than"):
        fuzz(2, tmp_path)
