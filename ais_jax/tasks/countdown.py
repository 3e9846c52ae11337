"""Countdown: reach a target from given numbers, each used exactly once, by + - * /.

Example: {"numbers": [3, 7, 5], "target": 16, "solution": "3*7-5"}; a solution is not needed to be
judged. The interface is described in `ais_jax.tasks`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ais_jax.tasks import common, files
from ais_jax.tasks.expression import ExpressionError, parse

ALPHABET = "0123456789+-*/() =:"

_LARGEST_NUMBER = 1000  # four of them keep exact fractions within int64
_RESULT = re.compile(r"\s*(-?[0-9]{1,18})\s*", re.ASCII)
_EXPRESSION = re.compile(
    r"[-(]*[0-9](?:(?:[0-9() +*/×·÷−-]|\\times|\\div|\\cdot)*[0-9)])?(?: *= *-?[0-9]+)?"
)
_LISTED = re.compile(r"\[([0-9]+(?:(?: +|, *)[0-9]+)*)\]")  # a list in a CSV file
_WHOLE = re.compile(r"\s*[0-9]{1,9}\s*", re.ASCII)
_FILE_LINE = (
    '{"input": "30,100,93", "output": "23"} or {"numbers": [30, 100, 93], "target": 23}, with '
    'whole numbers and, if there is a "solution", one that is right'
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which problems are generated.

    Raises:
      ValueError: a value is out of range.
    """

    numbers: int = common.option(3, "how many numbers are given, 3 or 4")
    min_number: int = common.option(1, "smallest number")
    max_number: int = common.option(9, "largest number, at most 1000")
    max_target: int = common.option(99, "largest target; the smallest is 1")
    operators: str = common.option("+-*", "operators of the demonstrations, some of +-*/")
    listed_in_order: bool = common.option(
        False, "list the numbers in the order of a solution, which is easier"
    )
    parentheses: bool = common.option(False, "demonstrations may need parentheses")

    def __post_init__(self):
        common.check_option("numbers", self.numbers, self.numbers in (3, 4), "3 or 4")
        common.check_option("min_number", self.min_number, self.min_number >= 1, "at least 1")
        common.check_option(
            "max_number",
            self.max_number,
            self.min_number <= self.max_number <= _LARGEST_NUMBER,
            f"from min_number={self.min_number} to {_LARGEST_NUMBER}",
        )
        common.check_option("max_target", self.max_target, self.max_target >= 1, "at least 1")
        common.check_option(
            "operators",
            self.operators,
            0 < len(self.operators) == len(set(self.operators) & set("+-*/")),
            "one or more of + - * /, each once",
        )


def generate(
    count: int,
    seed: int,
    split: str = "train",
    options: Options = Options(),
    exclude: Collection[str] = (),
) -> list[dict]:
    """Random solvable problems with a solution each, no two with the same prompt.

    Expressions are drawn uniformly and their values become targets. A problem is therefore as
    likely as it has solutions, and all its solutions are equally likely to be the one shown.
    Solutions have no superfluous parentheses and no negative literals.

    Args:
      count: how many.
      seed: same arguments, same examples, on every platform.
      split: "train" or "heldout"; they share no `key`, whatever the other arguments.
      options: which problems.
      exclude: keys that must not appear, such as those of evaluation files.

    Raises:
      ValueError: fewer than `count` exist, or an argument is out of range.
    """
    return common.take(
        functools.partial(_examples, options),
        size=math.prod(_shape(options)),
        count=count,
        seed=seed,
        split=split,
        exclude=exclude,
        key=key,
        prompt=prompt,
        remedy="raise max_number or max_target, or allow more operators, numbers or parentheses",
    )


def _examples(options: Options, chunks: Iterable[np.ndarray]) -> Iterator[dict]:
    """An example for each index whose expression has a target in range."""
    templates, orders = _templates(options), np.array(_orders(options))
    for indices in chunks:
        order, template, *digits = np.unravel_index(indices, _shape(options))
        used = np.stack(digits, axis=1) + options.min_number
        targets = _targets(templates, template, used, options.max_target)
        rows = np.flatnonzero(targets)
        listed = np.take_along_axis(used[rows], orders[order[rows]], axis=1)
        columns = (listed, targets[rows], used[rows], template[rows])
        for numbers, target, terms, t in zip(*(x.tolist() for x in columns), strict=True):
            solution = templates[t].text.format(*terms)
            yield {"numbers": numbers, "target": target, "solution": solution}


def _shape(options: Options) -> tuple[int, ...]:
    """An index chooses the order of listing, the template, and the numbers in it."""
    span = options.max_number - options.min_number + 1
    return (len(_orders(options)), len(_templates(options))) + (span,) * options.numbers


def _orders(options: Options) -> list[tuple[int, ...]]:
    places = range(options.numbers)
    return [tuple(places)] if options.listed_in_order else list(itertools.permutations(places))


class _Template(NamedTuple):
    """An expression with places for numbers, used from left to right."""

    tree: int | tuple  # a place, or (operator, left tree, right tree)
    text: str  # format string


@functools.cache
def _templates(options: Options) -> tuple[_Template, ...]:
    """All expressions that are written differently, without superfluous parentheses."""
    trees = _trees(0, options.numbers, options.operators)
    templates = [_Template(tree, _write(tree)) for tree in trees]
    return tuple(t for t in templates if options.parentheses or "(" not in t.text)


def _trees(first: int, last: int, operators: str) -> Iterator[int | tuple]:
    if last - first == 1:
        yield first
    for middle in range(first + 1, last):
        for op in operators:
            for left in _trees(first, middle, operators):
                for right in _trees(middle, last, operators):
                    # a+(b-c) and a*(b/c) are (a+b)-c and (a*b)/c with superfluous parentheses.
                    associative = isinstance(right, tuple) and op + right[0] in (
                        "++", "+-", "**", "*/"
                    )  # fmt: skip
                    if not associative:
                        yield op, left, right


