"""Several runs side by side: a line an arm, the mean over its runs, with their standard error."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ais_jax.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    SKY,
    VERMILLION,
    averaging_window,
    column,
    dress,
    moving,
)

_COLORS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (4, 1.5, 1, 1.5)))
_WIDTH, _PANEL, _LEGEND_ROW = 5.2, 2.3, 0.2  # inches


@dataclasses.dataclass(frozen=True)
class Curves:
    """Runs that differ in their seed alone.

    Attributes:
      name: of the arm, or of the run.
      recipe: quantization of their rollouts; arms with the same one stand together.
      runs: rows of each, from `read_metrics`.
    """

    name: str
    recipe: str
    runs: Sequence[Sequence[Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True)
class _Panel:
    key: str
    title: str
    log: bool = False
    points: bool = False  # measured now and then: not averaged over steps


# File name: what it shows, and its panels.
_FIGURES: dict[str, tuple[str, tuple[_Panel, ...]]] = {
    "learning": (
        "Reward and held-out accuracy",
        (
            _Panel("reward", "Reward of the sampling copy"),
            _Panel("eval_accuracy", "Held-out accuracy, greedy", points=True),
            _Panel("eval_sampled_accuracy", "Held-out accuracy, sampled", points=True),
            _Panel("eval_sampled_cell_accuracy", "Held-out cell accuracy, sampled", points=True),
        ),
    ),
    "correction": (
        "Coefficient and the three diagnostics",
        (
            _Panel("coefficient", "Coefficient α"),
            _Panel("reliability", "Reliability R"),
            _Panel("severity", "Severity D, nats; with sequence weights of rows", log=True),
            _Panel("amplification", "Amplification V"),
        ),
    ),
    "mismatch": (
        "Effective sample size and severity over training",
        (
            _Panel("reliability_raw", "ESS ratio, raw ratios"),
            _Panel("reliability_applied", "ESS ratio, weights as applied"),
            _Panel("severity", "Severity D, nats; with sequence weights of rows", log=True),
        ),
    ),
    "exploration": (
        "Exploration",
        (
            _Panel("entropy", "Entropy of the policy, nats a token"),
            _Panel("group_accuracy", "Groups with a solution: pass@group of the sampling copy"),
            _Panel("eval_pass_at", "Held-out pass@k of the policy", points=True),
        ),
    ),
}


def draw(curves: Sequence[Curves], baseline: str | None = None) -> dict[str, tuple[str, Figure]]:
    """Figures by file name, with a title each; a column a recipe. Those without data are left out.

    Args:
      curves: arms or runs.
      baseline: name of the arm that is drawn in every column, in black.
    """
    found = {}
    for name, (title, panels) in _FIGURES.items():
        figure = _figure(curves, panels, baseline)
        if figure is not None:
            found[name] = (title, figure)
    return found


def _figure(
    curves: Sequence[Curves], panels: Sequence[_Panel], baseline: str | None
) -> Figure | None:
    shown = [panel for panel in panels if any(_has(c, panel) for c in curves)]
    if not shown:
        return None
    columns = _columns(curves, baseline)
    axes, result = grid(len(shown), len(columns), max(len(members) for _, members in columns))
    for j, (recipe, members) in enumerate(columns):
        styles = looks([member.name for member in members], baseline)
        for i, panel in enumerate(shown):
            ax = axes[i, j]
            for member, look in zip(members, styles, strict=True):
                _line(ax, member, panel, look)
            head(ax, panel.title)
            if panel.log and ax.lines:
                ax.set_yscale("log")
        frame_column(list(axes[:, j]), recipe, "training step")
    return result


def _columns(curves: Sequence[Curves], baseline: str | None) -> list[tuple[str, list[Curves]]]:
    """(recipe, arms) of each column; the baseline first in all, and not alone in one."""
    base = [c for c in curves if c.name == baseline]
    recipes = dict.fromkeys(c.recipe for c in curves if c.name != baseline)
    if not recipes:
        return [(base[0].recipe, base)] if base else []
    return [
        (r, base + [c for c in curves if c.recipe == r and c.name != baseline]) for r in recipes
    ]


def grid(rows: int, columns: int, names: int) -> tuple[np.ndarray, Figure]:
    """Axes [rows, columns] over legends of `names` entries."""
    below = 0.55 + _LEGEND_ROW * -(-names // 2)
    height = 0.75 + _PANEL * rows + below
    result = Figure(figsize=(_WIDTH * columns + 0.3, height), facecolor="white")
    FigureCanvasAgg(result)
    axes = result.subplots(rows, columns, sharey="row", squeeze=False)
    result.subplots_adjust(
        left=0.6 / result.get_figwidth(),
        right=1 - 0.15 / result.get_figwidth(),
        top=1 - 0.72 / height,
        bottom=below / height,
        hspace=0.38,
        wspace=0.12,
    )
    for ax in axes.flat:
        dress(ax)
        ax.tick_params(labelleft=True)
    return axes, result


def head(ax: Axes, title: str) -> None:
    """A panel's title."""
    ax.set_title(title, loc="left", fontsize=9.5, weight="bold", color=INK)


