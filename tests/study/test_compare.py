"""Studies from the command line: what is run, what is not run again, and what is said of it."""

import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import filelock
import pytest
import tiny_study
from tiny_job import one_device

from ais_jax.errors import UserError
from ais_jax.study import compare as compare_lib
from ais_jax.study import config as config_lib
from ais_jax.study import outcomes

ROOT = os.path.dirname(os.path.dirname(__file__))


def environment():
    return one_device() | {"PYTHONPATH": ROOT}


def compare(path, *args):
    command = [sys.executable, "-m", "ais_jax", "compare", str(path), *map(str, args)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(file, folder) of a study that is done."""
    folder = tmp_path_factory.mktemp("study")
    path = tiny_study.write(folder, gradients=tiny_study.GRADIENTS)
    result = compare(path, "--output", folder / "out", "--jobs", 2)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(folder / "out" / "report.html")
    return path, folder / "out"


def rows(run, name="metrics.jsonl"):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_every_arm_and_seed_is_trained(study):
    _, out = study
    runs = sorted(p.relative_to(out / "runs").as_posix() for p in (out / "runs").glob("*/*"))
    assert runs == ["exact/seed_0", "exact/seed_1", "int4/seed_0", "int4/seed_1"]
    assert all(len(rows(out / "runs" / run)) == 4 for run in runs)
    assert len(list((out / "gradients" / "int4" / "seed_0").glob("step_*.json"))) == 2
    assert not list(out.rglob("failure.json"))


def test_arms_of_a_seed_are_posed_the_same_with_the_same_keys(study):
    """Before anything is learned the arms differ in the rounding of their samplers alone."""
    _, out = study
    samples = {
        (arm, seed): [
            row["example"] for row in rows(out / "runs" / arm / f"seed_{seed}", "samples.jsonl")
        ]
        for arm in ("exact", "int4")
        for seed in (0, 1)
    }
    assert samples["exact", 0] == samples["int4", 0] != samples["exact", 1]
    first = {key: rows(out / "runs" / key[0] / f"seed_{key[1]}")[0] for key in samples}
    assert first["exact", 0]["severity"] < 1e-5 < first["int4", 0]["severity"]


def test_results_are_means_over_seeds_and_paired_differences(study):
    _, out = study
    found = json.loads((out / "results.json").read_text())
    by_run = {
        (arm, seed): rows(out / "runs" / arm / f"seed_{seed}")
        for arm in ("exact", "int4")
        for seed in (0, 1)
    }
    # The tail is the last quarter of four steps.
    rewards = {key: r[-1]["reward"] for key, r in by_run.items()}
    assert found["runs"]["int4"]["1"]["reward"] == pytest.approx(rewards["int4", 1])
    differences = [rewards["int4", s] - rewards["exact", s] for s in (0, 1)]
    said = found["differences"]["int4"]["exact"]["reward"]
    assert said["value"] == pytest.approx(sum(differences) / 2)
    assert said["seeds"] == 2
    # Student's t with one degree of freedom: tan(0.95 * pi / 2) times the standard error.
    half = 12.7062 * abs(differences[0] - differences[1]) / 2
    assert said["half_width"] == pytest.approx(half, rel=1e-4, abs=1e-9)
    assert list(found["runs"]["int4_tis"]) == []
    steps = [(state["along"], state["step"]) for state in found["gradients"]]
    assert steps == [("int4", 0), ("int4", 2)]


def test_page_needs_no_other_file(study):
    _, out = study
    page = (out / "report.html").read_text(encoding="utf-8")
    pictures = re.findall(r'<img alt="[^"]+" src="data:image/png;base64,[A-Za-z0-9+/=]+">', page)
    assert len(pictures) == page.count("<img") == len(list(out.glob("*.png"))) >= 6
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "int4 | int4 |" not in page and "<td>int4</td>" in page
    assert "<th>verdict</th>" in page and "| verdict |" in (out / "tables.md").read_text()


def test_tables_hold_the_gradients_in_pairs_and_the_means_over_steps(study):
    _, out = study
    text = (out / "tables.md").read_text()
    steps = [rows(out / "runs" / "int4" / f"seed_{seed}") for seed in (0, 1)]
    mean = sum(row["severity"] for of_run in steps for row in of_run) / 8
    assert f"| int4 | 0 | {mean:.3g} |" in text
    state = json.loads((out / "gradients" / "int4" / "seed_0" / "step_0.json").read_text())
    ratio = state["arms"]["int4_tis"]["against"]["int4"]["mse"][0]
    blocks = text.split("\n\n")
    (at,) = (i for i, x in enumerate(blocks) if "times that of the recipe's first arm" in x)
    wanted = "| int4_tis | - |" if ratio is None else f"| int4_tis | {ratio:.3g} ["
    assert wanted in blocks[at + 1]


def test_what_is_done_is_not_run_again(study):
    path, out = study
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.suffix in (".jsonl", ".yaml")}
    before = {p: t for p, t in before.items() if p.name != "study.yaml"}
    result = compare(path, "--output", out)
    assert result.returncode == 0, result.stderr
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_other_settings_in_the_same_folder_are_refused(study):
    path, out = study
    arm = "arms.int4.settings={optimizer: {learning_rate: 0.5}}"
    result = compare(path, arm, "--output", out)
    assert result.returncode == 2
    assert "int4/seed_0 was run with other settings (optimizer.learning_rate)" in result.stderr
    result = compare(path, "gradients.batches=9", "--output", out)
    assert result.returncode == 2
    assert "was measured with other settings" in result.stderr


def test_the_folder_of_another_study_is_left_alone(study, tmp_path):
    _, out = study
    before = (out / "results.json").read_bytes()
    settings = {"settings": {"warmup": {"steps": 2}}}
    other = tiny_study.write(
        tmp_path, arms={"plain": {"recipe": "none"}}, baseline="plain", **settings
    )
    with pytest.raises(UserError, match=r"was made with other settings \(settings\.warmup\)"):
        compare_lib.compare(other, output=out)
    assert (out / "results.json").read_bytes() == before and not (out / "runs" / "plain").exists()


def test_two_processes_in_one_folder_are_refused(tmp_path):
    path = tiny_study.write(tmp_path)
    (tmp_path / "out").mkdir()
    with (
        filelock.FileLock(tmp_path / "out" / ".lock"),
        pytest.raises(UserError, match=r"another process is at work in .*/out; wait for it"),
    ):
        compare_lib.compare(path, output=tmp_path / "out", minutes=1e-6)
    compare_lib.compare(path, output=tmp_path / "out", minutes=1e-6)


def test_arms_and_only_choose_what_is_done(study, tmp_path, monkeypatch):
    path, _ = study
    asked = []
    monkeypatch.setattr(
        compare_lib,
        "_work",
        lambda todo, *_: asked.append([(u.arm, u.seed, u.trains) for u in todo]),
    )
    for arms, only in (((), "gradients"), (["exact"], None), (["int4"], "runs"), (["int4"], None)):
        compare_lib.compare(path, output=tmp_path / "out", arms=arms, only=only)
    assert asked == [
        [("int4", 0, False)],
        [("exact", 0, True), ("exact", 1, True)],
        [("int4", 0, True), ("int4", 1, True)],
        [("int4", 0, False), ("int4", 0, True), ("int4", 1, True)],
    ]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metrics.jsonl", "", "metrics.jsonl holds no steps; remove the folder"),
        ("summary.json", "{", "summary.json cannot be read"),
        ("summary.json", "[]", "summary.json holds no JSON object"),
        ("summary.json", "{}", "summary.json lacks what came after"),
        ("failure.json", "?", "failure.json cannot be read"),
    ],
)
def test_damaged_files_are_said_in_one_line(study, tmp_path, name, text, said):
    path, out = study
    shutil.copytree(out, tmp_path / "out")
    (tmp_path / "out" / "runs" / "exact" / "seed_1" / name).write_text(text)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        outcomes.write(config_lib.load(path), tmp_path / "out")
    assert "exact/seed_1" in str(error.value) and "\n" not in str(error.value)


def test_folders_beside_the_runs_and_metrics_that_a_run_lacks_do_no_harm(study, tmp_path):
    path, out = study
    shutil.copytree(out, tmp_path / "out")
    runs = tmp_path / "out" / "runs" / "exact"
    shutil.copytree(runs / "seed_1", runs / "seed_1.before")
    lines = [{k: v for k, v in row.items() if k != "reward"} for row in rows(runs / "seed_1")]
    (runs / "seed_1" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    found = outcomes.write(config_lib.load(path), tmp_path / "out")
    assert list(found.runs["exact"]) == [0, 1] and math.isnan(found.runs["exact"][1]["reward"])


def test_a_failing_arm_leaves_the_others_alone(tmp_path):
    failing = {"settings": {"rewards": {"train.reward_functions:absent": 1.0}}, "recipe": "fp8"}
    path = tiny_study.write(
        tmp_path,
        "seeds=[0]",
        "settings.train.steps=1",
        arms={"failing": failing, **tiny_study.STUDY["arms"]},
    )
    out = tmp_path / "out"
    result = compare(path, "--output", out, "--arms", "failing,exact")
    assert result.returncode == 1, result.stderr
    assert "failing, seed 0 failed:" in (out / "tables.md").read_text()
    assert "failing, seed 0 failed:" in result.stdout and "absent" in result.stdout
    found = json.loads((out / "results.json").read_text())
    assert "absent" in found["failed"]["failing"]["0"]
    assert list(found["runs"]["exact"]) == ["0"] and not found["runs"]["int4"]


def test_a_study_that_is_told_to_leave_goes_on(tmp_path):
    path = tiny_study.write(
        tmp_path, "seeds=[0]", "settings.train.steps=400", "settings.train.eval_every=0"
    )
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "ais_jax",
        "compare",
        str(path),
        "--output",
        str(out),
        "--arms",
        "exact",
    ]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    metrics = out / "runs" / "exact" / "seed_0" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    done = len(rows(metrics.parent))
    assert list((metrics.parent / "checkpoints").iterdir()), "nothing was saved"
    time.sleep(0.5)
    assert len(rows(metrics.parent)) == done < 400, "a worker is still at it"
    result = compare(path, "--output", out, "--arms", "exact")
    assert result.returncode == 0, result.stderr
    assert [row["step"] for row in rows(metrics.parent)] == list(range(1, 401))


def test_nothing_is_begun_once_the_time_is_up(tmp_path):
    path = tiny_study.write(tmp_path)
    result = compare(path, "--output", tmp_path / "out", "--minutes", "1e-6")
    assert result.returncode == 0, result.stderr
    assert "4 parts are left; the same command goes on" in result.stdout
    assert not (tmp_path / "out" / "runs").exists()
    assert "<h1>out</h1>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("baseline=none", "baseline='none' is no arm"),
        ("arms.int4.recipe=int3", "arms.int4: recipe"),
        ("arms.int4.correction=magic", "arms.int4: correction"),
        ("arms.int4.settings={ais: {levle: token}}", "did you mean ais.level"),
        ("arms.int4=3", "arms.int4: expected keys such as recipe"),
        ("arms.a/b={recipe: none}", "names a folder"),
        ("seeds=[1,1]", "each once"),
        ("base=absent.yaml", "cannot be read"),
        ("tail=0", "tail=0.0 must be above 0"),
        ("outcome=cell_accuracy", "outcome='cell_accuracy' is none of accuracy, sampled_accuracy,"),
        ("arms.int4.settings={task: {name: sudoku}}", "several tasks, arithmetic, sudoku"),
        ("gradients={along: [int4], batches: 10, blocks: 4}", "multiple of blocks=4"),
        ("gradients={along: [int4, exat]}", "gradients.along='exat' is no arm"),
        ("baseline=int4_tis", "baseline='int4_tis' has train: false"),
        (
            "gradients={along: [int4]} arms.int4.settings={ais: {dual_clip: 2.0}}",
            "ais.dual_clip is None in arm exact and 2.0 in int4",
        ),
    ],
)
def test_mistakes_are_said_in_one_line(tmp_path, change, said):
    path = tiny_study.write(tmp_path)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        config_lib.load(path, re.split(r" (?=arms\.)", change))
    assert "\n" not in str(error.value)


def test_unknown_arms_and_jobs_are_refused(tmp_path):
    path = tiny_study.write(tmp_path)
    with pytest.raises(UserError, match="'int5' is no arm"):
        compare_lib.compare(path, output=tmp_path / "out", arms=["int5"])
    with pytest.raises(UserError, match="--jobs 0"):
        compare_lib.compare(path, output=tmp_path / "out", jobs=0)
    with pytest.raises(UserError, match="--minutes 0 must be above 0"):
        compare_lib.compare(path, output=tmp_path / "out", minutes=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said_in_one_line(tmp_path):
    path = tiny_study.write(tmp_path, gradients=tiny_study.GRADIENTS)
    with pytest.raises(UserError, match=r"study\.yaml/out cannot be used: Not a directory"):
        compare_lib.compare(path, output=path / "out")


def test_a_preset_decides_the_correction_and_nothing_else(tmp_path):
    base_ais = {"ais": {"clip_high": 0.28, "severity_scale": "auto", "fixed_alpha": 0.3}}
    path = tiny_study.write(tmp_path, settings=base_ais)
    plan = config_lib.load(path)
    assert plan.config("int4", 0).ais.coefficient == "fixed"
    assert plan.config("int4", 0).ais.fixed_alpha == 0
    assert plan.config("int4_tis", 0).ais.fixed_alpha == 1
    assert plan.config("int4_auto", 0).ais.coefficient == "gated"
    for arm in plan.arms:
        config = plan.config(arm, 7)
        assert config.ais.clip_high == 0.28 and config.ais.severity_scale == "auto"
        assert config.train.seed == 7
        assert config.rollout.recipe == plan.arms[arm].recipe


@pytest.mark.parametrize("name", ["countdown", "sudoku_diffusion"])
def test_shipped_studies_load(name):
    path = pathlib.Path(ROOT).parent / "configs" / f"study_{name}.yaml"
    plan = config_lib.load(path)
    for arm in plan.arms:
        config = plan.config(arm, 0)
        config.check_devices(1)
        assert config.task.heldout_examples >= 4096 and config.warmup.seed is not None
    assert plan.config("bf16", 0).rollout.recipe == "none" and len(plan.study.seeds) >= 5
    for recipe in ("fp8", "int4"):
        for correction in ("uncorrected", "tis", "icepop", "tis_sequence", "ais"):
            assert plan.config(f"{recipe}_{correction}", 0).rollout.recipe == recipe
    assert f"ais-jax compare configs/{path.name}" in path.read_text(encoding="utf-8")


def test_the_tail_is_the_last_share_of_the_steps():
    assert config_lib.tail_start(400, 0.25) == 301
    assert config_lib.tail_start(4, 0.25) == 4
    assert config_lib.tail_start(10, 1.0) == 1
    assert config_lib.tail_start(3, 0.01) == 3


def test_runs_of_other_seeds_count_as_well(study):
    path, out = study
    plan = config_lib.load(path, ["seeds=[5]"])
    found = outcomes.collect(plan, out)
    assert sorted(found.runs["exact"]) == [0, 1]


def test_a_task_is_judged_by_its_further_measures_as_well(tmp_path):
    path = tiny_study.write(
        tmp_path, settings={"task": {"name": "sudoku"}}, outcome="sampled_cell_accuracy"
    )
    plan = config_lib.load(path)
    cells = {("exact", 0): 0.8, ("exact", 1): 0.7, ("int4", 0): 0.7, ("int4", 1): 0.5}
    for (arm, seed), value in cells.items():
        place = outcomes.run_folder(tmp_path, arm, seed)
        place.mkdir(parents=True)
        evaluated = {
            "eval_accuracy": value / 2,
            "eval_sampled_accuracy": value / 4,
            "eval_cell_accuracy": value + 0.1,
            "eval_sampled_cell_accuracy": value,
        }
        rows = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.5, **evaluated}]
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        after = {key.replace("eval", "heldout"): x + 0.01 for key, x in evaluated.items()}
        (place / "summary.json").write_text(json.dumps({"after": after}))
    found = outcomes.write(plan, tmp_path)
    assert found.runs["int4"][1] == {
        "reward": 0.5,
        **{"accuracy": 0.25, "final_accuracy": 0.26},
        **{"sampled_accuracy": 0.125, "final_sampled_accuracy": 0.135},
        **{"cell_accuracy": 0.6, "final_cell_accuracy": 0.61},
        **{"sampled_cell_accuracy": 0.5, "final_sampled_cell_accuracy": 0.51},
    }
    assert found.evaluations["exact"][0]["sampled_cell_accuracy"] == {2: 0.8}
    text = (tmp_path / "tables.md").read_text()
    assert "| reward | cell accuracy, sampled − exact | verdict |" in text
    assert "| -15.0 ± 63.5 | undecided | 0.2 | 0 | 0 |" in text
    assert "Held-out cell accuracy, sampled, minus exact by step, points:" in text
    assert "held-out cell accuracy" in (tmp_path / "report.html").read_text()
