"""Arithmetic: the value of a short expression of whole numbers by + - *, without parentheses.

Example: {"problem": "7*8", "answer": 56}. The interface is described in `ais_jax.tasks`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from ais_jax.tasks import common, files
from ais_jax.tasks.expression import parse

ALPHABET = "0123456789+-*="

_LARGEST_NUMBER = 9999  # four of them multiply to 16 digits, and int64 counts the problems
_MOST_DIGITS = 18
_REACH = 1000
_PROBLEM = re.compile(r"(?:0|[1-9][0-9]*)(?:[-+*](?:0|[1-9][0-9]*))+")
_SIGNED_PRODUCT = re.compile(r"(-?)\+?([0-9*]+)")
_WORD = re.compile(r"[\w.,]+")
_INTEGER = re.compile(r"(0|[1-9][0-9]*|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.0+)?[.,]*")
_MINUS_SIGNS = ("-", "−", "–")
_AFTER_OPERATOR = re.compile(r"[0-9)][ \t]*(?:[-−–+*/×·÷^]|\\(?:times|cdot|div))[-−–+*/×·÷^(\s]*\Z")
_FILE_LINE = (
    '{"problem": "7*8", "answer": 56}, with whole numbers joined by + - * and the answer that is '
    "right"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which problems are generated.

    Raises:
      ValueError: a value is out of range.
    """

    min_number: int = common.option(0, "smallest number, at least 0")
    max_number: int = common.option(9, "largest number, at most 9999")
    operators: str = common.option("+-*", "operators, some of +-*; with - answers may be negative")
    terms: int = common.option(2, "how many numbers a problem has, 2 to 4")

    def __post_init__(self):
        common.check_option("min_number", self.min_number, self.min_number >= 0, "at least 0")
        common.check_option(
            "max_number",
            self.max_number,
            self.min_number <= self.max_number <= _LARGEST_NUMBER,
            f"from min_number={self.min_number} to {_LARGEST_NUMBER}",
        )
        common.check_option(
            "operators",
            self.operators,
            0 < len(self.operators) == len(set(self.operators) & set("+-*")),
            "one or more of + - *, each once",
        )
        common.check_option("terms", self.terms, self.terms in (2, 3, 4), "2, 3 or 4")


def generate(
    count: int,
    seed: int,
    split: str = "train",
    options: Options = Options(),
    exclude: Collection[str] = (),
) -> list[dict]:
    """Random problems, all different, each as likely as any other.

    Of the default options there are 300, both splits together.

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
        size=math.prod(map(len, _symbols(options))),
        count=count,
        seed=seed,
        split=split,
        exclude=exclude,
        key=key,
        prompt=prompt,
        remedy="raise max_number or terms, or allow more operators",
    )


def _symbols(options: Options) -> list[Sequence[str]]:
    """What may stand in each place of a problem: numbers, operators, numbers and so on."""
    numbers = [str(n) for n in range(options.min_number, options.max_number + 1)]
    return [numbers, *(options.operators, numbers) * (options.terms - 1)]


def _examples(options: Options, chunks: Iterable[np.ndarray]) -> Iterator[dict]:
    """The example of each index; an index chooses a symbol for every place."""
    symbols = _symbols(options)
    shape = tuple(map(len, symbols))
    for indices in chunks:
        for choice in np.stack(np.unravel_index(indices, shape), axis=1).tolist():
            problem = "".join(texts[i] for texts, i in zip(symbols, choice, strict=True))
            yield {"problem": problem, "answer": int(parse(problem).value)}


def key(example: dict) -> str:
    """The problem with terms and factors sorted, as text, where the order does not matter.

    Example:
      >>> key({"problem": "7-5*2+3", "answer": 0})
      '3+7-2*5'
    """
    added: list[str] = []
    subtracted: list[str] = []
    for sign, product in _SIGNED_PRODUCT.findall(example["problem"]):
        factors = "*".join(sorted(product.split("*")))
        (subtracted if sign else added).append(factors)
    return "-".join(["+".join(sorted(added)), *sorted(subtracted)])


def prompt(example: dict, style: str = "compact") -> str:
    """The problem as text: "7*8=" in compact style."""
    common.check_style(style)
    if style == "compact":
        return f"{example['problem']}="
    spaced = re.sub(r"[-+*]", r" \g<0> ", example["problem"])
    return f"What is {spaced}? Answer with the number alone."


def demonstration(example: dict) -> str:
    """The answer."""
    return str(example["answer"])


def careless(example: dict) -> str:
    """An answer that stops reading at the first operator: the first number.

    It is right where the rest changes nothing, as in 7*1 or 7-0, or where the first factor is 0:
    in 39 of the 300 problems of the default options, and in 1.3% with numbers up to 99.
    """
    return re.split(r"[-+*]", example["problem"], maxsplit=1)[0]


def reward(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """1 where the final integer is the answer, else 0.

    It is the last number in the last 1000 characters of what `common.answer` finds:

    * 1,024 and 56.0 are integers; 56.5, 056, 1e3, digits other than 0 to 9 and more than 18 digits
      are not, and then there is no answer, whatever stands before.
    * A minus before it is its sign, unless a number or ")" is left of that on the same line.
    * The last operand of an expression, such as 4 in "8-4", is no answer: repeating a problem would
      else solve some.

    Args:
      completions: B texts.
      examples: B problems; "answer" is read.

    Returns:
      [B] float32.

    Raises:
      ValueError: the lengths differ.
    """
    return common.judge(completions, examples, _is_right)


def _is_right(completion: object, example: dict) -> bool:
    return _final_integer(common.answer(completion)) == example["answer"]


def _final_integer(text: str) -> int | None:
    """The integer that `reward` describes, or None."""
    found = common.last_number_word(text[-_REACH:], _WORD, len(text) > _REACH)
    if found is None:
        return None
    match, before = _INTEGER.fullmatch(found[1]), found[0].rstrip(" \t")
    if match is None or _AFTER_OPERATOR.search(before):
        return None
    digits = match[1].replace(",", "")
    if len(digits) > _MOST_DIGITS:
        return None
    return -int(digits) if before.endswith(_MINUS_SIGNS) else int(digits)


def score(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, 1 where the problem is solved: the same as `reward`."""
    return reward(completions, examples)


def load(path: str | os.PathLike) -> list[dict]:
    """Problems of a file of JSON lines, CSV or Parquet.

    Raises:
      UserError: the file cannot be read or a line is malformed.
    """
    return files.read_lines(path, _read_row, _FILE_LINE)


def _read_row(row: dict) -> dict:
    problem, answer = row.get("problem"), row.get("answer")
    if not isinstance(problem, str) or not _PROBLEM.fullmatch(problem):
        raise ValueError("not a problem")
    if isinstance(answer, str) and re.fullmatch("-?[0-9]{1,18}", answer):  # as CSV has it
        answer = int(answer)
    if type(answer) is not int or answer != parse(problem).value:
        raise ValueError("not the answer")
    if abs(answer) >= 10**_MOST_DIGITS:
        raise ValueError("an answer that no completion can give")
    return {"problem": problem, "answer": answer}
