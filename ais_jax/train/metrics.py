"""What a run writes down: metrics.jsonl, samples.jsonl, TensorBoard events, summary.json.

All files are strict JSON in UTF-8: NaN and infinities are written as null. A run may be killed at
any moment, so every step is on disk when `write` returns, and whole files are replaced at once.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from ais_jax.errors import UserError

PathLike = str | os.PathLike[str]

_AIS = frozenset(
    (
        *("coefficient", "reliability", "reliability_raw", "reliability_applied"),
        *("severity", "severity_scale", "amplification", "cv"),
        *("ratio_mean", "ratio_sem", "ratio_max", "ratio_p99"),
        *("capped_fraction", "rejected_fraction", "kl_k1", "kl_k3", "mult_error", "skew"),
    )
)
# More than many steps have: should its thread die, a write must not find the queue full.
_EVENTS = 10_000
_ROLLOUT = frozenset(
    (
        "completion_length",
        "truncated_fraction",
        "zero_variance_fraction",
        "tokens",
        "sequences",
        "forwards",
        "reward_failures",
    )
)
_TRAIN = frozenset(
    ("loss", "grad_norm", "clip_fraction", "entropy", "learning_rate", "codes_changed")
)


def tensorboard_tag(name: str) -> str:
    """Tag of a metric in TensorBoard: `ais/severity`, `time/train_seconds`, plain `reward`."""
    if name.endswith(("_seconds", "_per_second", "mfu")):
        return f"time/{name}"
    if name.endswith("_gib"):
        return f"memory/{name}"
    if name.startswith("eval_"):
        return f"eval/{name}"
    for group, names in (("ais", _AIS), ("rollout", _ROLLOUT), ("train", _TRAIN)):
        if name in names:
            return f"{group}/{name}"
    return name


class Log(Protocol):
    """A further place that metrics go to."""

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """The metrics of a step; None stands for what is not finite."""

    def close(self) -> None:
        """Writes out what is still buffered."""


class MetricsWriter:
    """Appends the metrics and samples of a run to the files in its output directory.

    Only one process of a run may hold a writer. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        output_dir: PathLike,
        truncate_after: int | None = None,
        lengths: Mapping[str, int] | None = None,
        warn: Callable[[str], None] = lambda text: None,
        also: Sequence[Log] = (),
    ):
        """Prepares metrics.jsonl, samples.jsonl and tensorboard/ for appending.

        A last line cut short by a crash is dropped.

        Args:
          output_dir: created where missing.
          truncate_after: step that the run resumes from: what was written for later steps is
            dropped from both files and hidden in TensorBoard. None keeps everything.
          lengths: `lengths()` at that step; the files are cut there, without reading them.
          warn: is told when the disk is full. Lines then wait for the next that can be written.
          also: further places that `write` writes to.

        Raises:
          UserError: an existing file has a line that is not a JSON object with a step.
        """
        directory = pathlib.Path(output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        self._warn = warn
        self._waiting: dict[pathlib.Path, bytes] = {}
        self._metrics, self._samples = directory / "metrics.jsonl", directory / "samples.jsonl"
        for path in (self._metrics, self._samples):
            if not _cut(path, (lengths or {}).get(path.name)):
                _truncate(path, truncate_after)
        self._tensorboard = _summary_writer(directory / "tensorboard", truncate_after)
        self._also = tuple(also)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def close(self) -> None:
        """Writes out what waits and what is still buffered; may be called again."""
        for path in list(self._waiting):
            self._append(path, [])
        try:
            self._tensorboard.close()
        except OSError as error:
            self._warn(f"the last TensorBoard events are not written: {error}")
        for log in self._also:
            log.close()
        self._also = ()

    def lengths(self) -> dict[str, int]:
        """Bytes of metrics.jsonl and samples.jsonl, by name, to cut them at after a restart."""
        paths = (self._metrics, self._samples)
        return {path.name: path.stat().st_size if path.exists() else 0 for path in paths}

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to metrics.jsonl and the same values to TensorBoard.

        Args:
          step: training step.
          metrics: scalars by name, of Python, NumPy or JAX; a key "step" is ignored. NaN and
            infinities become null, and leave a gap in TensorBoard.

        Raises:
          TypeError: a value is not a scalar number.
        """
        values = {name: _number(name, x) for name, x in metrics.items() if name != "step"}
        self._append(self._metrics, [_with_step(step, values)])
        for name, value in values.items():
            if value is not None and _is_writing(self._tensorboard):
                self._tensorboard.add_scalar(tensorboard_tag(name), value, int(step))
        for log in self._also:
            log.write(int(step), values)

    def write_samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends one line per row to samples.jsonl, each with its step in front.

        Args:
          step: training step.
          rows: text, numbers, booleans, arrays and nested lists or mappings of them, by name.
        """
        self._append(self._samples, [_with_step(step, row) for row in rows])

    def _append(self, path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
        """Appends whole lines or, where the disk is full, none."""
        before = self._waiting.pop(path, b"")
        data = before + b"".join(_encode(row) + b"\n" for row in rows)
        try:
            with open(path, "ab", buffering=0) as file:
                length, rest = file.tell(), memoryview(data)
                try:
                    while rest:
                        rest = rest[file.write(rest) :]
                except OSError:
                    file.truncate(length)
                    raise
        except OSError as error:
            self._waiting[path] = data
            if not before:
                self._warn(f"{path} cannot be written: {error.strerror}; its lines wait for room")


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or samples.jsonl, in the order of the file.

    A last line without its newline that does not parse was cut short by a crash and is left out.

    Raises:
      UserError: there is no such file, or another line is not a JSON object with a whole-number
        "step"; the message names file and line.
    """
    return [row for _, row in _read_lines(pathlib.Path(path))]


def read_json(path: PathLike) -> dict[str, Any]:
    """The object that a JSON file of a run holds.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(pathlib.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); remove it, and it is made anew"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; remove it, and it is made anew")
    return value


def write_json(path: PathLike, value: Any) -> None:
    """Writes a JSON file in one go: a reader sees the old file or the new one, never a part.

    Args:
      value: text, numbers, booleans, None, arrays and nested lists or mappings of them; NaN and
        infinities become null.

    Raises:
      TypeError: a value has another type.
    """
    _replace(pathlib.Path(path), _encode(value, indent=2) + b"\n")


def _summary_writer(directory: pathlib.Path, truncate_after: int | None):
    from tensorboardX import SummaryWriter

    return SummaryWriter(
        str(directory),
        purge_step=None if truncate_after is None else truncate_after + 1,
        flush_secs=10,
        max_queue=_EVENTS,
        # Event files are named by the second and opened with "w": a run restarted within the same
        # second would erase its own past.
        filename_suffix=f".{time.time_ns()}",
    )


def _is_writing(tensorboard) -> bool:
    """Its thread ends at the first error; the queue in front of it would then fill up and block."""
    return tensorboard.file_writer.event_writer._worker.is_alive()


def _number(name: str, value) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise TypeError(f"metric {name!r} is {value!r}; expected a scalar number") from error
    return number if math.isfinite(number) else None


def _plain(value):
    """`value` in the types of strict JSON."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if hasattr(value, "tolist"):  # arrays and scalars of NumPy and JAX
        return _plain(value.tolist())
    raise TypeError(f"{value!r} of type {type(value).__name__} cannot be written as JSON")


def _encode(value, indent: int | None = None) -> bytes:
    text = json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)
    # Lone surrogates, which UTF-8 cannot hold, become the \udXXX escape that JSON has for them.
    return text.encode("utf-8", "backslashreplace")


def _with_step(step: int, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": int(step), **{name: x for name, x in values.items() if name != "step"}}


def _replace(path: pathlib.Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cut(path: pathlib.Path, length: int | None) -> bool:
    """Cuts a file to `length` bytes, where it is as long and a line ends there; says if it did."""
    if length is None or not path.exists() or path.stat().st_size < length:
        return False
    with open(path, "rb+") as file:
        file.seek(max(length - 1, 0))
        if length and file.read(1) != b"\n":
            return False
        file.truncate(length)
    return True


def _truncate(path: pathlib.Path, last_step: int | None) -> None:
    if not path.exists():
        return
    kept = b"".join(
        line + b"\n"
        for line, row in _read_lines(path)
        if last_step is None or row["step"] <= last_step
    )
    if kept != path.read_bytes():
        _replace(path, kept)


def _read_lines(path: pathlib.Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        # Split at newlines alone: str.splitlines would also break at U+2028 inside a sample.
        *lines, tail = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist: a training run writes it") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        row = _parse(line)
        if row is None:
            raise UserError(
                f"{path}, line {number} is not a JSON object with a whole-number step: "
                "remove that line"
            )
        rows.append((line, row))
    row = _parse(tail)
    return rows if row is None else [*rows, (tail, row)]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None
