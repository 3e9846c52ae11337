"""Comparison by math-verify in another process: what agrees, what hostile answers cannot do."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from processes import alive, gone

from ais_jax.tasks import verify


@pytest.fixture
def quick(monkeypatch):
    """Two seconds a comparison, and nothing remembered."""
    monkeypatch.setattr(verify, "TIMEOUT", 2.0)
    monkeypatch.setattr(verify, "_known", {})


@pytest.mark.parametrize(
    ("gold", "answer", "want"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "1/2", True),
        ("\\frac{1}{2}", "50\\%", True),
        ("0.5", "\\frac12", True),
        ("3\\sqrt{13}", "\\sqrt{117}", True),
        ("x+2", "2+x", True),
        ("(x-1)(x+1)", "x^2-1", True),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("[1,2)", "[1,2)", True),
        ("27", "27.0", True),
        ("27", "28", False),
        ("\\frac{1}{2}", "0.51", False),
        ("[1,2)", "(1,2)", False),
        ("x+2", "x+3", False),
        ("\\text{east}", "west", False),
        ("7", "", False),
        ("7", " ", False),
        ("7", None, False),
        ("7", "7" + " " * 1000, False),
        ("7", "\\sqrt{" * 400, False),
        ("7", "(" * 1200, False),
        ("7", "\\frac{" * 500, False),
        ("7", "7" * 100_000, False),
    ],
)
def test_answers_are_compared(gold, answer, want):
    assert verify.equal([gold], [answer]).tolist() == [want]


ENDLESS = "9^{9^{9^{9}}}"  # computed in C, where no other thread runs
HOSTILE = [
    ENDLESS,
    "10^{10^{10}}!",
    "\\sqrt{" * 150,
    "(" * 400,
    "\\frac{" * 160,
    "9" * 1000,
    "(1+x)^{1000}",
    "x^{x^{x}}" * 60,
    "1" + "+1" * 450,
    "__import__('os').system('touch touched')",
    "open('touched','w')",
    "{0.__class__.__mro__}",
    "%s%s%n",
    "\\input{/etc/passwd}",
    "\\write18{touch touched}",
    "٣",
    "\x00",
    "\u202e7\u202d",
    "\\begin{matrix}" * 50,
    "nan",
    "\\infty",
    "\\int_0^1 x^{x^x} dx",
    "\\sum_{n=1}^{10^{100}} n",
]


def test_hostile_answers_are_wrong_and_leave_nothing_behind(quick, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    verify.close()  # the next one begins in this folder
    found = verify.equal(["7"] * len(HOSTILE), HOSTILE)
    assert not found.any(), [h for h, ok in zip(HOSTILE, found, strict=True) if ok]
    assert verify.equal(["\\frac12"], ["0.5"]).tolist() == [True]
    assert list(tmp_path.iterdir()) == []


def test_what_takes_too_long_is_wrong_once(quick):
    before = verify._process.lost
    assert verify.equal(["7"] * 50, [ENDLESS] * 50).sum() == 0
    assert verify._process.lost == before + 1


def test_it_works_in_threads(quick):
    found = {}

    def ask(i):
        found[i] = verify.equal(["\\frac12", str(i)], ["0.5", "10"]).tolist()

    threads = [threading.Thread(target=ask, args=(i,)) for i in (9, 10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {9: [True, False], 10: [True, True]}


def test_a_dead_process_is_started_again(quick):
    verify.equal(["\\frac12"], ["0.5"])
    process = verify._process._process
    process.kill()
    process.wait()
    assert verify.equal(["7"], ["\\frac{14}{2}"]).tolist() == [True]
    process = verify._process._process
    threading.Timer(0.5, process.kill).start()
    assert verify.equal(["7", "8"], [ENDLESS, "\\frac{16}{2}"]).tolist() == [False, True]
    assert verify._process._process is not process
    assert len(verify._known) == 4


class Interrupted(BaseException):
    """Not an Exception, as Ctrl-C and the alarms of rewards are not."""


def test_an_interrupted_comparison_answers_for_no_other(quick, monkeypatch):
    def interrupt(*_):
        raise Interrupted

    verify.equal(["\\frac12"], ["0.5"])
    slow = "\\int_0^1 x^{x^x} dx"
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Interrupted):
            verify.equal(["7"], [slow])
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ("7", slow) not in verify._known
    assert verify.equal(["8", "9"], ["\\frac{16}{2}", "\\frac{16}{2}"]).tolist() == [True, False]


USER = """
import sys, time
from ais_jax.tasks import verify
verify.equal(["7"], ["\\\\frac{14}{2}"])
print(verify._process._process.pid, flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_ends_with_its_user(how):
    user = subprocess.Popen(
        [sys.executable, "-c", USER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    worker = int(user.stdout.readline())
    assert alive(worker)
    user.send_signal(how)
    _, errors = user.communicate(timeout=60)
    gone(worker)
    assert "verify_worker" not in errors


BUSY = """
import sys
from ais_jax.tasks import verify
verify.equal(["7"], ["\\\\frac{14}{2}"])
print(verify._process._process.pid, flush=True)
verify.equal(["7"], [sys.argv[1]])
"""


@pytest.mark.parametrize("group", [False, True])
def test_it_ends_with_its_user_in_the_middle_of_a_comparison(group):
    user = subprocess.Popen(
        [sys.executable, "-c", BUSY, ENDLESS], stdout=subprocess.PIPE, start_new_session=group
    )
    worker = int(user.stdout.readline())
    time.sleep(0.5)
    if group:
        os.killpg(user.pid, signal.SIGKILL)
    else:
        user.kill()
    user.communicate()
    gone(worker)


ASK = """
import json, os, resource, sys
from ais_jax import verify_worker
verify_worker._limit()
sys.addaudithook(verify_worker._forbid)
found = {}
for name, code in json.loads(sys.argv[1]).items():
    try:
        exec(code)
        found[name] = "done"
    except BaseException as error:
        found[name] = type(error).__name__
print(json.dumps(found))
"""


def test_the_process_has_little_memory_and_no_files(tmp_path):
    tries = {
        "memory": "bytearray(3 * 2**30)",
        "little": "bytearray(2**20)",
        "write": "open('touched', 'w')",
        "descriptor": "os.open('touched', os.O_CREAT | os.O_WRONLY)",
        "read": "open('/etc/passwd')",
        "own": "open('secret')",
        "remove": "os.remove('secret')",
        "rename": "os.rename('secret', 'touched')",
        "folder": "os.mkdir('touched')",
        "kill": "os.kill(os.getppid(), 9)",
        "start": "os.system('true')",
        "fork": "os.fork()",
        "import": "import colorsys",
    }
    (tmp_path / "secret").touch()
    done = subprocess.run(
        [sys.executable, "-c", ASK, json.dumps(tries)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )
    assert json.loads(done.stdout) == {
        "memory": "MemoryError",
        "little": "done",
        "write": "PermissionError",
        "descriptor": "PermissionError",
        "read": "PermissionError",
        "own": "PermissionError",
        "remove": "PermissionError",
        "rename": "PermissionError",
        "folder": "PermissionError",
        "kill": "PermissionError",
        "start": "PermissionError",
        "fork": "PermissionError",
        "import": "done",
    }, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["secret"]


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="1 answers for 2 golds"):
        verify.equal(["1", "2"], ["1"])
    assert verify.equal([], []).dtype == np.bool_


def test_a_batch_of_endless_answers_ends(monkeypatch):
    """A policy that learned to write them would otherwise hold its trainer up for hours."""
    monkeypatch.setattr(verify, "TIMEOUT", 0.1)
    monkeypatch.setattr(verify, "_known", {})
    before = verify._process.lost
    answers = [f"9^{{9^{{9^{{{n}}}}}}}" for n in range(10, 60)]
    assert not verify.equal(["7"] * 50, answers).any()
    assert verify._process.lost - before == 12
    monkeypatch.setattr(verify, "TIMEOUT", 5.0)
    assert verify.equal(["\\frac12"], ["0.5"]).tolist() == [True]  # the next batch is compared
