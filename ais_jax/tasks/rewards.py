"""What a completion is rewarded for: terms by name, weighed and added up.

    task     the task's own reward, such as the share of a Sudoku's blank cells that are right
    correct  1 where the problem is solved
    boxed    1 where the last \\boxed{...} is the right answer as math-verify finds; of tasks whose
             answer is a number or a formula
    format   1 where exactly one answer is marked, by \\boxed{...} or by <answer>...</answer>
    d1       d1's rewards for the task (arXiv 2504.12216), each recorded as d1/<its name>

Any other name is a function (completions, examples) -> float rewards [B], as "module:function" or
"module.function". Nothing here needs jax.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ais_jax import tasks
from ais_jax.tasks import common, d1, verify

RewardFn = Callable[[Sequence[str], Sequence[dict]], np.ndarray]

OWN = ("task", "correct", "boxed", "format", "d1")
_HEAVIEST = 1e6
_FUNCTION = re.compile(r"[\w.]+:[\w.]+|\w+(?:\.\w+)+")


class Malformed(Exception):
    """A reward function returned something else than a number for each completion."""


class Judged(NamedTuple):
    """What a batch of completions is worth."""

    rewards: np.ndarray  # [B] float32
    scores: np.ndarray  # [B] float32, 1 where the problem is solved
    terms: dict[str, np.ndarray]  # [B] float32 each, without their weights


@dataclasses.dataclass(frozen=True)
class Composition:
    """Terms of a reward and their weights.

    Attributes:
      task: name of the task.
      weights: (name, weight) of each term.
      d1_compat: d1's rewards with the bugs of its published code.

    Raises:
      ValueError: a term is unknown or not for this task, or there is none that counts.
    """

    task: str
    weights: tuple[tuple[str, float], ...] = (("task", 1.0),)
    d1_compat: bool = False

    def __post_init__(self):
        for name, weight in self.weights:
            if name not in OWN and not _FUNCTION.fullmatch(name):
                raise ValueError(
                    f"{name!r} is no reward: take {', '.join(OWN)}, or a function of yours as "
                    "module:function"
                )
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise ValueError(f"{name}={weight!r} must be a number, the weight of this reward")
            if not abs(weight) <= _HEAVIEST:
                raise ValueError(f"{name}={weight} must be finite, and at most {_HEAVIEST:g}")
        if not any(weight for _, weight in self.weights):
            raise ValueError("no reward has a weight other than 0: name one, such as correct: 1.0")
        names = [name for name, _ in self.weights]
        if "boxed" in names and not hasattr(tasks.get_task(self.task), "gold"):
            raise ValueError(
                f"boxed compares with the one right answer, and {self.task} has none: take correct"
            )
        if "d1" in names and self.task not in d1.TASKS:
            raise ValueError(f"d1 has no rewards for {self.task}, only for {', '.join(d1.TASKS)}")

    @functools.cached_property
    def terms(self) -> tuple[tuple[str, float], ...]:
        """(name, weight) of each column of `columns` but the last; those of d1 one by one."""
        found: list[tuple[str, float]] = []
        for name, weight in self.weights:
            if name == "d1":
                found += [(f"d1/{x}", weight) for x in d1.rewards(self.task, self.d1_compat)]
            else:
                found.append((name, weight))
        return tuple(found)

    @functools.cached_property
    def functions(self) -> list[tuple[str, RewardFn]]:
        """(name, function) of each term. Raises what importing a user's module raises."""
        task = tasks.get_task(self.task)
        of_d1 = d1.rewards(self.task, self.d1_compat) if self.task in d1.TASKS else {}
        known: dict[str, RewardFn] = {
            "task": task.reward,
            "correct": task.score,
            "format": marked_once,
            **{f"d1/{name}": function for name, function in of_d1.items()},
        }
        if hasattr(task, "gold"):
            known["boxed"] = functools.partial(boxed, task.gold)
        return [(name, known.get(name) or resolve(name)) for name, _ in self.terms]

    def columns(self, completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
        """[B, K + 1] float32: each of the K terms without its weight, then the task's score.

        Raises:
          Malformed: a function returned something else than one number a completion.
          Exception: what a function raised.
        """
        functions = [*self.functions, ("correct", tasks.get_task(self.task).score)]
        found = [
            checked_column(function(completions, examples), len(examples), name)
            for name, function in functions
        ]
        return np.stack(found, axis=1)

    def judge(self, completions: Sequence[str], examples: Sequence[dict]) -> Judged:
        """Both in one, in this process. Raises like `columns`."""
        return self.judged(self.columns(completions, examples))

    def judged(self, columns: np.ndarray) -> Judged:
        """What `columns` [B, K + 1] say."""
        weights = np.array([weight for _, weight in self.terms], np.float64)
        names = [name for name, _ in self.terms]
        terms = {name: columns[:, i] for i, name in enumerate(names)}
        return Judged((columns[:, :-1] @ weights).astype(np.float32), columns[:, -1], terms)


def of_mapping(task: str, weights: Mapping[str, Any], d1_compat: bool) -> Composition:
    """A composition from names and weights as a configuration holds them. Raises like it."""
    return Composition(task, tuple(weights.items()), d1_compat)


def checked_column(values: Any, count: int, name: str) -> np.ndarray:
    """`values` as [count] float32.

    Raises:
      Malformed: they are something else.
    """
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise Malformed(f"{name} must return {count} numbers, one a completion ({error})") from None
    if array.shape != (count,):
        raise Malformed(
            f"{name} must return {count} numbers, one a completion; it returned shape {array.shape}"
        )
    return array


@functools.cache
def resolve(name: str) -> Callable:
    """The function that "module:function" or "module.function" stands for."""
    module, colon, attribute = name.partition(":")
    if not colon:
        module, _, attribute = name.rpartition(".")
    function = operator.attrgetter(attribute)(importlib.import_module(module))
    if not callable(function):
        raise TypeError(f"{attribute} cannot be called")
    return function


def boxed(
    gold: Callable[[dict], str], completions: Sequence[str], examples: Sequence[dict]
) -> np.ndarray:
    """[B] float32, 1 where math-verify takes the last `\\boxed{...}` for the right answer.

    Args:
      gold: gives the right answer of an example.
      completions: B texts.
      examples: B problems.

    Raises:
      ValueError: the lengths differ.
    """
    common.check_batch(completions, examples)
    found = [common.last_boxed(c) if isinstance(c, str) else None for c in completions]
    return verify.equal([gold(example) for example in examples], found).astype(np.float32)


def marked_once(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, 1 where exactly one answer is marked.

    That is a single `\\boxed{...}` whose braces are closed, or a single `<answer>` that is closed,
    or the one in the other.

    Raises:
      ValueError: the lengths differ.
    """
    return common.judge(completions, examples, lambda text, _: _is_marked_once(text))


def _is_marked_once(text: object) -> bool:
    if not isinstance(text, str):
        return False
    boxes, opened, closed = (text.count(x) for x in ("\\boxed{", "<answer>", "</answer>"))
    tagged = opened == closed == 1 and text.index("<answer>") < text.index("</answer>")
    if not boxes:
        return tagged
    inside = not opened and not closed
    if tagged:
        start = text.index("\\boxed{")
        inside = text.index("<answer>") < start < text.index("</answer>")
    return boxes == 1 and inside and common.last_boxed(text) is not None
