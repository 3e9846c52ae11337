"""How d1's evaluation finds answers and counts those that are right, see `d1`."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ais_jax.tasks import common, d1_math, gsm8k, sudoku

TASKS = ("gsm8k", "math", "countdown", "sudoku")
END = "<|endoftext|>"
"""What must stand behind a completion that has ended, where its end token is not shown."""

REACH = 40_000
_ENDS = ("<|eot_id|>", END)
_NUMBER = re.compile(r"-?\d+\.?\d*")
_BOX = "\\boxed{"
_FENCED = re.compile(r"```([\d\s]++)```")
_GRID_IN_TAG = re.compile(r"(\d{16})\s*</answer>")
_GRID = re.compile(r"\b(\d{16})\b")
_ARITHMETIC = re.compile(r"[\d+\-*/().\s]+")
_LONGEST_EQUATION = 300
TOLERANCE = 1e-5
_MOST_BITS = 8192


def counts(
    task: str, completions: Sequence[str], examples: Sequence[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """What d1's evaluation counts as right, and of how many; its accuracy is the pooled share.

    Args:
      task: one of `TASKS`.
      completions: B texts, with their end token shown or with `END` where they have ended: d1 takes
        the answer of a Sudoku that has neither ended nor closed its tag from elsewhere.
      examples: B problems.

    Returns:
      right [B] int64 and total [B] int64: 1, of Sudoku the blank cells.

    Raises:
      ValueError: the lengths differ, or d1 has no such task.
    """
    check_task(task)
    common.check_batch(completions, examples)
    judge = {"gsm8k": _number_is_right, "math": _formula_is_right, "countdown": _equation_is_right}
    pairs = [
        (text[:REACH] if isinstance(text, str) else "", example)
        for text, example in zip(completions, examples, strict=True)
    ]
    if task in judge:
        right = [judge[task](text, example) for text, example in pairs]
        return np.array(right, np.int64), np.ones(len(pairs), np.int64)
    cells = [sudoku.right_cells(_grid(text), example) for text, example in pairs]
    return tuple(np.array([c[i] for c in cells], np.int64) for i in (0, 1))  # type: ignore[return-value]


def score(task: str, completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, the share of each completion that is right; arguments as of `counts`."""
    right, total = counts(task, completions, examples)
    return (right / np.maximum(total, 1)).astype(np.float32)


def check_task(task: str) -> None:
    """Raises ValueError unless d1 has the task."""
    if task not in TASKS:
        raise ValueError(f"d1 has no task {task!r}, only {', '.join(TASKS)}")


def _number_is_right(text: str, example: dict) -> bool:
    right = common.number(gsm8k.gold(example))
    # d1 finds no answer that is negative, of which GSM8K's test set has two.
    return right is not None and right >= 0 and _number(text) == float(right)


def _number(text: str) -> float | None:
    """Of the first box that has one the first number, or else the last one of the first tag."""
    for content in map(str.strip, _boxes(text)):
        if content.strip("."):
            value = _as_float(content, 0)
            if value is not None:
                return value
    return _as_float((_tagged(text) or "").strip(), -1)


def _boxes(text: str) -> Iterator[str]:
    """What each box holds up to the first brace that closes, within a line."""
    for line in text.split("\n"):
        start = line.find(_BOX)
        while start >= 0:
            end = line.find("}", start)
            if end < 0:
                break
            yield line[start + len(_BOX) : end]
            start = line.find(_BOX, end)


def _as_float(text: str, which: int) -> float | None:
    """The whole text as a number, or else the first (0) or last (-1) number in it."""
    try:
        return float(text)
    except ValueError:
        numbers = _NUMBER.findall(text)
        return float(numbers[which]) if numbers else None


def _tagged(text: str) -> str | None:
    """What the first <answer> holds, if it is closed."""
    _, tag, rest = text.partition("<answer>")
    found, closing, _ = rest.partition("</answer>")
    return found if tag and closing else None


def _formula_is_right(text: str, example: dict) -> bool:
    answer = d1_math.boxed(text) or None
    if answer is None:
        tagged = _tagged(text)
        answer = None if tagged is None else tagged.strip()
    return answer is not None and d1_math.equivalent(answer, example["answer"])


