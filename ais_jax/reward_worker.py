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
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np


def main() -> None:
    """Answers until standard input ends."""
    # Ctrl-C and preemption reach the whole group of processes; the trainer decides what follows.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_die_with, args=(int(sys.argv[1]),), daemon=True).start()
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


def _die_with(parent: int) -> None:
    """A function that hangs must not outlive a trainer that was killed."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


if __name__ == "__main__":
    main()
