"""Several processes on one CPU: what they tell each other, and a run that equals that of one."""

import json
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from tiny_job import QUICK, QWEN3, one_device

from ais_jax import config as config_lib
from ais_jax import distributed, settings
from ais_jax.errors import UserError
from ais_jax.train.metrics import read_metrics

LONGEST = 400  # seconds; a process that waits for another for ever must not hold up the tests
VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

TALK = """
import sys

import jax
import numpy as np

from ais_jax import distributed, mesh
from ais_jax.errors import UserError

me, told = int(sys.argv[1]), sys.argv[2:]
distributed.start(*told[:1], *map(int, told[1:]))
assert (jax.process_count(), jax.process_index(), distributed.first()) == (2, me, me == 0)
numbers, flags = distributed.gather((np.arange(2) + 10 * me, np.array([me == 1])))
assert numbers.tolist() == [0, 1, 10, 11] and flags.tolist() == [False, True]
assert distributed.share(6) == slice(3 * me, 3 * me + 3)
assert distributed.agreed(f"runs/\\u03c0 {me}") == "runs/\\u03c0 0"

rows = mesh.batch_sharding(mesh.make_mesh(mesh.MeshConfig()))
x = np.arange(8).reshape(4, 2)
placed = distributed.put(x, rows)
assert placed.shape == (4, 2) and not placed.is_fully_addressable
np.testing.assert_array_equal(placed.addressable_data(0), x[2 * me : 2 * me + 2])
keys = jax.random.split(jax.random.key(3), 4)
draw = jax.vmap(jax.random.bits)
np.testing.assert_array_equal(
    draw(distributed.put(keys, rows)).addressable_data(0), draw(keys)[2 * me : 2 * me + 2]
)


def fails_in_one():
    if me == 1:
        raise ZeroDivisionError("no such row")


try:
    distributed.together(fails_in_one)
except (UserError, ZeroDivisionError) as error:
    print(type(error).__name__, error)
assert distributed.together(lambda: me) == me
"""


JOB = """
import os
import signal
import sys

import ais_jax
from ais_jax import config, distributed
from ais_jax.train import run

name, steps, *told = sys.argv[1:]
distributed.start(*told[:1], *map(int, told[1:]))
job = config.load("job.yaml", [f"output_dir={name}", f"train.steps={steps}"])
calls, initial_params = [], run.initial_params


def preempted_at(moment):
    if os.environ.get("PREEMPTED_AT") == moment:
        os.kill(os.getpid(), signal.SIGTERM)


def starts(*args):
    preempted_at("start")
    return initial_params(*args)


def reward(completions, examples):
    calls.append(len(completions))
    preempted_at(f"reward {len(calls)}")
    return [len(set(text)) for text in completions]


run.initial_params = starts
ais_jax.train(job, reward)
"""


def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(commands, cwd, environments=({}, {}, {}, {})):
    """Runs commands at the same time, with one CPU device each: [(exit code, stdout, stderr)]."""
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=one_device() | environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for command, environment in zip(commands, environments, strict=False)
    ]
    try:
        outputs = [process.communicate(timeout=LONGEST) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        (process.returncode, _own(out), err)
        for process, (out, err) in zip(started, outputs, strict=True)
    ]


