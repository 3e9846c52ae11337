import json
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

from ais_jax.errors import UserError
from ais_jax.report import curves, figure

TITLES = ["Reward", "Coefficient α", "Reliability R", "Severity D", "Amplification V"]
KEYS = ("reward", "coefficient", "reliability", "reliability_raw", "severity", "amplification")


def plausible(count, seed=0):
    """Metrics of a run whose mismatch grows slowly."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, count + 1) / count
    cv2 = 0.004 + 0.01 * t + 0.004 * np.abs(rng.standard_normal(count))
    severity = 0.021 + 0.014 * t + 0.0025 * rng.standard_normal(count)
    columns = {
        "reward": np.clip(0.2 + 0.5 * t + 0.06 * rng.standard_normal(count), 0, 1),
        "coefficient": severity**2 / (severity**2 + 0.03**2) / (1 + cv2),
        "reliability": 1 / (1 + cv2),
        "reliability_raw": 1 / (1 + 1.5 * cv2),
        "severity": severity,
        "severity_scale": np.full(count, 0.03),
        "amplification": 1 + 0.1 * t + 0.1 * rng.standard_normal(count),
    }
    rows = [
        {"step": i + 1, **{name: float(x[i]) for name, x in columns.items()}} for i in range(count)
    ]
    for row in rows[:: max(count // 8, 1)]:
        row["eval_accuracy"] = row["reward"] - 0.05
    return rows


def write(directory, rows):
    directory.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (directory / "metrics.jsonl").write_text(lines)
    return directory


def column(rows, key):
    return np.array([np.nan if row.get(key) is None else row[key] for row in rows], float)


def lines_of(picture):
    return {line.get_gid(): line for ax in picture.axes for line in ax.lines if line.get_gid()}


def panel(picture, title):
    return next(ax for ax in picture.axes if ax.get_title("left") == title)


def tick_labels(picture, axis):
    """Labels of the ticks that are within the axis' limits."""
    picture.canvas.draw()
    low, high = sorted(axis.get_view_interval())
    pairs = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=True)
    assert axis.get_offset_text().get_text() == ""
    return {float(x): label.get_text() for x, label in pairs if low <= x <= high}


@pytest.mark.smoke
@pytest.mark.parametrize("count", [1, 2, 39, 40, 200])
def test_lines_are_the_metrics_and_lie_within_the_axes(count):
    rows = plausible(count)
    picture = figure(rows, "run")
    assert [ax.get_title("left") for ax in picture.axes] == TITLES
    lines = lines_of(picture)
    for key in (*KEYS, "severity_scale"):
        np.testing.assert_array_equal(lines[key].get_xdata(), column(rows, "step"))
        np.testing.assert_array_equal(lines[key].get_ydata(), column(rows, key))
        low, high = lines[key].axes.get_ylim()
        assert low < column(rows, key).min() and column(rows, key).max() < high
    points = [(row["step"], row["eval_accuracy"]) for row in rows if "eval_accuracy" in row]
    np.testing.assert_array_equal(lines["eval_accuracy"].get_xydata(), points)
    for ax in picture.axes:
        low, high = ax.get_xlim()
        assert low < 1 and count < high
    low, high = panel(picture, "Amplification V").get_ylim()
    assert low < 1 < high
    low, high = panel(picture, "Coefficient α").get_ylim()
    assert -0.1 < low < 0 and 1 < high < 1.1


def test_limits_are_tight():
    rows = plausible(200)
    for ax, keys in zip(
        figure(rows, "run").axes,
        [
            ["reward", "eval_accuracy"],
            None,
            ["reliability", "reliability_raw"],
            ["severity", "severity_scale"],
            ["amplification"],
        ],
        strict=True,
    ):
        if keys:
            values = np.concatenate([column(rows, key) for key in keys])
            low, high = ax.get_ylim()
            assert np.nanmax(values) - np.nanmin(values) > 0.8 * (high - low)


@pytest.mark.parametrize("count, window", [(39, 1), (40, 3), (200, 11)])
def test_thick_lines_are_centred_means_and_medians(count, window):
    rows = plausible(count)
    rows[3]["reward"] = None
    rows[5]["reliability_raw"] = 0.9
    lines = lines_of(figure(rows, "run"))
    half = window // 2
    for key, average in {"reward": np.nanmean, "reliability_raw": np.nanmedian}.items():
        values = column(rows, key)
        expected = [
            np.nan if np.isnan(x) else average(values[max(i - half, 0) : i + half + 1])
            for i, x in enumerate(values)
        ]
        name = key if window == 1 else f"{key}:{average.__name__.removeprefix('nan')}"
        np.testing.assert_allclose(lines[name].get_ydata(), expected, rtol=1e-12)


