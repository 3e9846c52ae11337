import io
import math
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from ais_jax.train.display import (
    GRPO_COLUMNS,
    WARMUP_COLUMNS,
    Column,
    Progress,
    console,
    final_table,
)

METRICS = {
    "reward": 0.5124,
    "coefficient": 0.4249,
    "reliability": 0.9871,
    "severity": 0.03126,
    "amplification": 1.118,
    "tokens_per_second": 12345.6,
    "grad_norm": 7.0,
}
SHOWN = "reward 0.512 α 0.42 R 0.987 D 0.0313 V 1.12 tok/s 12k"
ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def pipe():
    return Console(file=io.StringIO(), force_terminal=False, width=80)


def terminal(width=80):
    return Console(file=io.StringIO(), force_terminal=True, width=width)


def text_of(output):
    return output.file.getvalue()


def last_frame(output):
    """What stays on the terminal: the text after the last return to the start of a line."""
    return ANSI.sub("", text_of(output).split("\r")[-1]).splitlines()


def run_plain(steps, seconds, total=100, **options):
    """Lines in a pipe when every step takes `seconds`; the first takes 1000 more."""
    clock, output = Clock(), pipe()
    with Progress(total, "GRPO", output=output, clock=clock, **options) as progress:
        clock.now += 1000
        for step in steps:
            clock.now += seconds
            progress.update(step, METRICS)
    return text_of(output).splitlines()


@pytest.mark.smoke
def test_a_pipe_gets_lines_with_the_numbers_and_no_control_codes():
    lines = run_plain(range(1, 101), 2.0)
    assert lines[0] == f"GRPO 1/100 eta - {SHOWN}"
    assert lines[1] == f"GRPO 11/100 eta 2m58s {SHOWN}"
    assert lines[-1] == f"GRPO 100/100 in 20m {SHOWN}"
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize(
    "seconds, expected",
    [
        (2.0, [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]),  # 10 % come later
        (0.5, [1, 21, 41, 61, 81, 100]),  # 10 s come later
        (0.0, [1, 100]),
    ],
)
def test_a_line_is_due_after_ten_percent_and_ten_seconds(seconds, expected):
    steps = [int(line.split()[1].split("/")[0]) for line in run_plain(range(1, 101), seconds)]
    assert steps == expected


@pytest.mark.parametrize(
    "seconds, eta",
    [
        (45, "45s"),
        (59.7, "1m00s"),
        (570, "9m30s"),
        (725, "12m"),
        (3900, "1h05m"),
        (43200, "12h"),
        (183600, "2d03h"),
        (1036800, "12d"),
    ],
)
def test_remaining_time_is_short_and_leaves_compilation_out(seconds, eta):
    assert run_plain([1, 2], seconds, total=3)[1].startswith(f"GRPO 2/3 eta {eta} reward")


def test_a_resumed_run_is_paced_by_its_own_steps():
    lines = run_plain(range(61, 101), 3.0, initial_step=60)
    assert lines[0].startswith("GRPO 61/100 eta - ")
    assert lines[1].startswith("GRPO 71/100 eta 1m27s ")  # 29 steps of 3 s


def test_plain_lines_fit_eighty_columns():
    worst = {**METRICS, "reward": 1.0, "reliability": 1.0, "tokens_per_second": 999_999.0}
    clock, output = Clock(), pipe()
    with Progress(9999, "GRPO", output=output, clock=clock) as progress:
        progress.update(1, worst)
        clock.now += 46.2 * 7999
        progress.update(8000, worst)
    line = text_of(output).splitlines()[1]
    assert line.startswith("GRPO 8000/9999 eta 1d01h reward 1.000 ") and len(line) <= 80


@pytest.mark.parametrize(
    "value, text",
    [
        (853.4, "853"),
        (8530, "8.5k"),
        (85300, "85k"),
        (2.5e6, "2.5M"),
        (np.float32(4.2e7), "42M"),
    ],
)
def test_rates_are_shown_with_two_digits_and_a_unit(value, text):
    column = next(c for c in GRPO_COLUMNS if c.key == "tokens_per_second")
    assert column.text({"tokens_per_second": value}) == text


def test_null_missing_and_nan_metrics():
    output = pipe()
    with Progress(1, "GRPO", output=output) as progress:
        progress.update(1, {"reward": None, "severity": math.nan})
    assert text_of(output).endswith("reward - D nan\n")


def test_warm_up_has_columns_of_its_own():
    output = pipe()
    with Progress(4, "warm-up", columns=WARMUP_COLUMNS, output=output) as progress:
        progress.update(4, {"loss": 1.25, "tokens_per_second": 8500, "reward": 3.0})
    assert text_of(output).endswith("s loss 1.2500 tok/s 8.5k\n")
    output = pipe()
    with Progress(4, "x", columns=(("grad_norm", "g", "{:.1f}".format),), output=output) as bar:
        bar.update(4, METRICS)
    assert text_of(output).endswith("s g 7.0\n")


@pytest.mark.smoke
def test_the_live_bar_is_two_lines_of_eighty_columns():
    clock, output = Clock(), terminal()
    with Progress(10_000, "GRPO", output=output, clock=clock) as progress:
        progress.update(1, METRICS)
        clock.now += 360_000
        progress.update(7501, METRICS)
        clock.now += 60
    top, bottom = last_frame(output)
    assert re.fullmatch(
        r"GRPO 7501/10000 [━╸╺ ]{10,} 100:01:00 elapsed, 33:18:12 left", top.rstrip()
    )
    assert bottom.split() == SHOWN.split()
    assert cell_len(top) <= 80 and cell_len(bottom) <= 80


