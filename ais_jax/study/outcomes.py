"""What the runs of a study have come to, and what that says with confidence."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ais_jax.errors import UserError
from ais_jax.report import evidence, page
from ais_jax.report.figures import Curves, draw, evaluation
from ais_jax.study import tables
from ais_jax.study.config import REWARD, Plan, tail_start
from ais_jax.study.statistics import Difference, Mean, has_collapsed, mean, paired
from ais_jax.train.metrics import read_json, read_metrics, write_json


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What the finished runs have come to.

    Attributes:
      runs: arm -> seed -> outcome -> value.
      metrics: arm -> seed -> the rows of metrics.jsonl.
      evaluations: arm -> seed -> one of `Plan.evaluations` -> step -> value.
      collapsed: arm -> seeds whose reward fell below half of what it had been.
      failed: arm, or "gradients along" one -> seed -> why.
    """

    runs: dict[str, dict[int, dict[str, float]]]
    metrics: dict[str, dict[int, list[dict[str, Any]]]]
    evaluations: dict[str, dict[int, dict[str, dict[int, float]]]]
    collapsed: dict[str, list[int]]
    failed: dict[str, dict[int, str]]

    def mean(self, arm: str, outcome: str) -> Mean:
        """Over the arm's seeds."""
        return mean([run[outcome] for run in self.runs[arm].values()])

    def difference(self, arm: str, other: str, outcome: str) -> Difference:
        """Of `arm` minus `other`, paired by seed."""
        shared = sorted(self.runs[arm].keys() & self.runs[other].keys())
        return paired([self.runs[arm][s][outcome] - self.runs[other][s][outcome] for s in shared])

    def over_steps(self, arm: str, key: str) -> Mean:
        """Of a metric's mean over all steps of a run, over seeds."""
        means = [_mean_of(rows, key) for rows in self.metrics[arm].values()]
        return mean([value for value in means if not math.isnan(value)])

    def over_time(self, arm: str, other: str, name: str) -> dict[int, Difference]:
        """By step, the difference of an evaluation, where both have it."""
        mine, others = self.evaluations[arm], self.evaluations[other]
        by_step: dict[int, list[float]] = {}
        for seed in sorted(mine.keys() & others.keys()):
            a, b = mine[seed][name], others[seed][name]
            for step in a.keys() & b.keys():
                by_step.setdefault(step, []).append(a[step] - b[step])
        return {step: paired(by_step[step]) for step in sorted(by_step)}


def run_folder(folder: pathlib.Path, arm: str, seed: int) -> pathlib.Path:
    """Where a run of a study is."""
    return folder / "runs" / arm / f"seed_{seed}"


def gradient_folder(folder: pathlib.Path, along: str, seed: int) -> pathlib.Path:
    """Where gradients along a run are."""
    return folder / "gradients" / along / f"seed_{seed}"


def collect(plan: Plan, folder: pathlib.Path) -> Outcomes:
    """The finished runs of all arms, also of seeds that the study does not name."""
    found = Outcomes({}, {}, {}, {}, {})
    for arm in plan.arms:
        found.runs[arm], found.metrics[arm], found.evaluations[arm] = {}, {}, {}
        found.failed[arm], found.collapsed[arm] = {}, []
        for seed in _seeds(folder / "runs" / arm):
            place = run_folder(folder, arm, seed)
            failure = place / "failure.json"
            if failure.exists():
                found.failed[arm][seed] = str(read_json(failure).get("failed"))
            elif (place / "summary.json").exists():
                rows = found.metrics[arm][seed] = read_metrics(place / "metrics.jsonl")
                found.evaluations[arm][seed] = {x: _evaluated(rows, x) for x in plan.evaluations}
                found.runs[arm][seed], collapsed = _outcome(place, rows, plan)
                found.collapsed[arm] += [seed] if collapsed else []
    for along in sorted((folder / "gradients").glob("*")):
        failures = {seed: along / f"seed_{seed}" / "failure.json" for seed in _seeds(along)}
        failed = {s: str(read_json(x).get("failed")) for s, x in failures.items() if x.exists()}
        if failed:
            found.failed[f"gradients along {along.name}"] = failed
    return found


def _seeds(arm: pathlib.Path) -> list[int]:
    names = (re.fullmatch(r"seed_(\d+)", path.name) for path in arm.glob("seed_*"))
    return sorted(int(match[1]) for match in names if match)