def test_styles_tell_the_lines_apart():
    lines = lines_of(figure(plausible(200), "run"))
    assert lines["reward:mean"].get_linewidth() > 2 * lines["reward"].get_linewidth()
    assert lines["reliability_raw:median"].is_dashed()
    assert lines["severity_scale"].get_linestyle() == ":"
    assert not lines["reliability:mean"].is_dashed()
    assert lines["eval_accuracy"].get_marker() == "o"


def test_nulls_are_gaps_and_lone_points_stay_visible():
    rows = plausible(12)
    for i in (2, 3, 5):
        rows[i]["severity"] = None
    del rows[8]["reward"]
    lines = lines_of(figure(rows, "run"))
    assert list(np.flatnonzero(np.isnan(lines["severity"].get_ydata()))) == [2, 3, 5]
    assert lines["severity"].get_markevery() == [4]
    assert lines["severity"].get_marker() == "o"
    assert list(np.flatnonzero(np.isnan(lines["reward"].get_ydata()))) == [8]


def test_what_is_not_finite_is_a_gap_too():
    rows = plausible(60)
    rows[9]["amplification"] = float("inf")
    rows[10]["reliability_raw"] = float("-inf")
    rows[11]["severity"] = float("nan")
    rows[12]["coefficient"] = "0.5"
    picture = figure(rows, "run")
    lines = lines_of(picture)
    for key, i in {
        "amplification": 9,
        "reliability_raw": 10,
        "severity": 11,
        "coefficient": 12,
    }.items():
        assert list(np.flatnonzero(np.isnan(lines[key].get_ydata()))) == [i]
    assert all(np.isfinite(ax.get_ylim()).all() for ax in picture.axes)
    assert "lowest" not in panel(picture, "Reliability R").get_title("right")


def test_panels_without_a_value_are_left_out():
    rows = [{"step": i, "reward": 0.1 * i, "severity": None} for i in range(1, 4)]
    assert [ax.get_title("left") for ax in figure(rows, "run").axes] == ["Reward"]
    rows[0]["reliability_raw"] = 0.5
    picture = figure(rows, "run")
    assert [ax.get_title("left") for ax in picture.axes] == ["Reward", "Reliability R"]
    low, high = panel(picture, "Reliability R").get_ylim()
    assert low < 0.5 < high


def test_ticks_near_one_and_near_zero_are_written_out():
    rows = plausible(50)
    for row in rows:
        for key in ("reliability", "reliability_raw"):
            row[key] = 1 - 1e-4 * (1 - row[key])
        row["severity"] *= 1e-3
        row["reward"] = 0.5
        row.pop("eval_accuracy", None)
    picture = figure(rows, "run")
    for ax in picture.axes:
        labels = tick_labels(picture, ax.yaxis)
        assert len(labels) >= 2
        for x, label in labels.items():
            assert float(label.replace("−", "-")) == pytest.approx(x, rel=1e-12, abs=1e-15)
            assert "e" not in label
    low, high = panel(picture, "Reliability R").get_ylim()
    assert high - low < 1.2e-5
    assert panel(picture, "Reward").get_ylim() == pytest.approx((0.444, 0.556))


def test_steps_are_whole_numbers():
    for count, first in [(1, 0), (2, 0), (3, 0), (1200, 0), (50, 20_000_000)]:
        rows = [{**row, "step": row["step"] + first} for row in plausible(count)]
        picture = figure(rows, "run")
        labels = tick_labels(picture, picture.axes[-1].xaxis)
        assert labels and all(label == f"{x:.0f}" for x, label in labels.items())


def test_a_flat_curve_at_its_bound_is_inside_the_axes():
    rows = [
        {"step": i, "reliability": 1.0, "severity": 0.0, "amplification": 1.0, "reward": 0.0}
        for i in (1, 2, 3)
    ]
    for ax in figure(rows, "run").axes:
        (line, *_) = ax.lines
        low, high = ax.get_ylim()
        assert low < line.get_ydata()[0] < high


def labels_of(ax):
    return {text.get_text(): text for text in ax.texts}


def test_a_scale_far_from_the_severity_is_named_instead_of_flattening_it():
    rows = plausible(50)
    for row in rows:
        row["severity"] = 0.001
    picture = figure(rows, "run")
    ax = panel(picture, "Severity D")
    assert ax.get_ylim()[1] < 0.002
    assert any(text.startswith("D₀ 0.03") and text.endswith("↑") for text in labels_of(ax))


def test_outliers_of_the_raw_reliability_are_named_instead_of_flattening_r():
    rows = plausible(200)
    rows[70]["reliability_raw"] = 0.123
    ax = panel(figure(rows, "run"), "Reliability R")
    low, high = ax.get_ylim()
    assert low < column(rows, "reliability").min() < column(rows, "reliability").max() < high
    assert low > 0.9
    assert ax.get_title("right").endswith("lowest 0.12")
    median = lines_of(ax.figure)["reliability_raw:median"].get_ydata()
    assert median.min() > low


