"""The command as a person meets it: in its own process, by exit code and streams."""

import os
import pathlib
import subprocess
import sys

import pytest

from ais_jax import settings
from ais_jax.config import Config

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "countdown_tiny.yaml"


def run(*args, cwd=None):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "ais_jax", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


@pytest.mark.smoke
def test_help_lists_every_key_with_its_meaning():
    result = run("train", "--help")
    assert result.returncode == 0, result.stderr
    flat = " ".join(result.stdout.split())
    for key, _, _, doc in settings.describe(Config):
        assert f" {key} (" in flat, key
        assert " ".join(doc.split()) in flat, key


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["no.yaml"], ["no.yaml"]),
        ([CONFIG, "grpo.groupsize=4"], ["grpo.groupsize", "group_size"]),
        ([CONFIG, "mesh.data=3"], ["mesh.data=3", "1 devices"]),
        ([CONFIG, "model.qwen3.vocab_size=5"], ["vocab_size=5"]),
        ([CONFIG, "task.heldout_examples=10000000"], ["10000000", "exist"]),
        ([CONFIG, "rollout.max_prompt_tokens=4"], ["max_prompt_tokens=4"]),
        ([CONFIG, "rollout.max_new_tokens=2"], ["max_new_tokens=2"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, parts, tmp_path):
    result = run("train", *args, "warmup.cache=false", cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ais-jax: error: ")
    for part in parts:
        assert part in lines[0]


def test_report_of_nothing(tmp_path):
    result = run("report", tmp_path)
    assert result.returncode == 2
    assert "metrics.jsonl" in result.stderr


def test_importing_tasks_does_not_import_jax():
    code = (
        "import sys, ais_jax.tasks; ais_jax.tasks.get_task('sudoku'); print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr
