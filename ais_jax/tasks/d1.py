"""The protocol of d1 (Zhao et al., arXiv 2504.12216): prompts, evaluation, training rewards.

Those who compare with d1 pose its prompts (`d1_prompts`), find answers as it does, and report its
measures. What judges is written anew: it gives the published outcome, item by item, and evaluates
nothing as code. The first 40,000 characters of a completion are read; what is no string scores 0.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ais_jax.tasks import common, d1_math, gsm8k
from ais_jax.tasks.d1_prompts import prompt
from ais_jax.tasks.expression import ExpressionError, parse

__all__ = ["END", "PREFILL", "TASKS", "Rewards", "counts", "prompt", "rewards", "score"]

TASKS = ("gsm8k", "math", "countdown", "sudoku")
PREFILL = "<reasoning>"
"""How the reply begins in evaluation."""

END = "<|endoftext|>"
"""What must stand behind a completion that has ended, where its end token is not shown."""

Rewards = dict[str, Callable[[Sequence[str], Sequence[dict]], np.ndarray]]

_REACH = 40_000
_CELLS = 16
_ENDS = ("<|eot_id|>", END)
_NUMBER = re.compile(r"-?\d+\.?\d*")
_BOX = "\\boxed{"
_FENCED = re.compile(r"```([\d\s]++)```")
_GRID_IN_TAG = re.compile(r"(\d{16})\s*</answer>")
_GRID = re.compile(r"\b(\d{16})\b")
_ARITHMETIC = re.compile(r"[\d+\-*/().\s]+")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_LONGEST_EQUATION = 300
_TOLERANCE = 1e-5
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
    _check_task(task)
    common.check_batch(completions, examples)
    judge = {"gsm8k": _number_is_right, "math": _formula_is_right, "countdown": _equation_is_right}
    pairs = [
        (text[:_REACH] if isinstance(text, str) else "", example)
        for text, example in zip(completions, examples, strict=True)
    ]
    if task in judge:
        right = [judge[task](text, example) for text, example in pairs]
        return np.array(right, np.int64), np.ones(len(pairs), np.int64)
    cells = [_right_cells(_grid(text), example) for text, example in pairs]
    return tuple(np.array([c[i] for c in cells], np.int64) for i in (0, 1))  # type: ignore[return-value]


def score(task: str, completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, the share of each completion that is right; arguments as of `counts`."""
    right, total = counts(task, completions, examples)
    return (right / np.maximum(total, 1)).astype(np.float32)


def _check_task(task: str) -> None:
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
    if not _uses(equation, example["numbers"]):
        return False
    value = _value(equation)
    return value is not None and abs(value - example["target"]) < _TOLERANCE


def _left_side(equation: str) -> str:
    """What stands left of the first "=" between an expression and a number; else all of it."""
    for match in re.finditer("=[0-9. ]", equation):
        start = match.start()
        while start and equation[start - 1] in "0123456789+-*/() ":
            start -= 1
        if start < match.start():
            return equation[start : match.start()].strip()
    return equation


def _uses(equation: str, numbers: Sequence[int]) -> bool:
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


def _value(equation: str) -> complex | None:
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


def _right_cells(grid: str, example: dict) -> tuple[int, int]:
    """(blank cells that are right, blank cells); short grids are filled up, long ones cut."""
    puzzle, solution = example["puzzle"], example["solution"]
    blanks = [i for i, cell in enumerate(puzzle) if cell == "0"]
    padded = grid[:_CELLS].ljust(_CELLS, "0") if grid else " " * _CELLS
    return sum(padded[i] == solution[i] for i in blanks), len(blanks)


def rewards(task: str, compat: bool) -> Rewards:
    """d1's training rewards of a task by name; their sum is its reward.

    Args:
      task: one of `TASKS`.
      compat: as published. Otherwise with these mended: numbers are compared by value ("1,000" is
        1000), reasoning may have several lines, \\\\boxed is recognized, Countdown gives 0.1 for a
        wrong result of the right numbers alone, and Sudoku nothing to a grid that is not whole or
        changes a given cell.

    Returns:
      Functions (completions [B], examples [B]) -> [B] float32.

    Raises:
      ValueError: d1 has no such task.
    """
    _check_task(task)
    found = _REWARDS[task]
    return {name: functools.partial(_each, reward, compat) for name, reward in found.items()}


def _each(
    reward: Callable[[str, dict, bool], float],
    compat: bool,
    completions: Sequence[str],
    examples: Sequence[dict],
) -> np.ndarray:
    common.check_batch(completions, examples)
    pairs = zip(completions, examples, strict=True)
    return np.array(
        [
            reward(text[:_REACH], example, compat) if isinstance(text, str) else 0.0
            for text, example in pairs
        ],
        np.float32,
    )


def _last_answer(text: str) -> str:
    """Behind the last <answer>, up to the first </answer>; all of the text without tags."""
    return text.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def _correct_number(text: str, example: dict, compat: bool) -> float:
    answer, right = _last_answer(text), gsm8k.gold(example)
    if compat:
        return 2.0 * (answer == right)
    value = common.number(answer)
    return 2.0 * (value is not None and value == common.number(right))