def extents(picture, texts):
    renderer = picture.canvas.get_renderer()
    boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
    for box in boxes:
        assert box.x0 >= 0 and box.x1 <= picture.bbox.width
        assert box.y0 >= 0 and box.y1 <= picture.bbox.height
    return boxes


@pytest.mark.parametrize("count, seed", [(1, 0), (5, 0), (5, 1), (200, 0), (200, 1)])
def test_labels_stay_in_the_picture_and_apart(count, seed):
    rows = plausible(count, seed)
    rows[-1]["eval_accuracy"] = rows[-1]["reward"]
    rows[-1]["severity"] = 0.03
    if count == 200:
        rows[3]["reliability_raw"] = 0.1
    picture = figure(rows, "run")
    for ax in picture.axes:
        shown = tick_labels(picture, ax.yaxis).values()
        ticks = [label for label in ax.get_yticklabels() if label.get_text() in shown]
        boxes = extents(picture, [*ax.texts, ax._left_title, ax._right_title, *ticks])
        assert len(boxes) >= 5
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[i + 1 :])


@pytest.mark.parametrize("length", [1, 40, 80, 255])
def test_a_long_name_fits(length):
    name = ("Mw" * 128)[:length]
    picture = figure(plausible(200), name)
    picture.canvas.draw()
    title, note = picture.texts
    assert title.get_text() == name if length <= 80 else title.get_text()[:79] == name[:79]
    (title_box, note_box, label_box) = extents(picture, [title, note, picture.axes[-1].xaxis.label])
    assert not note_box.overlaps(label_box)
    assert title_box.y0 > extents(picture, [picture.axes[0]._left_title])[0].y1
    assert note.get_text() == "thin: every step    thick: mean of 11 steps"


def test_labels_give_the_last_values():
    rows = plausible(10)
    picture = figure(rows, "run")
    shown = {text.split()[0]: text.split()[-1] for ax in picture.axes for text in labels_of(ax)}
    last = rows[-1]
    assert float(shown["reward"]) == pytest.approx(last["reward"], abs=0.006)
    assert float(shown["α"]) == pytest.approx(last["coefficient"], abs=0.006)
    assert float(shown["R"]) == pytest.approx(last["reliability"], abs=0.0006)
    assert float(shown["raw"]) == pytest.approx(last["reliability_raw"], abs=0.0006)
    assert float(shown["D"]) == pytest.approx(last["severity"], abs=0.0006)
    assert float(shown["D₀"]) == 0.03
    assert float(shown["V"]) == pytest.approx(last["amplification"], abs=0.006)
    assert float(shown["held-out"]) == pytest.approx(rows[-1]["eval_accuracy"], abs=0.006)


def test_curves_writes_a_picture_of_the_run(tmp_path):
    # The name would be a broken formula if it were read as mathtext.
    run = write(tmp_path / "int8_$\\frac{$", plausible(30))
    before = dict(matplotlib.rcParams)
    path = curves(run)
    assert path == run / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)[..., :3]
    assert pixels.shape == (1380, 1200, 3)
    assert (pixels[:10] == 1).all() and (pixels[-10:] == 1).all()
    for color in ("#0072B2", "#D55E00", "#009E73"):
        assert (np.abs(pixels - matplotlib.colors.to_rgb(color)).max(axis=-1) < 0.01).sum() > 200
    assert dict(matplotlib.rcParams) == before
    texts = [text.get_text() for text in figure(plausible(30), "int8_$x").texts]
    assert "int8_$x" in texts


@pytest.mark.parametrize("suffix, start", [(".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_curves_writes_other_formats_elsewhere(tmp_path, suffix, start):
    output = tmp_path / "new" / f"x{suffix}"
    assert curves(write(tmp_path / "run", plausible(3)), output) == output
    assert output.read_bytes().startswith(start)


def test_ten_thousand_steps(tmp_path):
    path = curves(write(tmp_path / "run", plausible(10_000)))
    assert imread(path).shape == (1380, 1200, 4)


def test_pyplot_is_never_imported(tmp_path):
    write(tmp_path, plausible(2))
    code = (
        "import sys; from ais_jax.report import curves; curves(sys.argv[1]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


def test_what_cannot_be_drawn_is_explained(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl does not exist"):
        curves(tmp_path)
    write(tmp_path, [])
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no steps"):
        curves(tmp_path)
    write(tmp_path, [{"step": 1, "loss": 0.5, "reward": None}])
    with pytest.raises(UserError, match=r"metrics\.jsonl holds no metric that is drawn"):
        curves(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        curves(tmp_path)
    write(tmp_path, plausible(2))
    with pytest.raises(UserError, match=r"x\.bmp: curves are written as \.png, \.pdf or \.svg"):
        curves(tmp_path, tmp_path / "x.bmp")
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl"}
