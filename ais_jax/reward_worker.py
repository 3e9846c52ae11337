"""A process that computes rewards and nothing else, and may hang or die. No JAX in here.

`ais_jax.train.rewards` runs it as `python -m ais_jax.reward_worker PID-OF-THE-TRAINER`. It reads
requests from standard input and writes answers to standard output, each a line of JSON:

    {"function": "module:name"}                                         to look the function up
    {"function": "module:name", "completions": [...], "examples": [...]}

    {}                         it exists
    {"rewards": [...]}         one number a completion
    {"failed": "..."}          the function raised
    {"malformed": "..."}       it returned something else, or there is no such function
"""

from __future__ import annotations

import functools
import importlib
import json
import operator
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ais_jax import child


def main() -> None:
    """Answers until standard input ends."""
    child.live_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a reward function prints is no answer
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(request: dict) -> dict[str, Any]:
    try:
        function = resolve(request["function"])
    except Exception as error:
        return {"malformed": f"there is no reward function {request['function']}: {_line(error)}"}
    if "completions" not in request:
        return {}
    try:
        rewards = function(request["completions"], request["examples"])
    except Exception as error:
        return {"failed": _line(error)}
    try:
        return {"rewards": np.asarray(rewards, np.float32).tolist()}
    except (TypeError, ValueError) as error:
        return {"malformed": f"the reward function must return numbers ({_line(error)})"}


@functools.cache
def resolve(name: str) -> Callable:
    """The function that "module:name" stands for."""
    module, _, attribute = name.partition(":")
    function = operator.attrgetter(attribute)(importlib.import_module(module))
    if not callable(function):
        raise TypeError(f"{attribute} cannot be called")
    return function


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
