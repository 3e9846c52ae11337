"""Pictures of a run, drawn from its metrics.jsonl."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ais_jax.errors import UserError
from ais_jax.report.style import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    INK,
    PURPLE,
    VERMILLION,
    averaging_window,
    column,
    dress,
    moving,
    plain_numbers,
)
from ais_jax.train.metrics import read_metrics

_STRAY = 5.0  # a side series further from the anchor than this many times the main one is cut off
_LABEL_GAP = 0.17  # of a panel's height, between two labels
_LONGEST_TITLE = 80


@dataclasses.dataclass(frozen=True)
class _Series:
    """A line of a panel. The line's gid in the figure is its key, with ":mean" when averaged."""

    key: str
    label: str
    color: str
    kind: str = "main"  # main | dashed | dotted | points
    note: str = ""  # replaces the panel's note where the series is drawn


@dataclasses.dataclass(frozen=True)
class _Panel:
    title: str
    note: str
    series: tuple[_Series, ...]
    span: float  # least range of the axis, so that a flat curve does not show rounding noise
    limits: tuple[float, float] | None = None
    anchor: float | None = None  # value of no mismatch, which bounds the metric
    reference: float | None = None


_PANELS = (
    _Panel(
        "Reward",
        "mean over the batch",
        (
            _Series("reward", "reward", BLUE),
            _Series(
                "eval_accuracy",
                "held-out",
                VERMILLION,
                "points",
                "line: mean over the batch, dots: held-out accuracy",
            ),
        ),
        span=0.1,
    ),
    _Panel(
        "Coefficient α",
        "0: uncorrected, 1: fully importance-weighted",
        (_Series("coefficient", "α", INK),),
        span=1.0,
        limits=(0.0, 1.0),
    ),
    _Panel(
        "Reliability R",
        "effective share of the sample",
        (
            _Series("reliability", "R", GREEN),
            _Series(
                "reliability_raw",
                "raw R",
                GREY,
                "dashed",
                "effective share of the sample, dashed: raw ratios, running median",
            ),
        ),
        span=1e-5,
        anchor=1.0,
    ),
    _Panel(
        "Severity D",
        "mean |log ρ|, nats",
        (
            _Series("severity", "D", VERMILLION),
            _Series("severity_scale", "D₀", GREY, "dotted", "mean |log ρ| in nats, dotted: D₀"),
        ),
        span=1e-4,
        anchor=0.0,
    ),
    _Panel(
        "Amplification V",
        "above 1: the weights favour large advantages",
        (_Series("amplification", "V", PURPLE),),
        span=0.02,
        reference=1.0,
    ),
)


def curves(
    run_dir: str | os.PathLike[str], output: str | os.PathLike[str] | None = None
) -> pathlib.Path:
    """Draws the curves of a run.

    Args:
      run_dir: output directory of a run, which holds metrics.jsonl.
      output: image to write, .png, .pdf or .svg; None takes curves.png in `run_dir`.

    Returns:
      Path of the image.

    Raises:
      UserError: metrics.jsonl is missing, malformed or without steps, or `output` has another
        suffix.
    """
    run_dir = pathlib.Path(run_dir)
    output = run_dir / "curves.png" if output is None else pathlib.Path(output)
    if output.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise UserError(f"{output}: curves are written as .png, .pdf or .svg")
    path = run_dir / "metrics.jsonl"
    rows = read_metrics(path)
    if not rows:
        raise UserError(f"{path} holds no steps yet: train for at least one step")
    result = figure(rows, run_dir.resolve().name)
    if not result.axes:
        raise UserError(f"{path} holds no metric that is drawn, such as reward or severity")
    output.parent.mkdir(parents=True, exist_ok=True)
    result.savefig(output, dpi=DPI)
    return output


def figure(rows: Sequence[Mapping[str, Any]], title: str) -> Figure:
    """The curves as a matplotlib figure, without pyplot and its global state.

    One panel for each of reward, coefficient, reliability, severity and amplification that has a
    value; missing values and nulls are gaps. Lines carry their metric's key as gid. The axes hold
    all values, except that the raw reliability and D0 are cut off where they would flatten the
    curve beside them.

    Args:
      rows: from `read_metrics`; each has "step".
      title: name of the run.
    """
    steps = np.array([row["step"] for row in rows], float)
    panels = [p for p in _PANELS if any(np.isfinite(column(rows, s.key)).any() for s in p.series)]
    result = Figure(figsize=(8, 0.9 + 1.66 * len(panels)), facecolor="white")
    FigureCanvasAgg(result)
    if not panels:
        return result
    window = averaging_window(len(rows))
    axes = result.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, panel in zip(axes, panels, strict=True):
        _draw(ax, panel, steps, rows, window)
    first, last = steps.min(), steps.max()
    margin = 0.015 * (last - first) or 0.5
    axes[-1].set_xlim(first - margin, last + margin)
    axes[-1].xaxis.set_major_locator(
        MaxNLocator(nbins=9, steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1)
    )
    axes[-1].xaxis.set_major_formatter(plain_numbers())
    axes[-1].set_xlabel("training step", color=INK, fontsize=9.5)
    _lay_out(result, title, window)
    return result


