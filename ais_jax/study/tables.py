"""A study's results as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ais_jax.study.config import Plan
from ais_jax.study.statistics import Difference, Mean, holm, verdict

# Metrics of training that are averaged over all steps, and what tables call them.
MEASURED = {
    "coefficient": "α",
    "severity": "D, nats",
    "reliability": "R",
    "amplification": "V",
    "reliability_raw": "ESS ratio, raw",
    "reliability_applied": "ESS ratio, applied",
    "entropy": "entropy, nats",
}

if TYPE_CHECKING:
    from ais_jax.study.outcomes import Outcomes


def markdown(plan: Plan, found: Outcomes, gradients: Sequence[dict]) -> str:
    """All tables: arms, differences within a recipe, gradients."""
    parts = []
    if any(found.runs.values()) or any(found.failed.values()):
        parts += [_arms(plan, found), *_failures(found)]
        parts += [_correction(plan, found)] if any(found.runs.values()) else []
        recipes = dict.fromkeys(arm.recipe for arm in plan.arms.values())
        parts += [t for recipe in recipes if (t := _pairs(plan, found, recipe))]
        parts += [t for name in plan.evaluations if (t := _over_time(plan, found, name))]
    parts += [
        table
        for along, seed in sorted({(g["along"], g["seed"]) for g in gradients})
        for table in _states(gradients, along, seed, plan.study.baseline)
    ]
    return "\n\n".join(parts) + "\n"


def _arms(plan: Plan, found: Outcomes) -> str:
    base, study = plan.study.baseline, plan.study
    labels = {name: outcome.label for name, outcome in plan.outcomes.items()}
    header = [
        *("arm", "rollout", "seeds", *labels.values()),
        *(f"{labels[study.outcome]} − {base}", "verdict", "p, Holm", "collapsed", "failed"),
    ]
    others = [name for name, arm in plan.arms.items() if arm.train and name != base]
    ps = holm([found.difference(name, base, study.outcome).p for name in others])
    adjusted = {
        name: "-" if math.isnan(p) else f"{p:.2g}" for name, p in zip(others, ps, strict=True)
    }
    rows = []
    for name, arm in plan.arms.items():
        if not arm.train:
            continue
        means = [_mean(found.mean(name, outcome)) for outcome in labels]
        against = found.difference(name, base, study.outcome)
        said = "" if name == base else verdict(against, study.half_width)
        rows.append(
            [
                *(name, arm.recipe, str(len(found.runs[name])), *means),
                "" if name == base else _difference(against),
                *(said, adjusted.get(name, "")),
                str(len(found.collapsed[name])),
                str(len(found.failed[name])),
            ]
        )
    note = (
        f"Per cent, ± standard error over seeds; differences ± half-width of the 95 % interval, "
        f"paired by seed. Greedy and sampled: on held-out problems, mean over the last "
        f"{100 * study.tail:.0f} % of the steps; final: after the last step, more problems; "
        "reward: of the sampling copy, over the same steps. Verdicts are of each arm alone; p is "
        "of no difference, adjusted for all arms of this table (Holm)."
    )
    return f"{note}\n\n{_table(header, rows)}"


def _correction(plan: Plan, found: Outcomes) -> str:
    names = [name for name in plan.arms if found.runs[name]]
    rows = [
        [name, *(f"{found.over_steps(name, key).value:.3g}" for key in MEASURED)] for name in names
    ]
    note = "Mean over all steps and seeds:"
    return f"{note}\n\n{_table(['arm', *MEASURED.values()], rows)}"


def _failures(found: Outcomes) -> list[str]:
    return [
        f"{arm}, seed {seed} failed: {why}"
        for arm, seeds in found.failed.items()
        for seed, why in sorted(seeds.items())
    ]


def _pairs(plan: Plan, found: Outcomes, recipe: str) -> str:
    names = [n for n, arm in plan.arms.items() if arm.recipe == recipe and found.runs[n]]
    if len(names) < 2:
        return ""
    rows = [
        [
            a,
            *(
                "" if a == b else _difference(found.difference(a, b, plan.study.outcome))
                for b in names
            ),
        ]
        for a in names
    ]
    what = plan.outcomes[plan.study.outcome].text
    note = f"With rollouts in {recipe}: {what}; row minus column, points:"
    return f"{note}\n\n{_table(['', *names], rows)}"


def _over_time(plan: Plan, found: Outcomes, name: str) -> str:
    base = plan.study.baseline
    by_arm = {n: found.over_time(n, base, name) for n in plan.arms if n != base and found.runs[n]}
    steps = sorted({step for differences in by_arm.values() for step in differences})
    if not steps:
        return ""
    rows = [
        [arm, *(_difference(of_arm[s]) if s in of_arm else "-" for s in steps)]
        for arm, of_arm in by_arm.items()
    ]
    note = f"Held-out {plan.evaluations[name]}, minus {base} by step, points:"
    return f"{note}\n\n{_table(['arm', *(f'step {s}' for s in steps)], rows)}"


def _states(gradients: Sequence[dict], along: str, seed: int, baseline: str) -> Iterable[str]:
    """Tables of the states of one run: against others in pairs, then each arm alone."""
    states = [g for g in gradients if (g["along"], g["seed"]) == (along, seed)]
    states.sort(key=lambda g: g["step"])
    arms = states[0]["arms"]
    header = ["arm", *(f"step {g['step']}" for g in states)]
    first: dict[str, str] = {}
    for name, arm in arms.items():
        first.setdefault(arm["recipe"], name)
    relative = ", relative to the squared norm of the unquantized gradient"
    shown = [
        (
            f"mean squared error of a batch, times that of {baseline}",
            "mse",
            dict.fromkeys(arms, baseline),
        ),
        (
            "mean squared error of a batch, times that of the recipe's first arm",
            "mse",
            {name: first[arm["recipe"]] for name, arm in arms.items()},
        ),
        ("efficiency", "efficiency", None),
        (f"squared bias{relative}", "bias2", None),
        (f"variance of a batch{relative}", "variance", None),
        ("cosine of the mean gradient with the unquantized one", "cosine", None),
        ("mean coefficient α", "coefficient", None),
        ("severity D, nats", "severity", None),
    ]
    for what, key, others in shown:
        rows = []
        for name in arms:
            found = [g["arms"][name] for g in states]
            if others is not None:
                found = [x.get("against", {}).get(others[name], {}) for x in found]
            rows.append([name, *(_value(x.get(key)) for x in found)])
        note = (
            f"Along {along}, seed {seed}: {what} ({states[0]['batches']} batches a state, 95 % "
            "bootstrap intervals over them):"
        )
        yield f"{note}\n\n{_table(header, rows)}"


def _value(x) -> str:
    if x is None:
        return "-"
    if isinstance(x, list):
        if x[0] is None or not math.isfinite(x[0]):
            return "-"
        value, low, high = x
        return f"{value:.3g} [{low:.3g}, {high:.3g}]"
    return f"{x:.3g}"


def _mean(mean: Mean) -> str:
    if not mean.seeds:
        return "-"
    error = "" if math.isnan(mean.error) else f" ± {100 * mean.error:.1f}"
    return f"{100 * mean.value:.1f}{error}"


def _difference(difference: Difference) -> str:
    if not difference.seeds:
        return "-"
    half = "" if math.isnan(difference.half_width) else f" ± {100 * difference.half_width:.1f}"
    return f"{100 * difference.value:+.1f}{half}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * len(header))
    return "\n".join(lines)