def _write(tree: int | tuple) -> str:
    if isinstance(tree, int):
        return f"{{{tree}}}"
    op, left, right = tree
    first, second = _write(left), _write(right)
    if op in "*/" and isinstance(left, tuple) and left[0] in "+-":
        first = f"({first})"
    if isinstance(right, tuple) and (op in "*/" or right[0] in "+-"):
        second = f"({second})"
    return first + op + second


def _targets(
    templates: Sequence[_Template], template: np.ndarray, used: np.ndarray, max_target: int
) -> np.ndarray:
    """[n] int64: value of each row's expression, 0 where it is not a whole number in range."""
    numerator = np.zeros(len(used), np.int64)
    denominator = np.zeros(len(used), np.int64)
    by_template = np.argsort(template, kind="stable")
    bounds = np.searchsorted(template[by_template], np.arange(len(templates) + 1))
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rows = by_template[start:stop]
        numerator[rows], denominator[rows] = _fractions(templates[i].tree, used[rows])
    divisor = np.where(denominator == 0, 1, denominator)
    quotient = numerator // divisor
    exact = (denominator != 0) & (quotient * divisor == numerator)
    return np.where(exact & (quotient >= 1) & (quotient <= max_target), quotient, 0)


def _fractions(tree: int | tuple, used: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators [n] int64; denominator 0 after a division by zero."""
    if isinstance(tree, int):
        return used[:, tree], np.ones(len(used), np.int64)
    op, left, right = tree
    (a, b), (c, d) = _fractions(left, used), _fractions(right, used)
    if op == "+":
        return a * d + c * b, b * d
    if op == "-":
        return a * d - c * b, b * d
    if op == "*":
        return a * c, b * d
    return a * d, b * c * (d != 0)


def key(example: dict) -> str:
    """Sorted numbers and target."""
    return f"{','.join(map(str, sorted(example['numbers'])))}={example['target']}"


def prompt(example: dict, style: str = "compact") -> str:
    """The problem as text: "3 7 5=16:" in compact style."""
    common.check_style(style)
    numbers, target = example["numbers"], example["target"]
    if style == "compact":
        return f"{' '.join(map(str, numbers))}={target}:"
    return (
        f"Write an arithmetic expression that equals {target} and uses each of the numbers "
        f"{', '.join(map(str, numbers))} exactly once and no other number. You may add, subtract, "
        "multiply and divide with + - * / and group with parentheses. Think it through first. "
        "Then write the expression alone, without an equals sign, between <answer> and </answer>, "
        "like this: <answer>(1+2)*4</answer>"
    )


def demonstration(example: dict) -> str:
    """The example's own solution.

    Raises:
      ValueError: it has none.
    """
    if "solution" not in example:
        raise ValueError(f"the Countdown problem {key(example)} has no solution to demonstrate")
    return example["solution"]


def careless(example: dict) -> str:
    """An answer of the right form that does not look at the target: the sum of the numbers."""
    return "+".join(map(str, example["numbers"]))


def reward(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """1 where the answer uses the given numbers once each and equals the target, else 0.

    The answer is what `common.answer` finds, or of a sentence without a mark its last expression; a
    closing "= 16" is tolerated if it is the target.

    Args:
      completions: B texts.
      examples: B problems; "numbers" and "target" are read.

    Returns:
      [B] float32.

    Raises:
      ValueError: the lengths differ.
    """
    return common.judge(completions, examples, _is_right)


def _is_right(completion: object, example: dict) -> bool:
    if _solves(common.answer(completion), example):
        return True
    said = common.prose_answer(completion, _EXPRESSION)
    return said is not None and _solves(said, example)


def _solves(text: str, example: dict) -> bool:
    body, equals, result = text.partition("=")
    if equals:
        match = _RESULT.fullmatch(result)
        if match is None or int(match[1]) != example["target"]:
            return False
    try:
        value, numbers = parse(body)
    except ExpressionError:
        return False
    return value == example["target"] and sorted(numbers) == sorted(example["numbers"])


def score(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, 1 where the problem is solved: the same as `reward`."""
    return reward(completions, examples)


def load(path: str | os.PathLike) -> list[dict]:
    """Problems of a file with "input" and "output", "nums" and "target", or this module's own keys.

    Raises:
      UserError: the file cannot be read or a line is malformed.
    """
    return files.read_lines(path, _read_row, _FILE_LINE)


def _read_row(row: dict) -> dict:
    # Where rows differ, Parquet has a null and CSV nothing in the columns that a row lacks.
    if row.get("input") is not None:
        numbers = [_whole(x) for x in str(row["input"]).split(",")]
        return {"numbers": numbers, "target": _whole(row.get("output"))}
    given = row.get("nums") if row.get("numbers") is None else row["numbers"]
    listed = _LISTED.fullmatch(given) if isinstance(given, str) else None
    if listed:
        given = re.split("[, ]+", listed[1])
    if not isinstance(given, list) or not given:
        raise ValueError("no numbers")
    example: dict = {"numbers": [_whole(x) for x in given], "target": _whole(row.get("target"))}
    if row.get("solution") not in (None, ""):
        example["solution"] = str(row["solution"])
        if not _solves(example["solution"], example):
            raise ValueError("not a solution")
    return example


def _whole(value: object) -> int:
    if isinstance(value, bool) or not _WHOLE.fullmatch(str(value)):
        raise ValueError(f"{value!r} is not a whole number")
    return int(str(value))
