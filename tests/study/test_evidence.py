"""What the figures of a study show: the numbers they are given, and nothing without any."""

import math

import numpy as np
import pytest

from ais_jax.report import evidence


def arm(recipe, scale, **against):
    return {
        "recipe": recipe,
        "coefficient": 0.5,
        **{x: [scale, scale / 2, 2 * scale] for x in ("bias2", "variance", "efficiency", "cosine")},
        "against": {
            other: {x: [ratio, ratio / 2, ratio * 2] for x in ("variance", "efficiency")}
            for other, ratio in against.items()
        },
    }


def state(step, scale):
    arms = {
        "exact": arm("none", 1.0),
        "plain": arm("int4", scale, exact=3 * scale, tis=9.0),
        "tis": arm("int4", 2 * scale, exact=5 * scale, plain=9.0),
    }
    return {
        "step": step,
        "arms": arms,
        "weightings": [{"arms": ["plain", "tis"], "best_coefficient": [0.9, 0.8, 1.0]}],
    }


def panels(figure):
    """Title -> arm -> (values, bars)."""
    found = {}
    for ax in figure.axes:
        found[ax.get_title(loc="left")] = of_panel = {}
        for container in ax.containers:
            line, _, (bars,) = container.lines
            ends = np.array([segment[:, 1] for segment in bars.get_segments()])
            of_panel[container.get_label()] = line.get_ydata(), ends
    return found


def test_gradients_are_drawn_beside_one_another_and_against_the_unquantized():
    figure = evidence.gradients([state(50, 2.0), state(0, 1.0)], ["exact", "plain", "tis"])
    found = panels(figure)
    values, bars = found["Squared bias, in units of |E r|²"]["tis"]
    np.testing.assert_allclose(values, [2, 4])  # by step
    np.testing.assert_allclose(bars, [[1, 4], [2, 8]])
    values, bars = found["Variance of a batch, times the unquantized"]["tis"]
    np.testing.assert_allclose(values, [5, 10])
    np.testing.assert_allclose(bars, [[2.5, 10], [5, 20]])
    assert list(found["Cosine of the mean gradient and E r"]) == ["plain", "tis"]
    (ax,) = (ax for ax in figure.axes if ax.get_title(loc="left").startswith("Coefficient"))
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "50"]
    assert any(np.allclose(line.get_ydata(), 0.9) for line in ax.lines)


def test_panels_without_a_value_are_left_out_and_so_is_a_figure_without_panels():
    states = [state(0, 1.0)]
    for name in ("plain", "tis"):
        states[0]["arms"][name]["cosine"] = [None, None, None]
    titles = panels(evidence.gradients(states, ["plain", "tis"]))
    assert "Squared bias, in units of |E r|²" in titles
    assert "Cosine of the mean gradient and E r" not in titles
    assert evidence.gradients(states, ["exact"]) is None


@pytest.mark.parametrize("half", [0.01, math.nan])
def test_differences_name_their_seeds(half):
    figure = evidence.differences({"a": (0.02, half, 5), "b": (-0.01, 0.02, 3)}, "base", "Accuracy")
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a (5)", "b (3)"]
    first = ax.containers[0].lines
    np.testing.assert_allclose(np.asarray(first[0].get_xdata(), float), 2.0)
    ends = first[2][0].get_segments()[0][:, 0]
    np.testing.assert_allclose(ends, [1.0, 3.0] if half == half else [2.0, 2.0])
    assert "minus base, points, with 95 % intervals" in ax.get_xlabel()
