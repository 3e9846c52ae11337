"""GSM8K: word problems of primary school whose answer is a number (arXiv 2110.14168).

Example: {"question": "What is half of 6?", "answer": "It is 6/2 = 3.\\n#### 3"}, as published: the
answer is a solution, with the number after its last ####. Training problems come from a file too.
The interface is described in `ais_jax.tasks`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from ais_jax.tasks import common, files
from ais_jax.tasks.final_number import final_number

ALPHABET = common.PRINTABLE
Options = common.FileOptions

_FILE_LINE = '{"question": "What is half of 6?", "answer": "It is 6/2 = 3.\\n#### 3"}'


def key(example: dict) -> str:
    """The question without its whitespace."""
    return "".join(example["question"].split())


def prompt(example: dict, style: str = "compact") -> str:
    """The question and what to do, see `common.boxed_prompt`."""
    return common.boxed_prompt(example["question"], style)


def demonstration(example: dict) -> str:
    """The final number alone: "\\boxed{3}"."""
    return f"\\boxed{{{common.printable(_final_text(example['answer']))}}}"


def careless(example: dict) -> str:
    """The first number of the question, or 0, as an answer."""
    return common.first_number_boxed(example["question"])


def reward(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """1 where the final number is that of the example, exactly, else 0.

    It is the last number of the last `\\boxed{...}`; without one, of the text after the last
    `<answer>`; without that, the number on the line after the last ####; else the last number of
    the completion. $ and %, LaTeX spacing, units and trailing points are ignored:

    * 1,024 and 56.0 and 3/4 are numbers, and so is \\frac{3}{4} that stands alone; 5,6 and 1e3 and
      digits other than 0 to 9 are not, and then there is no answer, whatever stands before.
    * An exponent, an index and what is under a root are no numbers either.
    * A minus at a number is its sign, unless a letter, digit or closing bracket touches it.
    * The last 1000 characters are searched, and a number has 100 at most.

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
    value = final_number(completion) if isinstance(completion, str) else None
    return value is not None and value == common.number(gold(example))


def gold(example: dict) -> str:
    """The right number as text: "3"."""
    return _final_text(example["answer"])


def extract(completion: str) -> str | None:
    """The number that a completion gives, as a quotient: "3", "1/3"; None if it gives none."""
    value = final_number(completion) if isinstance(completion, str) else None
    return None if value is None else str(value)


def _final_text(solution: str) -> str:
    return solution.rpartition("####")[2].strip()


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
    question, answer = files.text_of(row, "question"), files.text_of(row, "answer")
    if "####" not in answer or common.number(_final_text(answer)) is None:
        raise ValueError("no final number")
    return {"question": question, "answer": answer}


def _read(path: str | os.PathLike) -> files.Reading:
    return files.read_most(path, _read_row, _FILE_LINE)


generate = common.generate_from_file("task.gsm8k.path", _read, key)
