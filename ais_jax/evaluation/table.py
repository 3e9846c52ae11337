"""Results of an evaluation as numbers and as tables in Markdown."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ais_jax.errors import UserError
from ais_jax.evaluation import statistics
from ais_jax.evaluation.generations import Generation
from ais_jax.evaluation.statistics import Estimate
from ais_jax.train.metrics import write_json

FILE = "table.md"
RESULTS = "results.json"


class Result(NamedTuple):
    """One benchmark at one length by one recipe."""

    benchmark: str  # name
    title: str
    length: int
    recipe: str
    problems: int
    samples: int
    measures: dict[str, Estimate]  # shares; the first is the headline
    mean_tokens: float
    truncated: float  # share of completions
    tokens_per_second: float | None  # compilation included; None if nothing was sampled


def summarize(
    benchmark: str,
    title: str,
    length: int,
    recipe: str,
    generations: Sequence[Generation],
    samples: int,
    seconds: float = 0.0,
    sampled: int = 0,
) -> Result:
    """What all generations of a cell say, `samples` of each problem in consecutive places."""
    measures: dict[str, Estimate] = {}
    for name in generations[0].counts:
        right, total = (
            np.array([g.counts[name][i] for g in generations]).reshape(-1, samples) for i in (0, 1)
        )
        label = name if samples == 1 else f"{name}, avg@{samples}"
        measures[label] = statistics.estimate(right.sum(axis=1), total.sum(axis=1))
        if samples > 1 and name == "accuracy":
            measures |= _of_several(right, generations, samples)
    return Result(
        benchmark,
        title,
        length,
        recipe,
        len(generations) // samples,
        samples,
        measures,
        float(np.mean([g.tokens for g in generations])),
        float(np.mean([g.truncated for g in generations])),
        sampled / seconds if sampled else None,
    )


def _of_several(scores: np.ndarray, generations, samples: int) -> dict[str, Estimate]:
    """pass@k of powers of two, and maj@k of all samples where answers are told apart."""
    ks = [2**i for i in range(samples.bit_length()) if 2**i <= samples]
    ks = sorted({*ks, samples})
    found = {f"pass@{k}": statistics.estimate(statistics.pass_at(k, scores)) for k in ks}
    answers = np.array([g.answer for g in generations], object).reshape(-1, samples)
    if any(g.answer is not None for g in generations):  # of a task that tells answers apart
        votes = statistics.majority_at(samples, scores, answers.tolist())
        found[f"maj@{samples}"] = statistics.estimate(votes)
    return found


def write(folder: pathlib.Path, settings: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Writes table.md and results.json, with the results of before that were not measured anew.

    Raises:
      UserError: they cannot be written, or what is there is damaged.
    """
    results = _merged(_read(folder / RESULTS), results)
    rows = [
        {
            **result._asdict(),
            "measures": {name: value._asdict() for name, value in result.measures.items()},
        }
        for result in results
    ]
    try:
        write_json(folder / RESULTS, {"settings": dict(settings), "results": rows})
        (folder / FILE).write_text(markdown(settings, results), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def _read(path: pathlib.Path) -> list[Result]:
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_bytes())["results"]
        return [
            Result(
                **{
                    **row,
                    "measures": {name: Estimate(**x) for name, x in row["measures"].items()},
                }
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: remove it, and it is written again") from None


def _merged(old: Sequence[Result], new: Sequence[Result]) -> list[Result]:
    cells = {(r.benchmark, r.length, r.recipe): r for r in (*old, *new)}
    return list(cells.values())


def markdown(settings: Mapping[str, Any], results: Sequence[Result]) -> str:
    """The tables: recipes down and benchmarks by length across, then every measure."""
    shown = [f"{name} {value}" for name, value in settings.items() if value is not None]
    lines = [
        "Percent, with the standard error over problems (bootstrap).",
        "",
        *_overview(results),
        "",
        *_details(results),
        "",
        f"Settings: {', '.join(shown)}.",
    ]
    return "\n".join(lines) + "\n"


def _overview(results: Sequence[Result]) -> list[str]:
    cells = {(r.recipe, r.title, r.length): next(iter(r.measures.values())) for r in results}
    columns = list(dict.fromkeys((r.title, r.length) for r in results))
    recipes = list(dict.fromkeys(r.recipe for r in results))
    lines = [
        _row(["rollout", *(f"{title} / {length}" for title, length in columns)]),
        _row(["---", *("---:" for _ in columns)]),
    ]
    for recipe in recipes:
        found = [cells.get((recipe, *column)) for column in columns]
        lines.append(_row([_name(recipe), *(_percent(x) if x else "" for x in found)]))
    return lines


def _details(results: Sequence[Result]) -> list[str]:
    heads = ("benchmark", "length", "rollout", "problems", "measure", "value", "tokens", "unended")
    lines = [_row(heads), _row(["---", "---:", "---", "---:", "---", "---:", "---:", "---:"])]
    for r in results:
        for name, value in r.measures.items():
            start = (r.title, str(r.length), _name(r.recipe), str(r.problems))
            end = (f"{r.mean_tokens:.0f}", f"{100 * r.truncated:.1f} %")
            lines.append(_row([*start, name, _percent(value), *end]))
    return lines


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _name(recipe: str) -> str:
    return "unquantized" if recipe == "none" else recipe


def _percent(value: Estimate) -> str:
    return f"{100 * value.value:.2f} ± {100 * value.error:.2f}"