def _evaluated(rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    values = evaluation(rows, f"eval_{name}")
    return {row["step"]: float(x) for row, x in zip(rows, values, strict=True) if x == x}


def _outcome(
    place: pathlib.Path, rows: Sequence[Mapping[str, Any]], plan: Plan
) -> tuple[dict[str, float], bool]:
    after = read_json(place / "summary.json").get("after")
    if not rows or not isinstance(after, dict):
        lacks = "summary.json lacks what came after" if rows else "metrics.jsonl holds no steps"
        raise UserError(f"{place}: {lacks}; remove the folder, and the run is repeated")
    steps = rows[-1]["step"]
    last = [row for row in rows if row["step"] >= tail_start(steps, plan.study.tail)]
    found = {REWARD: _mean_of(last, "reward")}
    for measure in plan.measures:
        for name in (measure, f"sampled_{measure}"):
            final = after.get(f"heldout_{name}", math.nan)
            evaluated = _mean_of(last, f"eval_{name}")
            found[f"final_{name}"] = final
            found[name] = final if math.isnan(evaluated) else evaluated
    return found, has_collapsed([row.get("reward") for row in rows])


def _mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [row[key] for row in rows if row.get(key) is not None]
    return float(np.mean(values)) if values else math.nan


def write(plan: Plan, folder: pathlib.Path) -> Outcomes:
    """Writes results.json, tables.md, the figures and report.html of what there is."""
    found = collect(plan, folder)
    gradients = _read_gradients(folder)
    write_json(folder / "results.json", _as_json(plan, found, gradients))
    text = tables.markdown(plan, found, gradients)
    (folder / "tables.md").write_text(text, encoding="utf-8")
    curves = [
        Curves(name, arm.recipe, list(found.metrics[name].values()))
        for name, arm in plan.arms.items()
        if found.runs[name] and arm.draw
    ]
    figures = {**_evidence(plan, found, gradients), **draw(curves, plan.study.baseline)}
    page.write(folder, folder.resolve().name, figures, text)
    return found


def _evidence(plan: Plan, found: Outcomes, states: list[dict]) -> dict[str, tuple[str, Figure]]:
    """Differences from the baseline, and gradients along each run."""
    figures: dict[str, tuple[str, Figure]] = {}
    base = plan.study.baseline
    trained = [arm for arm in plan.arms if found.runs[arm]]
    against = {a: found.difference(a, base, plan.study.outcome) for a in trained if a != base}
    if against and base in trained:
        text = plan.outcomes[plan.study.outcome].text
        figures["differences"] = (
            f"Against {base}: {text}",
            evidence.differences(against, base, text[0].upper() + text[1:]),
        )
        drawn = {a: arm for a, arm in plan.arms.items() if arm.draw and a in trained}
        recipes = {a: arm.recipe for a, arm in drawn.items() if a != base}
        name = _evaluation_of(plan.study.outcome)
        timed = {a: found.over_time(a, base, name) for a in recipes}
        if any(timed.values()):
            figures["differences_over_time"] = (
                f"Against {base} over training",
                evidence.over_time(timed, recipes, base, f"Held-out {plan.evaluations[name]},"),
            )
    names = [name for name, arm in plan.arms.items() if arm.draw]
    runs = sorted({(state["along"], state["seed"]) for state in states})
    for along, seed in runs:
        of_run = [s for s in states if (s["along"], s["seed"]) == (along, seed)]
        figure = evidence.gradients(of_run, names)
        if figure is not None:
            name = f"gradients_{along}_{seed}"
            figures[name] = (f"Gradients at states of {along}, seed {seed}", figure)
    return figures


def _evaluation_of(outcome: str) -> str:
    """What is drawn over time where `outcome` is what is judged."""
    return "sampled_accuracy" if outcome == REWARD else outcome.removeprefix("final_")


def _as_json(plan: Plan, found: Outcomes, gradients: list[dict]) -> dict[str, Any]:
    trained = [arm for arm in plan.arms if found.runs[arm]]
    return {
        "baseline": plan.study.baseline,
        "outcomes": {name: outcome.text for name, outcome in plan.outcomes.items()},
        "runs": _keys_as_text(found.runs),
        "collapsed": found.collapsed,
        "failed": _keys_as_text(found.failed),
        "means": {a: {o: found.mean(a, o)._asdict() for o in plan.outcomes} for a in trained},
        "differences": {
            a: {
                b: {o: found.difference(a, b, o)._asdict() for o in plan.outcomes}
                for b in trained
                if b != a
            }
            for a in trained
        },
        "over_steps": {
            a: {
                str(seed): {key: _mean_of(rows, key) for key in tables.MEASURED}
                for seed, rows in found.metrics[a].items()
            }
            for a in trained
        },
        "evaluations": _keys_as_text(found.evaluations),
        "gradients": gradients,
    }


def _keys_as_text(tree: Any) -> Any:
    """As JSON has them."""
    if not isinstance(tree, dict):
        return tree
    return {str(key): _keys_as_text(value) for key, value in tree.items()}


def _read_gradients(folder: pathlib.Path) -> list[dict]:
    """The measured states, of all seeds."""
    paths = sorted((folder / "gradients").glob("*/seed_*/step_*.json"))
    return [{"along": path.parts[-3], **read_json(path)} for path in paths]