def test_the_live_bar_is_as_full_as_the_run():
    filled = {}
    for step in (0, 50, 100):
        output = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
        with Progress(100, "GRPO", output=output, clock=Clock()) as progress:
            if step:
                progress.update(step, METRICS)
        filled[step] = last_frame(output)[0].count("━")
    assert filled[0] == 0
    assert filled[100] >= 30
    assert abs(filled[50] - filled[100] / 2) <= 1


def test_a_narrow_terminal_cuts_instead_of_wrapping():
    output = terminal(width=50)
    with Progress(100, "GRPO", output=output, clock=Clock()) as progress:
        progress.update(1, METRICS)
    top, bottom = last_frame(output)
    assert top.startswith("GRPO 1/100") and bottom.startswith("reward 0.512")
    assert cell_len(top) <= 50 and cell_len(bottom) <= 50


def test_messages_stand_above_the_bar_as_they_are():
    message = "warning: [bold]x[/bold] :smile: /a/" + "long" * 5
    output = terminal()
    with Progress(100, "GRPO", output=output) as progress:
        progress.update(7, METRICS)
        progress.message(message)
    shown = ANSI.sub("", text_of(output))
    assert shown.index(message) < shown.rindex("GRPO 7/100")
    output = pipe()
    with Progress(100, "GRPO", output=output) as progress:
        progress.message("path " + "x" * 100)
        progress.message("two\nlines\x1b[31m\x07\rred\x9b")
    assert text_of(output) == "path " + "x" * 100 + "\ntwo\nlines[31mred\n"


def test_the_terminal_is_restored_after_an_error():
    output = terminal()
    with pytest.raises(KeyboardInterrupt), Progress(100, "GRPO", output=output) as progress:
        progress.update(7, METRICS)
        raise KeyboardInterrupt
    shown = text_of(output)
    assert shown.rindex("\x1b[?25h") > shown.index("\x1b[?25l")
    assert "GRPO 7/100" in last_frame(output)[0]


@pytest.mark.parametrize("output", [pipe(), terminal()])
def test_a_disabled_bar_shows_nothing(output):
    with Progress(3, "GRPO", enabled=False, output=output) as progress:
        progress.update(3, METRICS)
        progress.message("hidden")
    assert text_of(output) == ""


@pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE"])
def test_the_default_console_trusts_the_stream_alone(monkeypatch, capsys, variable):
    monkeypatch.setenv(variable, "1")
    with Progress(1, "GRPO") as progress:
        progress.update(1, METRICS)
        progress.message("done")
    final_table({"accuracy": 0.1}, {"accuracy": 0.2}, "results")
    console().print("[x] /runs/" + "y" * 100 + " :smile:")
    console(stderr=True).print("error: [x]")
    out, err = capsys.readouterr()
    assert "\x1b" not in out and "\r" not in out
    assert f"{SHOWN}\ndone\n" in out
    assert out.endswith("[x] /runs/" + "y" * 100 + " :smile:\n")
    assert err == "error: [x]\n"


@pytest.mark.parametrize("live", [False, True])
def test_an_encoding_without_greek_letters_does_no_harm(live):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    output = Console(file=stream, force_terminal=live, width=80)
    with Progress(1, "GRPO", output=output) as progress:
        progress.update(1, METRICS)
        progress.message("π")
    final_table({"α": 1.0}, {"β": 2.0}, "α", output)
    stream.seek(0)
    shown = ANSI.sub("", stream.read())
    assert re.search(r"alpha 0\.42 +R 0\.987", shown)
    assert "?\n" in shown


def table(before, after, output=None):
    output = pipe() if output is None else output
    final_table(before, after, "[countdown] before and after", output)
    shown = ANSI.sub("", text_of(output))
    assert max(cell_len(line) for line in shown.splitlines()) <= 80
    rows = [re.split(r"[│┃|]", line)[1:-1] for line in shown.splitlines() if "│" in line]
    return shown, {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_final_table_shows_values_and_changes():
    before = {"heldout_accuracy": 0.1234, "reward": -0.5, "truncated_fraction": 0.25}
    after = {"heldout_accuracy": np.float32(0.6), "reward": 0.125, "truncated_fraction": 0.0}
    shown, rows = table(
        {**before, "gone": 2.0, "pass_at_4": None}, {**after, "new": 1234.5, "pass_at_4": 0.5}
    )
    assert shown.splitlines()[0].strip() == "[countdown] before and after"
    assert rows == {
        "heldout_accuracy": ["12.3 %", "60.0 %", "+47.7 pp"],
        "reward": ["-0.5", "0.125", "+0.625"],
        "truncated_fraction": ["25.0 %", "0.0 %", "-25.0 pp"],
        "gone": ["2", "-", "-"],
        "pass_at_4": ["-", "50.0 %", "-"],
        "new": ["-", "1234", "-"],
    }
    assert list(rows) == [*before, "gone", "pass_at_4", "new"]
    assert "\x1b" not in shown


def test_final_table_folds_long_names_and_prints_names_verbatim():
    name = "[real]_" + "very_long_" * 12 + "accuracy"
    shown, rows = table({name: 0.0}, {name: 1.0}, terminal())
    assert "".join(rows) == name
    assert "0.0 %" in shown and "100.0 %" in shown and "+100.0 pp" in shown


def test_columns_name_metrics_of_a_step():
    assert [column.key for column in GRPO_COLUMNS] == list(METRICS)[:-1]
    assert Column("loss", "loss", "{:.1f}".format).text({"loss": 2}) == "2.0"
