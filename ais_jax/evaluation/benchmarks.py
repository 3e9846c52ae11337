"""Which problems a benchmark poses, in whose words, and how completions are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from ais_jax import tasks
from ais_jax.errors import UserError
from ais_jax.tasks import common, d1

PROTOCOLS = ("own", "d1")
GENERATED = "generated"

Counts = tuple[np.ndarray, np.ndarray]  # right [B] and total [B] of each completion
Count = Callable[[Sequence[str], Sequence[dict]], Counts]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A published set of problems.

    Attributes:
      title: as tables name it.
      task: name of the task.
      file: the published test file, looked up under ./ and $AIS_SHARED; None where problems are
        only generated.
      hub: the same as a Hugging Face dataset; None where there is none.
    """

    title: str
    task: str
    file: str | None = None
    hub: str | None = None


# Rows: GSM8K 1,319; MATH500 500; AMC of 2022 and 2023 83, of 2023 alone 40; AIME 30 a year; d1's
# Countdown 256; d1's Sudoku 500, of which it evaluates 256; SPG's Sudoku 256, whose solutions are
# those of no training puzzle.
BENCHMARKS = {
    "gsm8k": Benchmark("GSM8K", "gsm8k", "data/gsm8k/test.jsonl", "hf:openai/gsm8k:main:test"),
    "math500": Benchmark(
        "MATH500", "math", "data/math/math500_test.jsonl", "hf:HuggingFaceH4/MATH-500:test"
    ),
    "amc": Benchmark(
        "AMC 22-23",
        "amc",
        "data/amc/amc83_understand_r1_zero.jsonl",
        "hf:AI-MO/aimo-validation-amc:train",
    ),
    "amc23": Benchmark("AMC 23", "amc", "data/amc/amc23_test.jsonl"),
    "aime25": Benchmark("AIME25", "aime25", "data/aime/aime25_test.jsonl"),
    "aime24": Benchmark(
        "AIME24", "aime25", "data/aime/aime24_test.jsonl", "hf:HuggingFaceH4/aime_2024:train"
    ),
    "countdown": Benchmark("Countdown", "countdown", "data/countdown/countdown_cd3_test.jsonl"),
    "sudoku": Benchmark("Sudoku", "sudoku", "data/sudoku/4x4_test_sudoku.csv"),
    "sudoku_spg": Benchmark("Sudoku (SPG)", "sudoku", "data/sudoku/spg_test_sudoku_split_new.csv"),
    "arithmetic": Benchmark("Arithmetic", "arithmetic"),
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of a name.

    Raises:
      UserError: there is none.
    """
    if name not in BENCHMARKS:
        raise UserError(f"--task {name!r} is unknown; choose of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def load_examples(
    benchmark: Benchmark, source: str | None, protocol: str, options: object | None = None
) -> list[dict]:
    """The problems, in the order of their file.

    Args:
      benchmark: which.
      source: a file, `hf:NAME[:CONFIG]:SPLIT`, or "generated:N"; None is the published file.
      protocol: "d1" takes 256 of d1's Sudoku puzzles, those that it drew.
      options: of the generator; None are the task's defaults.

    Raises:
      UserError: there is no such file, it is malformed, or the task has no generator.
    """
    task = tasks.get_task(benchmark.task)
    name = source or benchmark.file or f"{GENERATED}:1024"
    kind, _, count = name.partition(":")
    if kind == GENERATED:
        return _generated(task, count, options)
    found = common.locate(name)
    if found is None:
        hub = f", or --data {benchmark.hub}" if benchmark.hub else ""
        made = not issubclass(task.Options, common.FileOptions)
        generate = f", or --data {GENERATED}:N" if made else ""
        raise UserError(
            f"{name} is no file, neither as it stands nor under $AIS_SHARED: name the problems of "
            f"{benchmark.title} by --data FILE{hub}{generate}"
        )
    examples = task.load(found)
    if protocol == "d1" and source is None and benchmark.file == BENCHMARKS["sudoku"].file:
        # d1's script draws them so, after numpy.random.seed(42).
        drawn = np.random.RandomState(42).choice(len(examples), 256, replace=False)
        return [examples[i] for i in drawn]
    return examples


def _generated(task: ModuleType, count: str, options: object | None) -> list[dict]:
    if issubclass(task.Options, common.FileOptions):
        raise UserError(f"--data {GENERATED}:{count}: the problems of this task are not generated")
    if not count.isdecimal() or len(count) > 9 or int(count) < 1:
        raise UserError(f"--data {GENERATED}:{count} must end with how many problems, such as 1024")
    try:
        return task.generate(int(count), 0, "heldout", options or task.Options())
    except ValueError as error:
        raise UserError(f"--data {GENERATED}:{count}: {error}") from None


def counts_of(benchmark: Benchmark, protocol: str) -> dict[str, Count]:
    """What is counted of completions, by measure; the first is the headline.

    Raises:
      UserError: the protocol has no scorer for the benchmark.
    """
    task = tasks.get_task(benchmark.task)
    if protocol == "d1":
        if benchmark.task not in d1.TASKS:
            raise UserError(
                f"d1's protocol has no {benchmark.title}, only {', '.join(d1.TASKS)}: take "
                "--protocol own"
            )
        name = "cell accuracy" if benchmark.task == "sudoku" else "accuracy"
        return {name: lambda texts, examples: d1.counts(benchmark.task, texts, examples)}

    def solved(texts: Sequence[str], examples: Sequence[dict]) -> Counts:
        return task.score(texts, examples).astype(int), np.ones(len(texts), int)

    found: dict[str, Count] = {"accuracy": solved}
    if hasattr(task, "cells"):
        found["cell accuracy"] = task.cells
    return found


def with_ends(texts: Sequence[str], truncated: Sequence[bool], protocol: str) -> list[str]:
    """Completions as the protocol's scorer reads them: d1's looks for their end."""
    if protocol != "d1":
        return list(texts)
    return [text if cut else text + d1.END for text, cut in zip(texts, truncated, strict=True)]