def _is_whole(text: str, example: dict, compat: bool) -> float:
    answer = _last_answer(text)
    whole = answer.isdigit() if compat else _WHOLE.fullmatch(answer.replace(",", ""))
    return 0.5 if whole else 0.0


def _strict_format(text: str, example: dict, compat: bool) -> float:
    """Both tags on lines of their own and nothing else; as published each with a single line."""
    if compat:
        lines = text.split("\n")
        tags = ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
        return 0.5 * (
            len(lines) in (7, 8)
            and tuple(lines[i] for i in (0, 2, 3, 5)) == tags
            and not any(lines[6:])
        )
    opening, middle = "<reasoning>\n", "\n</reasoning>\n<answer>\n"
    closing = "\n</answer>\n"
    text = text[:-1] if text.endswith(closing + "\n") else text
    place = text.find(middle, len(opening))
    whole = text.startswith(opening) and place >= 0 and text.endswith(closing)
    return 0.5 * (whole and place + len(middle) <= len(text) - len(closing))


def _soft_format(text: str, example: dict, compat: bool) -> float:
    """Begins with both tags, closed; as published each within a line."""
    opening, middle, tag = "<reasoning>", "</reasoning>", "<answer>"
    if not text.startswith(opening):
        return 0.0
    last = text.find("\n") if compat and "\n" in text else len(text)
    place = text.find(middle, len(opening))
    while 0 <= place <= last - len(middle):
        rest = text[place + len(middle) :].lstrip()
        if rest.startswith(tag):
            inside = rest[len(tag) :]
            inside = inside.partition("\n")[0] if compat else inside
            if "</answer>" in inside:
                return 0.5
        place = text.find(middle, place + 1)
    return 0.0


def _xml_count(text: str, example: dict, compat: bool) -> float:
    """An eighth for each tag, less a thousandth for each character behind the last."""
    count = 0.125 * (text.count("<reasoning>\n") == 1)
    count += 0.125 * (text.count("\n</reasoning>\n") == 1)
    if text.count("\n<answer>\n") == 1:
        count += 0.125 - 0.001 * len(text.split("\n</answer>\n")[-1])
    if text.count("\n</answer>") == 1:
        count += 0.125 - 0.001 * (len(text.split("\n</answer>")[-1]) - 1)
    return count


def _correct_formula(text: str, example: dict, compat: bool) -> float:
    # An open box is none: then the text itself is compared.
    answer = d1_math.boxed(text)
    return 2.0 * d1_math.equivalent(text if answer is None else answer, example["answer"])


def _boxed_format(text: str, example: dict, compat: bool) -> float:
    """0.5 for the tag and 0.5 for a box, of which 0.25 are given anyway."""
    _, tag, rest = text.partition("<answer>")
    # As published the tag ends at the next one, and \b is a backspace, which no answer has.
    answer = rest.partition("<answer>")[0].partition("</answer>")[0] if tag else text
    box = "\boxed" if compat else "\\boxed"
    return 0.5 * ((1.0 if tag else 0.0) + (1.0 if box in answer else 0.5))


def _equation(text: str, example: dict, compat: bool) -> float:
    answer = _last_closed(text)
    if answer is None:
        return 0.0
    if not compat:
        return _mended_equation(answer, example)
    value = _value(answer) if _uses(answer, example["numbers"]) else None
    return 1.0 if value is not None and abs(value - example["target"]) < _TOLERANCE else 0.1


def _mended_equation(answer: str, example: dict) -> float:
    try:
        value, numbers = parse(answer)
    except ExpressionError:
        return 0.0
    if sorted(numbers) != sorted(example["numbers"]):
        return 0.0
    return 1.0 if value == example["target"] else 0.1


def _cells(text: str, example: dict, compat: bool) -> float:
    answer = _last_closed(text)
    if answer is None:
        return 0.0
    digits = "".join(c for c in answer if c.isdigit())
    if not compat:
        digits = "".join(answer.split())
        given = zip(example["puzzle"], digits, strict=False)
        if not re.fullmatch("[1-4]{16}", digits) or any(p not in ("0", d) for p, d in given):
            return 0.0
    right, blanks = _right_cells(digits, example)
    return right / blanks if blanks else 0.0


def _last_closed(text: str) -> str | None:
    """What the last <answer> that is closed holds, stripped; None if none is."""
    found, place = None, text.find("<answer>")
    while place >= 0:
        end = text.find("</answer>", place)
        if end < 0:
            break
        found = text[place + len("<answer>") : end].strip()
        place = text.find("<answer>", end)
    return found


_REWARDS: dict[str, dict[str, Callable[[str, dict, bool], float]]] = {
    "gsm8k": {
        "correct": _correct_number,
        "int": _is_whole,
        "strict_format": _strict_format,
        "soft_format": _soft_format,
        "xml_count": _xml_count,
    },
    "math": {"correct": _correct_formula, "format": _boxed_format},
    "countdown": {"equation": _equation},
    "sudoku": {"cells": _cells},
}
