"""Runs side by side: which are one line, what the lines show, and the page."""

import json
import re

import numpy as np
import pytest

from ais_jax import settings
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.report import runs as runs_lib
from ais_jax.report.figures import Curves, draw, table
from ais_jax.report.page import markdown_to_html
from ais_jax.report.runs import report


def rows(seed, steps=40, **more):
    rng = np.random.default_rng(seed)
    return [
        {"step": i + 1, "reward": float(rng.random()), "severity": float(rng.random()), **more}
        for i in range(steps)
    ]


def write_run(folder, seed, recipe="fp8", **kwargs):
    folder.mkdir(parents=True)
    changes = {"train.seed": seed, "rollout.recipe": recipe, "output_dir": str(folder)}
    settings.save_yaml(settings.replace(Config(), changes), folder / "config.yaml")
    lines = [json.dumps(row) for row in rows(seed, **kwargs)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def line(figure, key):
    """(x, y) of the line with a gid."""
    (found,) = (x for ax in figure.axes for x in ax.lines if x.get_gid() == key)
    return found.get_xdata(), found.get_ydata()


def test_a_line_is_the_mean_of_its_runs_each_averaged_over_steps():
    runs = [rows(0), rows(1)]
    (_, figure) = draw([Curves("a", "fp8", runs)])["learning"]
    x, y = line(figure, "reward:a")
    values = np.array([[row["reward"] for row in run] for run in runs]).mean(axis=0)
    window = 3  # 2 * (40 // 40) + 1
    wanted = [values[max(i - 1, 0) : i + 2].mean() for i in range(40)]
    assert window == 3 and list(x) == list(range(1, 41))
    np.testing.assert_allclose(y, wanted)


def test_runs_of_different_length_are_averaged_where_they_are():
    steps, values = table(Curves("a", "fp8", [rows(0, 3), rows(1, 2)]), "reward")
    assert list(steps) == [1, 2, 3]
    assert np.isnan(values[1, 2]) and np.isfinite(values[0]).all()


def test_evaluations_are_points_at_their_steps():
    run = rows(0, 6)
    for i in (2, 5):
        run[i]["eval_accuracy"] = i / 10
        run[i]["eval_pass_at_4"] = i / 5
    figures = draw([Curves("a", "fp8", [run])])
    x, y = line(figures["learning"][1], "eval_accuracy:a")
    assert list(x) == [3, 6] and list(y) == [0.2, 0.5]
    x, y = line(figures["exploration"][1], "eval_pass_at:a")
    assert list(x) == [3, 6] and list(y) == [0.4, 1.0]


def test_arms_stand_in_the_column_of_their_recipe_with_the_baseline_in_each():
    arms = [Curves(n, r, [rows(0)]) for n, r in (("b", "none"), ("f", "fp8"), ("i", "int4"))]
    _, figure = draw(arms, baseline="b")["mismatch"]
    names = [[x.get_gid() for x in ax.lines] for ax in figure.axes]
    assert names == [["severity:b", "severity:f"], ["severity:b", "severity:i"]]
    assert figure.axes[0].get_yscale() == "log"


def test_a_figure_without_data_is_left_out():
    assert "correction" in draw([Curves("a", "fp8", [rows(0)])])
    assert not draw([Curves("a", "fp8", [[{"step": 1}]])])


def test_runs_that_differ_in_their_seed_are_one_line(tmp_path):
    for arm, recipe in (("x", "fp8"), ("y", "int4")):
        for seed in (0, 1):
            write_run(tmp_path / "runs" / arm / f"seed_{seed}", seed, recipe)
    page = report([tmp_path])
    assert page == tmp_path / "report" / "report.html"
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == len(list(page.parent.glob("*.png"))) == 3
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_runs_of_one_name_are_told_apart_by_the_folders_above_them(tmp_path, monkeypatch):
    for arm, recipe in (("plain", "none"), ("coarse", "int4")):
        write_run(tmp_path / "runs" / arm / "seed_0", 0, recipe)
    shown = []
    monkeypatch.setattr(runs_lib, "draw", lambda curves: shown.extend(curves) or {})
    runs_lib.report([tmp_path / "runs" / arm / "seed_0" for arm in ("plain", "coarse")], tmp_path)
    assert [curve.name for curve in shown] == ["plain/seed_0", "coarse/seed_0"]


def test_runs_that_are_named_have_their_own_picture_too(tmp_path):
    a, b = write_run(tmp_path / "a", 0), write_run(tmp_path / "b", 0, "int4")
    page = report([a, b], tmp_path / "out")
    assert page == tmp_path / "out" / "report.html"
    assert (a / "curves.png").exists() and (b / "curves.png").exists()
    assert "<title>a, b</title>" in page.read_text(encoding="utf-8")


def test_what_is_no_run_is_said(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        report([tmp_path])
    folder = write_run(tmp_path / "empty", 0)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no steps yet"):
        report([tmp_path])


def test_what_a_table_holds_is_text_in_the_page():
    html = markdown_to_html("a <b>\n\n| x | y |\n|---|---|\n|  | <script> |")
    assert html == (
        "<p>a &lt;b&gt;</p>\n<table><tr><th>x</th><th>y</th></tr>"
        "<tr><td></td><td>&lt;script&gt;</td></tr></table>"
    )
