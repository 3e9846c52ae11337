"""`ais-jax score`: generations that somebody has sampled, through every scorer of a benchmark."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from ais_jax import tasks
from ais_jax.errors import UserError
from ais_jax.evaluation import benchmarks, statistics
from ais_jax.evaluation.benchmarks import Benchmark
from ais_jax.evaluation.statistics import Estimate
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


def rescore(paths: Sequence[str], name: str, data: str | None = None) -> list[Scored]:
    """What every protocol makes of generations, pooled over files.

    Args:
      paths: files in one of two layouts. d1's hold the right answers; of others the problems are
        looked up by their index.
      name: of the benchmark.
      data: where its problems come from instead of the published file.

    Raises:
      UserError: a file cannot be read or is of neither layout.
    """
    benchmark = benchmarks.get_benchmark(name)
    texts: list[str] = []
    examples: list[dict] = []
    for path in paths:
        found = _read(pathlib.Path(path), benchmark, data)
        texts += [text for text, _ in found]
        examples += [example for _, example in found]
    if not texts:
        raise UserError(f"{', '.join(paths)}: no generations in there")
    scored = []
    for protocol in benchmarks.PROTOCOLS:
        if protocol == "d1" and benchmark.task not in d1.TASKS:
            continue
        # d1's scorer reads raw text, others what stands before the end.
        read = texts if protocol == "d1" else [_END.split(text, maxsplit=1)[0] for text in texts]
        for measure, count in benchmarks.counts_of(benchmark, protocol).items():
            found_counts = count(read, examples)
            label = f"{protocol}, {measure}"
            scored.append(Scored(label, len(texts), statistics.estimate(*found_counts)))
    return scored


def _read(path: pathlib.Path, benchmark: Benchmark, data: str | None) -> list[tuple[str, dict]]:
    """(completion, example) of each generation."""
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
            return [_of_d1(row, benchmark.task) for row in whole["generations"]]
        rows = [json.loads(line) for line in raw.splitlines() if line.strip()]
        problems = benchmarks.load_examples(benchmark, data, "own")
        key = tasks.get_task(benchmark.task).key
        by_key = {key(example): example for example in problems}
        return [
            # The end is what d1's scorer looks for and others cut off.
            (
                row["completion"] + ("" if row.get("truncated") else d1.END),
                _example(row, problems, by_key),
            )
            for row in rows
        ]
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        raise UserError(f"{path} is malformed; expected {_LAYOUTS}") from None


def _example(row: dict, problems: list[dict], by_key: dict[str, dict]) -> dict:
    return by_key[row["problem"]] if "problem" in row else problems[row["index"]]


def _of_d1(row: dict[str, Any], task: str) -> tuple[str, dict]:
    """A generation of d1's files, where the right answer stands beside it."""
    text, truth = row["generations"], row["ground_truth"]
    if task == "gsm8k":
        # Where d1 has not found the right answer, it has null: then none is right.
        number = None if truth is None else common.number(f"{truth:.10f}")
        return text, {"question": row["question"], "answer": f"#### {number}"}
    if task == "math":
        return text, {"problem": row["question"], "answer": truth}
    if task == "countdown":
        numbers, target = truth
        return text, {"numbers": numbers, "target": target}
    if task == "sudoku":
        puzzle = _PUZZLE.findall(row["question"])[0]
        return text, {"puzzle": puzzle, "solution": truth}
    raise ValueError(f"d1 has no {task}")