def _equation_is_right(text: str, example: dict) -> bool:
    equation = d1_math.boxed(text)
    if equation is None:
        tagged = _tagged(text)
        equation = text if tagged is None else tagged.strip()
    for written, meant in (("\\div", "/"), ("\\times", "*"), ("\\cdot", "*")):
        equation = equation.replace(written, meant)
    equation = _left_side(equation)
    if not uses(equation, example["numbers"]):
        return False
    return reaches(value_of(equation), example["target"])


def reaches(value: complex | None, target: int) -> bool:
    """Whether a value is the target, but for rounding."""
    try:
        return value is not None and abs(value - target) < TOLERANCE
    except OverflowError:  # of a complex number
        return False


def _left_side(equation: str) -> str:
    """What stands left of the first "=" between an expression and a number; else all of it."""
    for match in re.finditer("=[0-9. ]", equation):
        start = match.start()
        while start and equation[start - 1] in "0123456789+-*/() ":
            start -= 1
        if start < match.start():
            return equation[start : match.start()].strip()
    return equation


def uses(equation: str, numbers: Sequence[int]) -> bool:
    """Whether the runs of digits are the numbers, in any order."""
    found = re.findall(r"\d+", equation)
    if len(found) != len(numbers) or any(len(digits) > 20 for digits in found):
        return False
    return sorted(map(int, found)) == sorted(numbers)


_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def value_of(equation: str) -> complex | None:
    """What Python's arithmetic gives for an expression; None if it is none, or too large.

    d1 has Python evaluate it, so decimals, // and ** are part of its grammar. Here the expression
    is parsed alone, and powers are bounded to 8,192 bits.
    """
    if len(equation) > _LONGEST_EQUATION or not _ARITHMETIC.fullmatch(equation):
        return None
    try:
        return _compute(ast.parse(equation.strip(), mode="eval").body)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None


def _compute(node: ast.expr) -> complex:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.UnaryOp):
        return _OPERATORS[type(node.op)](_compute(node.operand))
    if not isinstance(node, ast.BinOp):  # a call or a tuple: digits and parentheses can write them
        raise ValueError("no arithmetic")
    left, right = _compute(node.left), _compute(node.right)
    if isinstance(node.op, ast.Pow) and _is_huge(left, right):
        raise ValueError("a power too large")
    try:
        return _OPERATORS[type(node.op)](left, right)
    except TypeError:  # complex numbers have no floor
        raise ValueError("no arithmetic") from None


def _is_huge(base: complex, exponent: complex) -> bool:
    """Whether a power has too many bits; what is no whole number overflows by itself."""
    if not isinstance(base, int) or not isinstance(exponent, int) or abs(base) < 2:
        return False
    return exponent * base.bit_length() > _MOST_BITS


def _grid(text: str) -> str:
    """The digits that d1 takes for a solution: of the first of five places that has some text."""
    for found in (_fenced, _tagged_or_ended, _behind_tag, _grid_in_tag, _any_grid):
        solution = found(text)
        if solution and solution.strip():
            return "".join(solution.split())
    return ""


def _fenced(text: str) -> str | None:
    """Digits alone between two ``` behind the first <answer>."""
    _, tag, rest = text.partition("<answer>")
    match = _FENCED.search(rest) if tag else None
    return match and match[1]


def _tagged_or_ended(text: str) -> str | None:
    """Behind the first <answer>, up to its end or that of the completion."""
    _, tag, rest = text.partition("<answer>")
    return _until(rest, (*_ENDS, "</answer>")) if tag else None


def _behind_tag(text: str) -> str | None:
    _, tag, rest = text.partition("</answer>")
    if not tag:
        return None
    ended = _until(rest, _ENDS)
    return rest if ended is None else ended


def _grid_in_tag(text: str) -> str | None:
    match = _GRID_IN_TAG.search(text)
    return match and match[1]


def _any_grid(text: str) -> str | None:
    match = _GRID.search(text)
    return match and match[1]


def _until(text: str, ends: Sequence[str]) -> str | None:
    """What stands before the first of `ends`; None if none is there."""
    places = [place for place in map(text.find, ends) if place >= 0]
    return text[: min(places)] if places else None
