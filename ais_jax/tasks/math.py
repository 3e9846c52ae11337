"""MATH: competition problems whose answer is a LaTeX expression (arXiv 2103.03874).

Example: {"problem": "Evaluate $i^6+i^{16}+i^{-26}$.", "answer": "-1"}. Training problems come from
a file too. The interface is described in `ais_jax.tasks`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from ais_jax.tasks import common, files, verify
from ais_jax.tasks.final_number import final_number, whole_number

ALPHABET = common.PRINTABLE
Options = common.FileOptions

_LONGEST = 1000
_INTEGER = re.compile("-?[0-9]+")
_HEDGING = re.compile(
    r"_|=.*=|\[|\\lbrack|[0-9](?:\s|~|\\[ ,;:]|\\q?quad)+[0-9]",
    re.DOTALL,
)
_LETTERED = r"\\(?:text(?:bf|it|rm)?|mathrm|mathbf|mbox) *\{([^{}]*)\}"
_SAME = [  # in this order
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\!\s*|(?<=[0-9])\\,(?=[0-9])|\\?[$%]|\\(?:left|right)(?![A-Za-z])"), ""),
    (re.compile(r"\^ *(?:\\circ(?![A-Za-z])|\{ *\\circ *\})|\\degree(?![A-Za-z])|°"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s"), " "),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
]
_UNIT = re.compile(rf"(.*[^ ]) *{_LETTERED}(?: *\^ *(?:[0-9]|\{{[0-9]\}}))?")
_TEXT = re.compile(_LETTERED)
_NAME = re.compile(r"[A-Za-z](?: *\( *[A-Za-z] *\))? *=(.*)")
_CHOICE = re.compile(r"\( *([A-Z]) *\)")
_SPACE = re.compile(r"(?<![0-9]) +| +(?![0-9])")  # 1 2 is not 12
_SHORT = [
    (re.compile(r"(\\frac|\\sqrt) *([0-9A-Za-z]|\\pi(?![A-Za-z]))"), r"\1{\2}"),
    (re.compile(r"(\\frac\{[^{}]*\}) *([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"([\^_])\{([0-9A-Za-z])\}"), r"\1\2"),
]
_DECIMAL = re.compile(r"([0-9]*)\.([0-9]+)")
_FILE_LINE = (
    '{"problem": "What is half of $x$?", "solution": "It is $\\\\boxed{x/2}$.", "answer": "x/2"}, '
    "with an answer, or a solution that ends with it in \\boxed{}"
)


def key(example: dict) -> str:
    """The problem without its whitespace."""
    return "".join(example["problem"].split())


def prompt(example: dict, style: str = "compact") -> str:
    """The problem and what to do, see `common.boxed_prompt`."""
    return common.boxed_prompt(example["problem"], style)


def demonstration(example: dict) -> str:
    """The answer alone: "\\boxed{x/2}"."""
    return f"\\boxed{{{common.printable(example['answer'])}}}"


def careless(example: dict) -> str:
    """The first number of the problem, or 0, as an answer."""
    return common.first_number_boxed(example["problem"])


def reward(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """1 where the answer is that of the example, else 0.

    It is what `common.marked` finds, or else the line after the last ####, which must be the last
    line or a number, of 1000 characters at most. It is right if it is the same number; or the same
    text once both are written in one way:

    * without spaces, $ and %, degree signs, \\left and \\right, a final point, a unit in \\text{}
      after the rest, a name before it (x=5, f(x)=5), and brackets of a single capital letter;
    * \\text{up} as up, \\dfrac12 as \\frac{1}{2}, \\sqrt2 as \\sqrt{2}, x^{2} as x^2, .50 as 0.5;

    or if math-verify takes it for the right one, see `verify.equal`. A number is a decimal, with
    commas between thousands or without, or a quotient of two.

    Where nothing is marked and the right answer is a number, the last number of the completion is
    the answer, see `final_number`.

    Args:
      completions: B texts.
      examples: B problems; "answer" is read.

    Returns:
      [B] float32.

    Raises:
      ValueError: the lengths differ.
      UserError: math-verify cannot be started.
    """
    common.check_batch(completions, examples)
    golds = [gold(example) for example in examples]
    given = [_given(completion) for completion in completions]
    right = np.zeros(len(golds), np.float32)
    for i, (answer, answer_of_prose) in enumerate(given):
        if answer is not None:
            right[i] = _agree(answer, golds[i])
        elif answer_of_prose is not None:
            right[i] = answer_of_prose == _normal(golds[i]).number
    unclear = [
        i for i, (answer, _) in enumerate(given) if not right[i] and _is_open(answer, golds[i])
    ]
    right[unclear] = verify.equal([golds[i] for i in unclear], [given[i][0] for i in unclear])
    return right


def _is_open(answer: str | None, right: str) -> bool:
    """Whether an answer that does not agree may be equal: two integers, most answers, are not.

    Of a right answer that is a number math-verify would also find what hedges: 10_2 for 10, x=3=2
    for 2, [4,4] for 4, and 1 1 for 2 and for 11.
    """
    if answer is None or len(answer) > _LONGEST:
        return False
    if all(map(_INTEGER.fullmatch, (answer, right))):
        return False
    return not (common.number(right) is not None and _HEDGING.search(answer))


def _given(completion: object) -> tuple[str | None, Fraction | None]:
    """(the answer that is marked, or else the last number)."""
    if not isinstance(completion, str):
        return None, None
    answer = common.marked(completion)
    if answer is None:
        line, more = common.hashed(completion) or (None, False)
        # Where more follows it is a heading, unless it is a number.
        answer = None if line and more and whole_number(line) is None else line
    return answer, None if answer is not None else final_number(completion)


def gold(example: dict) -> str:
    """The right answer: "\\frac{1}{2}"."""
    return example["answer"]


def extract(completion: str) -> str | None:
    """The answer that a completion gives, in one form for what `reward` takes for the same text or
    number; None if it gives none.
    """
    answer, number = _given(completion)
    if answer is not None and len(answer) <= _LONGEST:
        normal = _normal(answer)
        return (normal.text or None) if normal.number is None else str(normal.number)
    return None if number is None else str(number)


class _Answer(NamedTuple):
    text: str
    number: Fraction | None


def _agree(answer: str | None, right: str) -> bool:
    if answer is None or len(answer) > _LONGEST:
        return False
    a, b = _normal(answer), _normal(right)
    return bool(a.text) and (a.text == b.text or (a.number is not None and a.number == b.number))


def _normal(text: str) -> _Answer:
    """An answer in the form that `reward` compares."""
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    text = text.strip().rstrip(" .")
    unit = _UNIT.fullmatch(text)
    text = _TEXT.sub(r"\1", unit[1] if unit else text).strip().rstrip(" .")
    for pattern in (_NAME, _CHOICE):
        match = pattern.fullmatch(text)
        text = match[1].strip() if match else text
    for pattern, replacement in _SHORT:
        text = pattern.sub(replacement, text)
    plain = _DECIMAL.sub(_shortest, _SPACE.sub("", text))
    return _Answer(plain, common.number(text))


def _shortest(decimal: re.Match) -> str:
    whole, places = decimal[1] or "0", decimal[2].rstrip("0")
    return f"{whole}.{places}" if places else whole


def score(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, 1 where the problem is solved: the same as `reward`."""
    return reward(completions, examples)


