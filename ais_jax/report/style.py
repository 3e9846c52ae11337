"""What all pictures have in common: colours, axes, averages over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, ScalarFormatter

# Colours of Okabe and Ito, which stay apart for colour-blind readers.
BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#A8588F"
SKY = "#56B4E9"
INK, GREY, GRID = "#222222", "#767676", "#E6E6E6"
DPI = 150


def column(rows: Sequence[Mapping[str, Any]], key: str) -> np.ndarray:
    """[steps] float64, NaN where the metric is missing, null or not finite."""
    values = [row.get(key) for row in rows]
    column = np.array([x if isinstance(x, int | float) else np.nan for x in values], float)
    return np.where(np.isfinite(column), column, np.nan)


def averaging_window(count: int) -> int:
    """Odd number of steps to average over: about a twentieth of the run; 1 leaves it as it is."""
    return 2 * (count // 40) + 1


def moving(
    average: Callable[[np.ndarray], np.floating], values: np.ndarray, window: int
) -> np.ndarray:
    """Average of the finite values in a centred window; NaN stays NaN. [steps] -> [steps]."""
    half = window // 2
    result = np.full(len(values), np.nan)
    for i in np.flatnonzero(np.isfinite(values)):
        near = values[max(i - half, 0) : i + half + 1]
        result[i] = average(near[np.isfinite(near)])
    return result


def dress(ax: Axes) -> None:
    """White ground, light grid, no box."""
    ax.set_facecolor("white")
    ax.grid(color=GRID, lw=0.8)
    ax.set_axisbelow(True)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    ax.spines["bottom"].set_color("#BBBBBB")
    ax.tick_params(colors=GREY, labelsize=8.5, length=0)
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(plain_numbers())


def plain_numbers() -> ScalarFormatter:
    """0.9992 and 0.00004 as they are: no offset such as +9.99e-1, no power of ten."""
    formatter = ScalarFormatter(useOffset=False, useMathText=False)
    formatter.set_scientific(False)
    return formatter
