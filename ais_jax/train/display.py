"""What a person sees of a run in the terminal: a progress bar and a table of results.

On a terminal the bar is live. In a pipe or a log it is a line now and then, without control codes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ais_jax import distributed

_PLAIN_SECONDS = 10
_PLAIN_SHARE = 0.1
_CONTROL_CODES = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Column(NamedTuple):
    """A metric shown beside the bar."""

    key: str  # name in the metrics of a step
    label: str
    format: Callable[[float], str]

    def text(self, metrics: Mapping[str, Any]) -> str:
        """The value as shown; "-" where it is None."""
        value = metrics[self.key]
        return "-" if value is None else self.format(float(value))


def _thousands(value: float) -> str:
    """Two digits and a unit: 853, 8.5k, 12k, 1.2M."""
    for unit, suffix in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            digits = 1 if value < 10 * unit else 0
            return f"{value / unit:.{digits}f}{suffix}"
    return f"{value:.0f}"


GRPO_COLUMNS = (
    Column("reward", "reward", "{:.3f}".format),
    Column("coefficient", "α", "{:.2f}".format),
    Column("reliability", "R", "{:.3f}".format),
    Column("severity", "D", "{:.4f}".format),
    Column("amplification", "V", "{:.2f}".format),
    Column("tokens_per_second", "tok/s", _thousands),
)
"""Coefficient α, reliability R, severity D in nats and amplification V, as in `ais_jax.ais`."""

WARMUP_COLUMNS = (
    Column("loss", "loss", "{:.4f}".format),
    Column("tokens_per_second", "tok/s", _thousands),
)


def console(stderr: bool = False) -> Console:
    """A console on stdout, or on stderr for errors, that prints text as it is: no markup.

    Whether it is a terminal is asked of the stream alone: CI services that set FORCE_COLOR would
    otherwise get a live bar in their logs. Elsewhere lines are not wrapped, so that a path stays
    in one piece. Of several processes only the first prints.
    """
    terminal = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(
        stderr=stderr,
        quiet=not distributed.first(),
        force_terminal=terminal,
        force_jupyter=False,
        soft_wrap=not terminal,
        markup=False,
        emoji=False,
        highlight=False,
    )


@dataclasses.dataclass(frozen=True)
class _State:
    """Replaced as a whole, since the refresh thread reads while the trainer updates."""

    step: int
    metrics: Mapping[str, Any]
    first_step: int | None = None  # after the first update, which is slow: it compiles
    first_time: float = 0.0
    last_time: float = 0.0

    def remaining(self, total: int, now: float) -> float | None:
        """Seconds left at the mean pace since the first update; None while that is unknown."""
        if self.step >= total:
            return 0.0
        if self.first_step is None or self.step <= self.first_step:
            return None
        pace = (self.last_time - self.first_time) / (self.step - self.first_step)
        return max(pace * (total - self.step) - (now - self.last_time), 0.0)


class Progress:
    """Progress of a run as a context manager.

    On a terminal, two live lines: step, bar, elapsed and remaining time; and the metrics of the
    last step. Elsewhere a plain line for the first step, the last step, and between them once
    both 10 % of the steps and 10 s have passed since the line before.

    Example:
      >>> with Progress(2, "train") as progress:
      ...     progress.update(2, {"reward": 0.5, "coefficient": 0.25})  # doctest: +ELLIPSIS
      train 2/2 in ...s reward 0.500 α 0.25
    """

    def __init__(
        self,
        total_steps: int,
        description: str,
        enabled: bool = True,
        *,
        columns: tuple[Column, ...] = GRPO_COLUMNS,
        output: Console | None = None,
        initial_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Prepares a bar; `with` shows it.

        Args:
          total_steps: step at which the run is done.
          description: one word in front, such as "train".
          enabled: false shows nothing at all, messages included.
          columns: metrics to show; see `GRPO_COLUMNS` and `WARMUP_COLUMNS`.
          output: where to; None takes `console()` of this module.
          initial_step: step that a resumed run starts from.
          clock: seconds from any origin.
        """
        self._total = total_steps
        self._description = description
        self._columns = tuple(Column(*column) for column in columns)
        self._console = console() if output is None else output
        self._enabled = enabled and not self._console.quiet
        self._clock = clock
        self._state = _State(initial_step, {})
        self._start = clock()
        self._line: tuple[int, float] | None = None  # step and time of the last plain line
        self._live: Live | None = None
        if self._enabled and self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=self._render,
                # A stderr that goes elsewhere, as in 2> errors.txt, is left to go there.
                redirect_stderr=sys.stderr.isatty(),
            )

    def __enter__(self) -> Progress:
        self._start = self._clock()
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *exc_info) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `step` is done, with its metrics; missing ones are left out."""
        now, old = self._clock(), self._state
        if old.first_step is None:
            self._state = _State(step, dict(metrics), step, now, now)
        else:
            self._state = dataclasses.replace(old, step=step, metrics=dict(metrics), last_time=now)
        if self._enabled and self._live is None and self._line_is_due(step, now):
            self._line = (step, now)
            self._print(self._plain_line(now))

    def message(self, text: str) -> None:
        """Prints `text` above the bar, as it is: no markup, control codes removed."""
        if self._enabled:
            self._print(text)

    def _print(self, text: str) -> None:
        self._console.print(Text(_printable(text, self._console)), soft_wrap=self._live is None)

    def _line_is_due(self, step: int, now: float) -> bool:
        if self._line is None or step >= self._total:
            return True
        last_step, last_time = self._line
        enough = step - last_step >= _PLAIN_SHARE * self._total
        return enough and now - last_time >= _PLAIN_SECONDS

    def _plain_line(self, now: float) -> str:
        state = self._state
        left = state.remaining(self._total, now)
        if state.step >= self._total:
            when = f"in {_short_time(now - self._start)}"
        else:
            when = "eta -" if left is None else f"eta {_short_time(left)}"
        metrics = [f"{column.label} {column.text(state.metrics)}" for column in self._shown(state)]
        return " ".join([f"{self._description} {state.step}/{self._total}", when, *metrics])

    def _shown(self, state: _State) -> list[Column]:
        return [column for column in self._columns if column.key in state.metrics]

    def _render(self) -> Group:
        state, now = self._state, self._clock()
        left = state.remaining(self._total, now)
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        times = f"{_clock_time(now - self._start)} elapsed, {_clock_time(left)} left"
        grid.add_row(
            Text(f"{self._description} {state.step}/{self._total}", style="bold"),
            ProgressBar(
                total=max(self._total, 1),
                completed=min(state.step, self._total),
                complete_style="cyan",
                finished_style="green",
            ),
            Text(times, style="dim"),
        )
        line = Text(no_wrap=True, overflow="ellipsis")
        for i, column in enumerate(self._shown(state)):
            label = _printable(column.label, self._console)
            line.append(f"{'  ' if i else ''}{label} ", style="dim")
            line.append(column.text(state.metrics))
        return Group(grid, line)


def warn(text: str) -> None:
    """Prints a warning, where no bar is shown."""
    console().print(f"warning: {text}")


def final_table(
    before: Mapping[str, float],
    after: Mapping[str, float],
    title: str,
    output: Console | None = None,
) -> None:
    """Prints one row per metric: before, after, change.

    Shares (`*accuracy*`, `pass*`, `*_fraction`, in [0, 1]) are shown in per cent and their change
    in percentage points; a metric that only one side has, or that is None, shows "-".

    Args:
      output: where to; None takes `console()` of this module.
    """
    output = console() if output is None else output
    table = Table(title=Text(_printable(title, output), style="bold"), title_justify="left")
    table.add_column("metric", overflow="fold")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for key in dict.fromkeys([*before, *after]):
        table.add_row(Text(_printable(key, output)), *_cells(key, before.get(key), after.get(key)))
    output.print(table)


def _cells(key: str, before: float | None, after: float | None) -> tuple[str, str, str]:
    share = "accuracy" in key or key.startswith("pass") or key.endswith("_fraction")

    def cell(value: float | None) -> str:
        if value is None:
            return "-"
        return f"{100 * float(value):.1f} %" if share else f"{float(value):.4g}"

    if before is None or after is None:
        return cell(before), cell(after), "-"
    change = float(after) - float(before)
    return cell(before), cell(after), f"{100 * change:+.1f} pp" if share else f"{change:+.4g}"


def _printable(text: str, output: Console) -> str:
    """`text` without control codes, in characters that the output's encoding has."""
    text = _CONTROL_CODES.sub("", text)
    if not output.encoding.lower().startswith("utf"):
        text = text.replace("α", "alpha")
    return text.encode(output.encoding, "replace").decode(output.encoding)


def _clock_time(seconds: float | None) -> str:
    if seconds is None:
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


def _short_time(seconds: float) -> str:
    """At most five characters: 45s, 9m30s, 12m, 1h05m, 12h, 2d03h, 12d."""
    count = round(seconds)
    for size, unit, part, part_unit in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if count >= 10 * size:
            return f"{count // size}{unit}"
        if count >= size:
            return f"{count // size}{unit}{count % size // part:02d}{part_unit}"
    return f"{count}s"
