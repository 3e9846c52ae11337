"""What a study says: differences with intervals, and what each arm's gradient is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ais_jax.report.figures import frame_column, grid, head, looks
from ais_jax.report.style import BLUE, INK, dress

_PANELS = (
    ("efficiency", "Efficiency: unquantized batches that one is worth", True),
    ("mse", "Mean squared error of one batch's gradient", True),
    ("bias2", "Squared bias", True),
    ("variance", "Variance of one batch's gradient", True),
    ("cosine", "Cosine of the mean gradient with the unquantized one", False),
    ("coefficient", "Coefficient α; dotted: the best constant one", False),
)


def differences(found: Mapping[str, tuple[float, float]], baseline: str, what: str) -> Figure:
    """Each arm's paired difference from the baseline.

    Args:
      found: arm -> (difference, half-width of the 95 % interval), as shares; NaN is unknown.
      baseline: what zero stands for.
      what: differs.
    """
    height = 1.1 + 0.27 * len(found)
    result = Figure(figsize=(7.2, height), facecolor="white")
    FigureCanvasAgg(result)
    ax = result.subplots()
    dress(ax)
    places = np.arange(len(found))[::-1]
    for place, (value, half) in zip(places, found.values(), strict=True):
        half = 0.0 if math.isnan(half) else half
        ax.errorbar(100 * value, place, xerr=100 * half, fmt="o", ms=4.5, lw=1.6, color=BLUE)
    ax.axvline(0, color=INK, lw=1)
    ax.set_yticks(places, list(found), fontsize=9, color=INK)
    ax.set_ylim(-0.6, len(found) - 0.4)
    ax.set_xlabel(f"{what} minus {baseline}, points, with 95 % intervals", fontsize=9, color=INK)
    result.subplots_adjust(left=0.3, right=0.98, top=1 - 0.15 / height, bottom=0.6 / height)
    return result


def over_time(
    found: Mapping[str, Mapping[int, Sequence[float]]],
    recipes: Mapping[str, str],
    baseline: str,
    what: str,
) -> Figure:
    """Each arm's paired difference from the baseline against the step, a column a recipe.

    Args:
      found: arm -> step -> (difference, half-width of the 95 % interval, ...), as shares.
      recipes: arm -> quantization of its rollouts.
      baseline: what zero stands for.
      what: is measured.
    """
    columns = list(dict.fromkeys(recipes.values()))
    members = {r: [a for a in found if recipes[a] == r and found[a]] for r in columns}
    axes, result = grid(1, len(columns), max(map(len, members.values())))
    for ax, recipe in zip(axes[0], columns, strict=True):
        for name, look in zip(members[recipe], looks(members[recipe], None), strict=True):
            steps = list(found[name])
            values = 100 * np.array([found[name][step][:2] for step in steps], float)
            ax.plot(steps, values[:, 0], marker="o", ms=3, lw=1.6, label=name, **look)
            low, high = values[:, 0] - values[:, 1], values[:, 0] + values[:, 1]
            ax.fill_between(steps, low, high, color=look["color"], alpha=0.1, lw=0)
        ax.axhline(0, color=INK, lw=1)
        head(ax, f"{what} minus {baseline}, points, with 95 % intervals")
        frame_column([ax], recipe, "training step")
    return result


def gradients(states: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Figure | None:
    """Gradient quality against the step, a column a recipe, with 95 % bootstrap intervals.

    Args:
      states: of one run, from step_N.json.
      names: the arms to draw.
    """
    states = sorted(states, key=lambda state: state["step"])
    arms = states[0]["arms"]
    by_recipe: dict[str, list[str]] = {}
    for name in names:
        if name in arms and arms[name]["recipe"] != "none":
            by_recipe.setdefault(arms[name]["recipe"], []).append(name)
    if not by_recipe:
        return None
    axes, result = grid(len(_PANELS), len(by_recipe), max(map(len, by_recipe.values())))
    steps = [state["step"] for state in states]
    for j, (recipe, members) in enumerate(by_recipe.items()):
        for i, (key, title, log) in enumerate(_PANELS):
            ax = axes[i, j]
            for name, look in zip(members, looks(members, None), strict=True):
                values = np.array([_interval(s["arms"][name][key]) for s in states])
                if not np.isfinite(values[:, 0]).any():
                    continue
                ax.plot(steps, values[:, 0], marker="o", ms=3.5, lw=1.6, label=name, **look)
                ax.fill_between(
                    steps, values[:, 1], values[:, 2], color=look["color"], alpha=0.15, lw=0
                )
                if key == "coefficient":
                    best = [_best(state, name) for state in states]
                    ax.plot(steps, best, ls=(0, (1, 1.2)), lw=1.2, color=look["color"])
            head(ax, title)
            if log:
                ax.set_yscale("log")
        frame_column(list(axes[:, j]), recipe, "training step of the state")
    return result


def _interval(x: Any) -> list[float]:
    values = x if isinstance(x, list) else [x, x, x]
    return [math.nan if v is None else v for v in values]


def _best(state: Mapping[str, Any], name: str) -> float:
    """The best constant coefficient for the weights that an arm uses."""
    found = (w["best_coefficient"][0] for w in state["weightings"] if name in w["arms"])
    value = next(found, None)
    return math.nan if value is None else value
