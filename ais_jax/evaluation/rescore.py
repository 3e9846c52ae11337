"""`ais-jax score`: generations that somebody has sampled, through every scorer of a benchmark."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ais_jax import tasks
from ais_jax.errors import UserError
from ais_jax.evaluation import benchmarks, generations, statistics
from ais_jax.evaluation.benchmarks import Benchmark
from ais_jax.evaluation.statistics import Estimate
from ais_jax.sampling.prompts import after_thinking
from ais_jax.tasks import common, d1

_LAYOUTS = (
    'lines of {"completion": ..., "index": ...} as `ais-jax eval` writes them, or a JSON file with '
    '"generations" as d1 publishes them'
)
_PUZZLE = re.compile(r"[0-9]{16}")
_END = re.compile(r"<\|(?:eot_id|endoftext|im_end)\|>")


class Scored(NamedTuple):
    """What one scorer finds of the generations."""

    scorer: str  # a protocol and a measure
    generations: int
    estimate: Estimate


class _Read(NamedTuple):
    """A generation that was read from a file."""

    text: str  # what a scorer reads, with its end shown as d1's wants to see it
    example: dict
    group: tuple  # of the problem, whose samples are not independent of each other


def rescore(paths: Sequence[str], name: str, data: str | None = None) -> list[Scored]:
    """What every protocol makes of generations, pooled over files.

    Args:
      paths: files in one of two layouts. d1's hold the right answers; of others the problems are
        looked up, and what is left out of a completion that has thought, by eval.json beside them.
      name: of the benchmark.
      data: where its problems come from instead of the published file.

    Raises:
      UserError: a file cannot be read or is of neither layout.
    """
    benchmark = benchmarks.get_benchmark(name)
    rows = [row for path in paths for row in _read(pathlib.Path(path), benchmark, data)]
    if not rows:
        raise UserError(f"{', '.join(paths)}: no generations in there")
    examples = [row.example for row in rows]
    _, groups = np.unique([json.dumps(row.group) for row in rows], return_inverse=True)
    scored = []
    for protocol in benchmarks.PROTOCOLS:
        if protocol == "d1" and benchmark.task not in d1.TASKS:
            continue
        # d1's scorer reads raw text, others what stands before the end.
        whole = protocol == "d1"
        texts = [row.text if whole else _END.split(row.text, maxsplit=1)[0] for row in rows]
        for measure, count in benchmarks.counts_of(benchmark, protocol).items():
            right, total = (np.bincount(groups, weights=x) for x in count(texts, examples))
            estimate = statistics.estimate(right, total)
            scored.append(Scored(f"{protocol}, {measure}", len(texts), estimate))
    return scored


def _read(path: pathlib.Path, benchmark: Benchmark, data: str | None) -> list[_Read]:
    try:
        raw = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {_LAYOUTS}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text; expected {_LAYOUTS}") from None
    try:
        try:
            whole = json.loads(raw)
        except ValueError:
            whole = None
        if isinstance(whole, dict) and "generations" in whole:
            found = [_of_d1(row, benchmark.task) for row in whole["generations"]]
            return [_Read(*pair, (str(path), i)) for i, pair in enumerate(found)]
        rows = [json.loads(line) for line in raw.split("\n") if line.strip()]
        thinking = _thinking(path)
        problems = benchmarks.load_examples(benchmark, data, "own")
        key = tasks.get_task(benchmark.task).key
        by_key = {key(example): example for example in problems}
        return [_of_ours(row, problems, by_key, key, thinking) for row in rows]
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
        raise UserError(f"{path} is malformed; expected {_LAYOUTS}") from None


def _thinking(path: pathlib.Path) -> bool:
    """Whether completions begin within a thought, as eval.json beside them says."""
    settings = path.parent / generations.SETTINGS
    found = json.loads(settings.read_bytes()) if settings.is_file() else {}
    return bool(found.get("thinking") or found.get("opens_thought"))


def _of_ours(
    row: dict,
    problems: list[dict],
    by_key: dict[str, dict],
    key: Callable[[dict], str],
    thinking: bool,
) -> _Read:
    if "problem" in row:
        example = by_key[row["problem"]]
    else:
        if row["index"] not in range(len(problems)):
            raise ValueError("no such problem")
        example = problems[row["index"]]
    answer = after_thinking(_text(row["completion"]), thinking)
    # The end is what d1's scorer looks for and others cut off.
    ended = "" if row.get("truncated") else d1.END
    return _Read(answer + ended, example, (key(example),))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("no text")
    return value


def _of_d1(row: dict[str, Any], task: str) -> tuple[str, dict]:
    """A generation of d1's files, where the right answer stands beside it."""
    text, truth, question = _text(row["generations"]), row["ground_truth"], _text(row["question"])
    if task == "gsm8k":
        # Where d1 has not found the right answer, it has null: then none is right.
        number = None if truth is None else common.number(f"{truth:.10f}")
        return text, {"question": question, "answer": f"#### {number}"}
    if task == "math":
        return text, {"problem": question, "answer": _text(truth)}
    if task == "countdown":
        numbers, target = truth
        if not all(type(x) is int for x in (*numbers, target)):
            raise ValueError("no problem")
        return text, {"numbers": numbers, "target": target}
    if task == "sudoku":
        solution = _text(truth)
        if not _PUZZLE.fullmatch(solution):
            raise ValueError("no solution")
        return text, {"puzzle": _PUZZLE.findall(question)[0], "solution": solution}
    raise ValueError(f"d1 has no {task}")