def _own(text):
    """Without what the library of collectives says on the standard output."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("[Gloo]"))


def slurm(number, count):
    """What SLURM tells a task."""
    return {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": "0",
    }


@pytest.mark.parametrize("found_by", ["flags", "variables", "slurm"])
def test_processes_agree_share_and_stop_together(tmp_path, found_by):
    (tmp_path / "talk.py").write_text(TALK)
    number, commands = port(), [["talk.py", i] for i in range(2)]
    environments: list[dict[str, str]] = [{}, {}]
    for i in range(2):
        told = [f"127.0.0.1:{number}", "2", str(i)]
        if found_by == "flags":
            commands[i] += told
        elif found_by == "variables":
            environments[i] = dict(zip(VARIABLES, told, strict=True))
        else:
            environments[i] = slurm(i, 2) | {"JAX_COORDINATOR_PORT": str(number)}
    first, second = launch(commands, tmp_path, environments)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert first[1] == "UserError process 1 has failed; its own output says why\n"
    assert second[1] == "ZeroDivisionError no such row\n"


@pytest.fixture(scope="module")
def config():
    """A job of a few seconds with all that processes have to agree on."""
    return settings.build(
        config_lib.Config,
        {
            "model": {"qwen3": QWEN3},
            "task": {
                "train_examples": 128,
                "heldout_examples": 16,
                "countdown": {"max_number": 12, "listed_in_order": True},
            },
            "warmup": {"steps": 10, "batch_size": 64},
            "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 10},
            "grpo": {
                "batch_size": 32,
                "group_size": 4,
                "minibatches": 2,
                "kl_coef": 0.1,
                "dynamic_sampling": True,
                "dynamic_sampling_rounds": 2,
            },
            "train": {"steps": 3, "dtype": "float32", "eval_batch_size": 16, "samples_every": 1},
        },
    )


def test_processes_and_devices_do_not_change_what_is_learned(config, tmp_path):
    """One process, two, and eight devices; and one goes on where two have stopped."""
    settings.save_yaml(config, tmp_path / "job.yaml")
    (tmp_path / "job.py").write_text(JOB)
    address = f"127.0.0.1:{port()}"
    cached = {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    eight = {**cached, "XLA_FLAGS": f"{QUICK} --xla_force_host_platform_device_count=8"}
    runs = launch(
        [*(["job.py", "two", 2, address, 2, i] for i in range(2)), ["job.py", "one", 2]],
        tmp_path,
        [cached] * 3,
    )
    runs += launch([["job.py", "eight", 2]], tmp_path, [eight])
    assert [code for code, _, _ in runs] == [0] * 4, "".join(err for _, _, err in runs)
    assert "2 cpu device(s) of 2 processes" in runs[0][1]
    assert runs[1][1] == ""  # process 0 alone prints
    one, two, devices = (
        read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two", "eight")
    )
    assert len(one) == len(two) == len(devices) == 2
    assert all(row["grad_norm"] > 0 for row in one)
    for name in ("loss", "reward", "entropy", "grad_norm", "tokens"):
        values = [row[name] for row in one]
        np.testing.assert_allclose([row[name] for row in two], values, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose([row[name] for row in devices], values, rtol=1e-5, err_msg=name)
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two")]
    assert samples[0] == samples[1]
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two")
    ]
    assert summaries[0]["after"] == summaries[1]["after"]

    more = launch([["job.py", name, 3] for name in ("one", "two")], tmp_path, [cached] * 2)
    assert all("going on after step 2" in out for _, out, _ in more), more[0][2] + more[1][2]
    last = [read_metrics(tmp_path / name / "metrics.jsonl")[2] for name in ("one", "two")]
    assert last[0]["reward"] == last[1]["reward"]  # the same problems came next
    assert last[0]["loss"] == pytest.approx(last[1]["loss"], rel=1e-5)


def two(name, steps, folder, *environments):
    address = f"127.0.0.1:{port()}"
    cached = {"XDG_CACHE_HOME": str(folder / "cache")}
    commands = [["job.py", name, steps, address, 2, i] for i in range(2)]
    return launch(commands, folder, [cached | x for x in environments or ({}, {})])


def test_what_befalls_one_process_is_no_end_for_both(config, tmp_path):
    """SIGTERM to one of two, in a step and before the first of a resumed run; then its part of the
    newest checkpoint is damaged."""
    config = settings.replace(
        config, {"mesh.fsdp": 2, "mesh.data": 1, "train.checkpoint_every": 1, "warmup.steps": 0}
    )
    settings.save_yaml(config, tmp_path / "job.yaml")
    (tmp_path / "job.py").write_text(JOB)
    told = two("run", 5, tmp_path, {}, {"PREEMPTED_AT": "reward 3"})
    assert [code for code, _, _ in told] == [143, 143], told[0][2] + told[1][2]
    assert "told to leave: 2 steps are done" in told[0][1]
    again = two("run", 5, tmp_path, {}, {"PREEMPTED_AT": "start"})
    assert [code for code, _, _ in again] == [143, 143], again[0][2] + again[1][2]
    state = tmp_path / "run" / "checkpoints" / "2" / "state"
    for part in (state / "ocdbt.process_1" / "d").iterdir():
        half = part.stat().st_size // 2
        part.write_bytes(part.read_bytes()[:half] + bytes(half))
    last = two("run", 3, tmp_path)
    assert [code for code, _, _ in last] == [0, 0], last[0][2] + last[1][2]
    assert "going on after step 1 " in last[0][1]
    assert (tmp_path / "run" / "checkpoints" / "2.damaged0").is_dir()
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3]


def test_processes_that_were_told_different_things_do_not_begin(config, tmp_path):
    settings.save_yaml(config, tmp_path / "job.yaml")
    (tmp_path / "job.py").write_text(JOB)
    address = f"127.0.0.1:{port()}"
    runs = launch([["job.py", "run", 2 + i, address, 2, i] for i in range(2)], tmp_path)
    for code, _, err in runs:
        assert code == 1
        assert "the settings of process 1 and of process 0 differ; start all alike" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", [{}, slurm(0, 1)], ids=["plain", "only task"])
def test_a_single_process_is_left_alone(tmp_path, task):
    code = (
        "import jax; from ais_jax import distributed; distributed.start();"
        "print(jax.distributed.is_initialized(), jax.process_count())"
    )
    (done,) = launch([["-c", code]], tmp_path, [task])
    assert done[1] == "False 1\n", done[2]


@pytest.mark.parametrize(
    ("told", "environment", "message"),
    [
        (("localhost", 2, 0), {}, "--coordinator=localhost must be host:port"),
        (("localhost:99999", 2, 1), {}, "--coordinator=localhost:99999 must be host:port"),
        (("localhost:1", None, None), {}, "--processes and --process-id missing"),
        ((None, 2, None), {}, "--coordinator and --process-id missing"),
        (("localhost:1", 2, 2), {}, "--process-id=2 must be from 0"),
        (("localhost:1", 2, -1), {}, "--process-id=-1 must be from 0"),
        (("localhost:1", 0, 0), {}, "--processes=0 must be at least 1"),
        ((None, None, None), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two' is no whole"),
        ((None, None, None), {"JAX_PROCESS_ID": "1"}, "--coordinator and --processes missing"),
    ],
)
def test_what_does_not_fit_together_is_told(monkeypatch, told, environment, message):
    for name in (*distributed._LAUNCHERS, *VARIABLES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        distributed.start(*told)
    assert not jax.distributed.is_initialized()


def test_prompts_that_processes_cannot_share_are_refused(config):
    config.check_devices(8, processes=8)
    with pytest.raises(ValueError, match=r"group_size=8 prompts .* the 3 processes"):
        config.check_devices(8, processes=3)


def test_one_process_keeps_everything():
    x = np.arange(3)
    assert distributed.gather(x) is x
    assert distributed.share(3) == slice(0, 3)
    assert distributed.agreed("a") == "a"
    with pytest.raises(KeyError):
        distributed.together({}.__getitem__, "absent")


def test_a_pod_that_cannot_find_the_others_does_not_run_alone(tmp_path):
    code = (
        "from ais_jax import distributed, errors\n"
        "distributed.start(processes=1)\n"
        "try: distributed.start()\n"
        "except errors.UserError as error: print(error)"
    )
    (done,) = launch([["-c", code]], tmp_path, [{"JOB_COMPLETION_INDEX": "0"}])
    assert done[1].startswith("jax cannot find the other pods of this indexed job"), done[2]


def test_a_process_0_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(distributed, "_PATIENCE", 0.1)
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"process 0 cannot be reached at --coordinator=127\.0\.0"):
        distributed.start(f"127.0.0.1:{port()}", 2, 1)