def load(path: str | os.PathLike) -> list[dict]:
    """Problems of a file of JSON lines, CSV or Parquet; where there is no answer, of the solution.

    Raises:
      UserError: the file cannot be read or a line is malformed.
    """
    return files.read_lines(path, _read_row, _FILE_LINE)


def read_training(path: str | os.PathLike) -> files.Reading:
    """Training problems of a file, of which a few rows may be malformed. Raises like `load`."""
    return files.read_most(path, _read_row, _FILE_LINE)


def _read_row(row: dict) -> dict:
    problem = files.text_of(row, "problem")
    answer = _answer_of(row).strip()
    if not _agree(common.marked(f"\\boxed{{{answer}}}"), answer):
        raise ValueError("an answer that no completion can give")
    return {"problem": problem, "answer": answer}


def _answer_of(row: dict) -> str:
    """The answer of a file's row: AMC's are numbers such as 27.0, NeMo's are called expected."""
    for name in ("answer", "expected_answer"):
        value = row.get(name)
        if isinstance(value, float):
            value = int(value) if value.is_integer() else value
            if common.number(str(value)) is None:
                raise ValueError("no number")
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if value is not None:
            return files.text_of(row, name)
    return common.last_boxed(files.text_of(row, "solution")) or ""


generate = common.generate_from_file("task.math.path", read_training, key)
