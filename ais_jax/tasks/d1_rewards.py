"""d1's training rewards, as published or with their bugs mended, see `d1`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np

from ais_jax.tasks import common, d1_math, gsm8k, sudoku
from ais_jax.tasks.d1_counts import REACH, check_task, reaches, uses, value_of
from ais_jax.tasks.expression import ExpressionError, parse

Rewards = dict[str, Callable[[Sequence[str], Sequence[dict]], np.ndarray]]
_WHOLE = re.compile(r"[-+]?[0-9]+")


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
    check_task(task)
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
            reward(text[:REACH], example, compat) if isinstance(text, str) else 0.0
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
    value = value_of(answer) if uses(answer, example["numbers"]) else None
    return 1.0 if reaches(value, example["target"]) else 0.1


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
    right, blanks = sudoku.right_cells(digits, example)
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