def _lay_out(result: Figure, title: str, window: int) -> None:
    height = result.get_figheight()
    left = 0.095
    result.subplots_adjust(
        left=left, right=0.845, top=1 - 0.78 / height, bottom=0.55 / height, hspace=0.36
    )
    title = title if len(title) <= _LONGEST_TITLE else title[: _LONGEST_TITLE - 1] + "…"
    heading = result.text(
        left, 1 - 0.2 / height, title, va="top", fontsize=13, weight="bold", color=INK,
        parse_math=False,
    )  # fmt: skip
    room = (0.99 - left) * result.bbox.width
    heading.set_fontsize(13 * min(1.0, room / max(heading.get_window_extent().width, 1.0)))
    if window > 1:
        text = f"thin: every step    thick: mean of {window} steps"
        result.text(0.99, 0.225 / height, text, va="baseline", ha="right", fontsize=8, color=GREY)


def _draw(ax: Axes, panel: _Panel, steps: np.ndarray, rows, window: int) -> None:
    dress(ax)
    note = panel.note
    main: list[np.ndarray] = []
    side: list[np.ndarray] = []
    ends: list[tuple[float, _Series]] = []
    for series in panel.series:
        raw = column(rows, series.key)
        if not np.isfinite(raw).any():
            continue
        shown = _draw_series(ax, series, steps, raw, window)
        (side if series.kind in ("dashed", "dotted") else main).append(raw)
        ends.append((float(shown[np.isfinite(shown)][-1]), series))
        note = series.note or note
    if panel.reference is not None:
        ax.axhline(panel.reference, color=GREY, lw=1.3, ls=":", zorder=1.5)
        main.append(np.array([panel.reference]))
    low, high = panel.limits or _limits(panel, main or side, side)
    margin = 0.06 * (high - low)
    ax.set_ylim(low - margin, high + margin)
    if panel.anchor == 1.0 and side and np.nanmin(side) < low:
        note += f", lowest {np.nanmin(side):.2g}"
    ax.set_title(panel.title, loc="left", fontsize=10, weight="bold", color=INK, pad=5)
    ax.set_title(note, loc="right", fontsize=8.5, color=GREY, pad=5)
    _label_ends(ax, ends)


def _draw_series(ax: Axes, series: _Series, steps, raw: np.ndarray, window: int) -> np.ndarray:
    """Draws one metric and returns the values of its most visible line."""
    if series.kind == "points":
        known = np.isfinite(raw)
        ax.plot(
            steps[known], raw[known], color=series.color, lw=1.2, marker="o", ms=4.5, mec="white",
            mew=0.8, gid=series.key, zorder=4, clip_on=False,
        )  # fmt: skip
        return raw
    if series.kind == "dotted":
        _line(ax, series, steps, raw, series.key, lw=1.3, ls=":", zorder=2)
        return raw
    if window > 1:
        _line(ax, series, steps, raw, series.key, lw=0.8, alpha=0.35, zorder=2.2)
    if series.kind == "dashed":
        # Single outliers would turn a mean into boxes as wide as the window.
        shown, name = moving(np.median, raw, window), "median"
        style: dict[str, Any] = {"lw": 1.2, "ls": (0, (4, 2)), "zorder": 2.5}
    else:
        shown, name = moving(np.mean, raw, window), "mean"
        style = {"lw": 2, "zorder": 3}
    _line(ax, series, steps, shown, f"{series.key}:{name}" if window > 1 else series.key, **style)
    return shown


def _line(ax: Axes, series: _Series, steps, values: np.ndarray, gid: str, **style) -> None:
    """A line whose lone points between gaps, which have no segment, get a marker."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    lone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:])
    ax.plot(
        steps, values, color=series.color, gid=gid, marker="o", ms=3.5, markevery=list(lone),
        solid_joinstyle="round", solid_capstyle="round", **style,
    )  # fmt: skip


def _limits(panel: _Panel, main: list[np.ndarray], side: list[np.ndarray]) -> tuple[float, float]:
    """Range of the axis: all of `main`, and `side` as far as it leaves `main` readable."""
    values = np.concatenate([x[np.isfinite(x)] for x in main])
    low, high = values.min(), values.max()
    if panel.anchor is None:
        slack = max(panel.span - (high - low), 0) / 2
        return low - slack, high + slack
    reach = _STRAY * max(np.abs(values - panel.anchor).max(), panel.span)
    for x in side:
        near = x[np.abs(x - panel.anchor) <= reach]
        low, high = np.append(near, low).min(), np.append(near, high).max()
    slack = max(panel.span - (high - low), 0)
    return (low, high + slack) if panel.anchor == 0 else (low - slack, high)


def _label_ends(ax: Axes, ends: list[tuple[float, _Series]]) -> None:
    """Names each line at its right end, in its colour, pushed apart where two would overlap."""
    low, high = ax.get_ylim()
    digits = int(np.clip(1 - np.floor(np.log10(high - low)), 2, 9))
    heights: list[float] = []
    ends = sorted(ends, key=lambda end: end[0])
    for value, _ in ends:
        height = min(max((value - low) / (high - low), 0.02), 0.98)
        heights.append(max(height, heights[-1] + _LABEL_GAP) if heights else height)
    overflow = max(heights[-1] - 0.98, 0.0) if heights else 0.0
    for height, (value, series) in zip(heights, ends, strict=True):
        off_scale = " ↑" if value > high else " ↓" if value < low else ""
        ax.text(
            1.012, height - overflow, f"{series.label} {value:.{digits}f}{off_scale}",
            transform=ax.transAxes, va="center", fontsize=9, color=series.color,
            weight="bold" if series.kind == "main" else "normal",
        )  # fmt: skip
