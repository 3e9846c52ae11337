import json
import math
import os
import resource
import subprocess
import sys
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax.ais import Diagnostics
from ais_jax.errors import UserError
from ais_jax.train.metrics import MetricsWriter, read_metrics, tensorboard_tag, write_json


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def strict_lines(path):
    data = path.read_bytes()
    assert data.endswith(b"\n")
    return [strict(line.decode("utf-8")) for line in data[:-1].split(b"\n")]


def scalars(directory):
    """{tag: [(step, value), ...]} as TensorBoard itself shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def write_steps(directory, steps, offset=0.0, truncate_after=None):
    with MetricsWriter(directory, truncate_after) as writer:
        for step in steps:
            writer.write(step, {"reward": step / 8 + offset, "severity": step / 64})
            writer.write_samples(step, [{"text": f"a{step}"}, {"text": f"b{step}"}])


@pytest.mark.smoke
def test_lines_hold_the_values_of_python_numpy_and_jax_scalars(tmp_path):
    with MetricsWriter(tmp_path / "new" / "run") as writer:
        writer.write(
            3,
            {
                "reward": 0.1,
                "severity": np.float32(0.1),
                "accuracy": jnp.bfloat16(1.5),
                "loss": jnp.asarray(-0.25),
                "codes_changed": np.int64(12),
                "step": 99,
            },
        )
    (row,) = strict_lines(tmp_path / "new" / "run" / "metrics.jsonl")
    assert row == {
        "step": 3,
        "reward": 0.1,
        "severity": float(np.float32(0.1)),
        "accuracy": 1.5,
        "loss": -0.25,
        "codes_changed": 12.0,
    }
    assert next(iter(row)) == "step" and type(row["step"]) is int
    assert type(row["codes_changed"]) is float


def test_not_finite_becomes_null_and_a_gap_in_tensorboard(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward": math.nan, "loss": jnp.inf, "kl_k1": np.float32(-np.inf)})
        writer.write(2, {"reward": 1.0, "loss": math.nan, "kl_k1": 0.5})
    assert strict_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "reward": None, "loss": None, "kl_k1": None},
        {"step": 2, "reward": 1.0, "loss": None, "kl_k1": 0.5},
    ]
    assert scalars(tmp_path / "tensorboard") == {"reward": [(2, 1.0)], "ais/kl_k1": [(2, 0.5)]}


def test_a_step_is_on_disk_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"reward": 0.5})
            assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")][-1] == step


@pytest.mark.smoke
def test_tensorboard_holds_the_same_values_under_grouped_tags(tmp_path):
    names = {
        "reward": "reward",
        "eval_accuracy": "eval/eval_accuracy",
        "coefficient": "ais/coefficient",
        "reliability": "ais/reliability",
        "loss": "train/loss",
        "truncated_fraction": "rollout/truncated_fraction",
        "rollout_seconds": "time/rollout_seconds",
        "tokens_per_second": "time/tokens_per_second",
        "train_mfu": "time/train_mfu",
        "host_peak_gib": "memory/host_peak_gib",
        "own_metric": "own_metric",
    }
    values = {name: (i + 1) / 4 for i, name in enumerate(names)}
    with MetricsWriter(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {name: value * step for name, value in values.items()})
    assert scalars(tmp_path / "tensorboard") == {
        tag: [(1, values[name]), (2, 2 * values[name])] for name, tag in names.items()
    }


def test_every_diagnostic_belongs_to_a_group():
    tags = {name: tensorboard_tag(name) for name in Diagnostics._fields}
    assert tags.pop("tokens") == "rollout/tokens"
    assert tags.pop("sequences") == "rollout/sequences"
    assert tags == {name: f"ais/{name}" for name in tags}


@pytest.mark.parametrize("value", [np.ones(2), "many", None])
def test_a_metric_that_is_no_number_is_named(tmp_path, value):
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(TypeError, match=r"'skew' is .*expected a scalar number"):
            writer.write(1, {"reward": 1.0, "skew": value})
        writer.write(1, {"reward": 2.0})
    assert strict_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "reward": 2.0}]


def test_resuming_replaces_the_steps_after_the_checkpoint(tmp_path):
    write_steps(tmp_path, range(1, 6))
    write_steps(tmp_path, range(4, 7), offset=100, truncate_after=3)
    expected = [(s, s / 8 + (100 if s > 3 else 0)) for s in range(1, 7)]
    rows = strict_lines(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["reward"]) for row in rows] == expected
    assert scalars(tmp_path / "tensorboard")["reward"] == expected
    samples = strict_lines(tmp_path / "samples.jsonl")
    assert samples == [{"step": s, "text": f"{x}{s}"} for s in range(1, 7) for x in "ab"]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "samples.jsonl", "tensorboard"}


def test_without_truncation_everything_is_kept(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [3])
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert scalars(tmp_path / "tensorboard")["reward"] == [(1, 0.125), (2, 0.25), (3, 0.375)]


@pytest.mark.parametrize("truncate_after", [None, 2])
@pytest.mark.parametrize(
    "tail", [b'{"step": 3, "rew', b"{", b'{"step": 3, "text": "\xe2\x82', b"\x00\x00"]
)
def test_a_torn_last_line_is_left_out_and_repaired(tmp_path, tail, truncate_after):
    write_steps(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    assert path.read_bytes() == whole + tail
    write_steps(tmp_path, [3], truncate_after=truncate_after)
    assert path.read_bytes().startswith(whole)
    assert [row["step"] for row in strict_lines(path)] == [1, 2, 3]


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.75}')
    assert [row["reward"] for row in read_metrics(path)] == [0.5, 0.75]
    write_steps(tmp_path, [3], truncate_after=2)
    assert [row["step"] for row in strict_lines(path)] == [1, 2, 3]


@pytest.mark.parametrize(
    "line", ["{torn", "[1, 2]", '{"reward": 1}', '{"step": true}', '{"step": 1.5}', "", "\x00"]
)
def test_a_malformed_line_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    path.write_text(text)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not a JSON object"):
        MetricsWriter(tmp_path, truncate_after=1)
    assert path.read_text() == text


def test_files_are_cut_at_the_lengths_of_a_step(tmp_path):
    write_steps(tmp_path, [1, 2])
    files = [tmp_path / "metrics.jsonl", tmp_path / "samples.jsonl"]
    before = [path.read_bytes() for path in files]
    with MetricsWriter(tmp_path) as writer:
        lengths = writer.lengths()
        writer.write(3, {"reward": 1})
        writer.write_samples(3, [{"text": "a"}])
    with open(files[0], "ab") as file:
        file.write(b'{"step": 4, "rew')  # cut short by a crash
    with MetricsWriter(tmp_path, 2, lengths):
        pass
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("length", [7, 10**9, 0])
def test_lengths_that_do_not_fit_the_file_are_not_believed(tmp_path, length):
    """In the middle of a line, or behind the end; 0 is the start of any file."""
    write_steps(tmp_path, [1, 2, 3])
    with MetricsWriter(tmp_path, 2, {"metrics.jsonl": length}):
        pass
    rows = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")]
    assert rows == ([1, 2] if length else [])
    assert {row["step"] for row in read_metrics(tmp_path / "samples.jsonl")} == {1, 2}


def test_lines_wait_while_the_disk_is_full(tmp_path):
    """The limit on file sizes stands in for the disk: a part of a line still fits."""
    path, said = tmp_path / "samples.jsonl", []
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(tmp_path, warn=said.append) as writer:
        writer.write_samples(1, [{"text": "x" * 10**6}])
        size = path.stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))
        try:
            writer.write_samples(2, [{"text": "y" * 50}])
            writer.write_samples(3, [])
            assert path.stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        writer.write_samples(4, [{"text": "z"}])
    assert [row["step"] for row in strict_lines(path)] == [1, 2, 4]
    assert len(said) == 1
    assert "samples.jsonl cannot be written: File too large" in said[0]


def test_tensorboard_that_cannot_write_does_not_block(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("No space left on device")

    died = []
    monkeypatch.setattr(threading, "excepthook", lambda args: died.append(args.exc_type))
    with MetricsWriter(tmp_path) as writer:
        events = writer._tensorboard.file_writer.event_writer
        monkeypatch.setattr(events._ev_writer, "write_event", full)
        for step in range(1000):
            writer.write(step, {f"metric_{i}": 0 for i in range(20)})
            if step == 0:
                events._worker.join()
    assert died == [OSError]
    assert len(strict_lines(tmp_path / "metrics.jsonl")) == 1000


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.jsonl does not exist"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_truncation_is_all_or_nothing(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        MetricsWriter(tmp_path, truncate_after=1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_samples_keep_any_text_and_nested_values(tmp_path):
    # U+2028 and U+0085 end lines for str.splitlines; a lone surrogate has no UTF-8.
    text = 'π "quoted"\nnext\u2028line\x85 \x1b[0m'
    row = {
        "text": text,
        "broken": "a\udc80b",
        "reward": np.float32(0.5),
        "logps": jnp.array([-1.0, -jnp.inf]),
        "solved": np.bool_(True),
        "example": {"numbers": [3, 4], "target": np.int32(7), 5: (math.nan,)},
    }
    with MetricsWriter(tmp_path) as writer:
        writer.write_samples(2, iter([row, {"text": ""}]))
    expected = {
        "step": 2,
        "text": text,
        "broken": "a\udc80b",
        "reward": 0.5,
        "logps": [-1.0, None],
        "solved": True,
        "example": {"numbers": [3, 4], "target": 7, "5": [None]},
    }
    path = tmp_path / "samples.jsonl"
    assert strict_lines(path) == read_metrics(path) == [expected, {"step": 2, "text": ""}]
    assert "π" in path.read_text(encoding="utf-8")


def test_write_json_is_strict_and_replaces_the_file_at_once(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"before": 1})
    write_json(path, {"after": np.float64(0.25), "x": [jnp.nan, np.arange(2)], "none": None})
    assert strict(path.read_text()) == {"after": 0.25, "x": [None, [0, 1]], "none": None}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]

    before = path.read_bytes()
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json(path, {"model": object()})

    def fail(*_):
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="power cut"):
        write_json(path, {"later": 2})
    assert path.read_bytes() == before


def test_tensorboard_is_imported_on_first_use():
    code = "import sys, ais_jax.train.metrics; sys.exit('tensorboardX' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
