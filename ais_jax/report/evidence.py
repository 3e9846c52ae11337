"""What a study says: differences with intervals, and what each arm's gradient is worth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ais_jax.report.figures import frame_column, grid, head, looks
from ais_jax.report.style import BLUE, INK, dress

# Of a gradient: key in step_N.json, title, and whether it is drawn as a multiple of unquantized
# sampling's, which shares most of the noise.
_PANELS = (
    ("bias2", "Squared bias, in units of |E r|²", False),
    ("variance", "Variance of a batch, times the unquantized", True),
    ("efficiency", "Efficiency, times the unquantized", True),
    ("cosine", "Cosine of the mean gradient and E r", False),
    ("coefficient", "Coefficient α; crosses: the best constant one", False),
)


def differences(found: Mapping[str, Sequence[float]], baseline: str, what: str) -> Figure:
    """Each arm's paired difference from the baseline.

    Args:
      found: arm -> (difference, half-width of the 95 % interval, seeds, ...), as shares; NaN is
        unknown.
      baseline: what zero stands for.
      what: differs.
    """
    height = 1.25 + 0.27 * len(found)
    result = Figure(figsize=(7.2, height), facecolor="white")
    FigureCanvasAgg(result)
    ax = result.subplots()
    dress(ax)
    places = np.arange(len(found))[::-1]
    for place, (value, half, *_) in zip(places, found.values(), strict=True):
        half = 0.0 if math.isnan(half) else half
        ax.errorbar(100 * value, place, xerr=100 * half, fmt="o", ms=4.5, lw=1.6, color=BLUE)
    ax.axvline(0, color=INK, lw=1)
    names = [f"{name} ({seeds})" for name, (_, _, seeds, *_) in found.items()]
    ax.set_yticks(places, names, fontsize=9, color=INK)
    ax.set_ylim(-0.6, len(found) - 0.4)
    across = f"{what},\nminus {baseline}, points, with 95 % intervals; seeds in brackets"
    ax.set_xlabel(across, fontsize=9, color=INK)
    result.subplots_adjust(left=0.32, right=0.98, top=1 - 0.15 / height, bottom=0.75 / height)
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
        head(ax, f"{what} minus {baseline}, points")
        frame_column([ax], recipe, "training step; bands: 95 % intervals")
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
    panels = [panel for panel in _PANELS if _is_known(states, by_recipe, panel)]
    if not panels:
        return None
    axes, result = grid(len(panels), len(by_recipe), max(map(len, by_recipe.values())))
    steps = [state["step"] for state in states]
    for j, (recipe, members) in enumerate(by_recipe.items()):
        for i, panel in enumerate(panels):
            ax = axes[i, j]
            for k, (name, look) in enumerate(zip(members, looks(members, None), strict=True)):
                _intervals(ax, states, name, panel, k / len(members) - 0.5, look)
            head(ax, panel[1])
            ax.set_xticks(range(len(steps)), [str(step) for step in steps])
            if panel[2]:
                ax.axhline(1, color=INK, lw=0.8)
        frame_column(list(axes[:, j]), recipe, "training step of the state; bars: 95 % intervals")
    return result


def _intervals(ax: Axes, states, name: str, panel, shift: float, look: Mapping[str, Any]) -> None:
    """One arm's estimates, side by side with those of the others: most of their noise is shared."""
    values = np.array([_value(state, name, panel) for state in states])
    places = np.arange(len(states)) + 0.6 * shift
    low, high = values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]
    bars = np.maximum([low, high], 0)
    marks = {"fmt": "o", "ms": 3.5, "lw": 1.4, "color": look["color"], "label": name}
    ax.errorbar(places, values[:, 0], yerr=bars, **marks)
    if panel[0] == "coefficient":
        best = [_best(state, name) for state in states]
        ax.plot(places, best, "x", ms=4.5, mew=1.2, color=look["color"])


def _is_known(states, by_recipe: Mapping[str, Sequence[str]], panel) -> bool:
    return any(
        math.isfinite(_value(state, name, panel)[0])
        for state in states
        for members in by_recipe.values()
        for name in members
    )


def _value(state: Mapping[str, Any], name: str, panel: tuple[str, str, bool]) -> list[float]:
    """(estimate, low, high), NaN where there is none."""
    key, _, relative = panel
    arm = state["arms"][name]
    against = arm.get("against", {})
    if relative:
        unquantized = [other for other, x in state["arms"].items() if x["recipe"] == "none"]
        name = next((x for x in (*unquantized, "unquantized") if x in against), "")
        found = against.get(name, {}).get(key)
    else:
        found = arm[key]
    values = found if isinstance(found, list) else [found] * 3
    return [math.nan if value is None else value for value in values]


def _best(state: Mapping[str, Any], name: str) -> float:
    """The best constant coefficient for the weights that an arm uses."""
    found = (w["best_coefficient"][0] for w in state["weightings"] if name in w["arms"])
    value = next(found, None)
    return math.nan if value is None else value
