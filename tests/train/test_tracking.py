"""Weights & Biases beside the files, with a stand-in that keeps what it is given."""

import math
import sys
import types

import pytest

from ais_jax import settings
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.train import tracking
from ais_jax.train.metrics import read_metrics

CONFIG = settings.replace(Config(), {"train.wandb": "lab", "train.steps": 7})


class Wandb(types.ModuleType):
    """As much of the package as is used."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.rows, self.axes, self.finished, self.problem = [], [], [], 0, None

    def init(self, **arguments):
        if self.problem:
            raise self.Error(self.problem)
        self.begun.append(arguments)
        return self

    def define_metric(self, name, step_metric):
        self.axes.append((name, step_metric))

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_metrics_go_to_both_and_a_resumed_run_stays_the_same_one(wandb, tmp_path):
    for start in (0, 1):
        with tracking.open_writer(CONFIG, tmp_path, start) as writer:
            writer.write(start + 1, {"loss": 0.5, "severity": math.nan, "reward": 1 + start})
            writer.write_samples(start + 1, [{"completion": "3"}])
    assert [row["reward"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert wandb.rows == [
        {"step": 1, "train/loss": 0.5, "reward": 1.0},
        {"step": 2, "train/loss": 0.5, "reward": 2.0},
    ]
    first, second = wandb.begun
    assert first == second
    assert first["project"] == "lab" and first["name"] == tmp_path.name and first["id"]
    assert first["config"]["train"]["steps"] == 7 and first["resume"] == "allow"
    assert wandb.axes[0] == ("*", "step") and wandb.finished == 2


def test_what_wandb_refuses_is_one_line(wandb, tmp_path):
    wandb.problem = "No API key configured.\nUse `wandb login`"
    with (
        pytest.raises(UserError, match=r"train.wandb=lab: No API key configured\. Use .*offline"),
        tracking.open_writer(CONFIG, tmp_path, 0),
    ):
        pass


@pytest.mark.parametrize("module", [None, types.ModuleType("wandb")], ids=["absent", "a folder"])
def test_wandb_that_is_not_there_is_one_line_before_anything_runs(monkeypatch, module):
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(UserError, match=r"train\.wandb=lab needs .* 'ais-jax\[wandb\]'"):
        tracking.check(CONFIG)
    tracking.check(Config())


def test_other_processes_write_nothing(wandb, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.process_index", lambda: 1)
    with tracking.open_writer(CONFIG, tmp_path, 0) as writer:
        writer.write(1, {"loss": 0.5})
        writer.write_samples(1, [{"completion": "3"}])
    assert not list(tmp_path.iterdir()) and not wandb.begun