def frame_column(axes: Sequence[Axes], recipe: str, across: str) -> None:
    """The recipe above a column of axes; what is across and the names of the lines below it."""
    top, bottom = axes[0], axes[-1]
    top.annotate(_rollouts(recipe), (0, 1.22), xycoords="axes fraction", fontsize=11, color=GREY)
    bottom.set_xlabel(across, color=INK, fontsize=9)
    if bottom.lines:
        bottom.legend(
            loc="upper left",
            bbox_to_anchor=(-0.02, -0.2),
            ncols=2,
            frameon=False,
            fontsize=8,
            labelspacing=0.3,
            handlelength=2.6,
        )


def _rollouts(recipe: str) -> str:
    return "rollouts unquantized" if recipe == "none" else f"rollouts in {recipe}"


def looks(names: Sequence[str], baseline: str | None) -> list[dict[str, Any]]:
    """Colour and dashes of each line."""
    found: list[dict[str, Any]] = []
    for name in names:
        i = sum(look["color"] != INK for look in found)
        if name == baseline:
            found.append({"color": INK, "ls": "-"})
        else:
            color = _COLORS[i % len(_COLORS)]
            found.append({"color": color, "ls": _DASHES[i // len(_COLORS) % len(_DASHES)]})
    return found


def _has(curves: Curves, panel: _Panel) -> bool:
    return any(np.isfinite(evaluation(rows, panel.key)).any() for rows in curves.runs)


def evaluation(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """[rows] a metric, NaN where there is none; "eval_pass_at" stands for that of any k."""
    if key == "eval_pass_at":
        names = {name for row in rows for name in row if name.startswith("eval_pass_at_")}
        key = min(names, default=key)
    return column(rows, key)


def table(curves: Curves, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps [S], values [runs, S]) of a metric; NaN where a run has none."""
    steps = np.array(sorted({row["step"] for rows in curves.runs for row in rows}), int)
    values = np.full((len(curves.runs), len(steps)), np.nan)
    for i, rows in enumerate(curves.runs):
        at = np.searchsorted(steps, [row["step"] for row in rows])
        values[i, at] = evaluation(rows, key)
    return steps, values


def _line(ax: Axes, curves: Curves, panel: _Panel, look: Mapping[str, Any]) -> None:
    steps, values = table(curves, panel.key)
    known = np.isfinite(values).any(axis=0)
    if not known.any():
        return
    steps, values = steps[known], values[:, known]
    if not panel.points:
        window = averaging_window(len(steps))
        values = np.stack([moving(np.mean, row, window) for row in values])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a lone run has no spread
        mean = np.nanmean(values, axis=0)
        count = np.isfinite(values).sum(axis=0)
        error = np.nanstd(values, axis=0, ddof=1) / np.sqrt(count)
    marker: dict[str, Any] = {"marker": "o", "ms": 3} if panel.points else {}
    label = curves.name if len(curves.runs) == 1 else f"{curves.name} ({len(curves.runs)})"
    ax.plot(steps, mean, lw=1.6, label=label, gid=f"{panel.key}:{curves.name}", **look, **marker)
    if np.isfinite(error).any():
        low, high = mean - error, mean + error
        if panel.log:
            low = np.maximum(low, mean / 10)
        ax.fill_between(steps, low, high, color=look["color"], alpha=0.15, lw=0)
