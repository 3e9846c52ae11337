"""A process that computes rewards and nothing else, and may hang or die. No JAX in here.

`ais_jax.train.rewards` runs it as `python -m ais_jax.reward_worker PID-OF-THE-TRAINER`. It reads
requests from standard input and writes answers to standard output, each a line of JSON:

    {"reward": R}                                         to look it up
    {"reward": R, "completions": [...], "examples": [...]}

R is the "module:function" of a function, or a `Composition` as a list of its fields.

    {}                         it exists
    {"rewards": [...]}         one number a completion, or of a composition a list of its columns
    {"failed": "..."}          a function raised
    {"malformed": "..."}       it returned something else, or there is no such function
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from ais_jax import child
from ais_jax.tasks.rewards import Composition, Malformed, resolve


def main() -> None:
    """Answers until standard input ends."""
    child.live_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a reward function prints is no answer
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


def _answer(request: dict) -> dict[str, Any]:
    reward = request["reward"]
    try:
        function = _function(json.dumps(reward))
    except Exception as error:
        shown = reward if isinstance(reward, str) else ", ".join(name for name, _ in reward[1])
        return {"malformed": f"there is no reward function {shown}: {_line(error)}"}
    if "completions" not in request:
        return {}
    try:
        found = function(request["completions"], request["examples"])
    except Malformed as error:
        return {"malformed": f"the reward function {error}"}
    except Exception as error:
        return {"failed": _line(error)}
    try:
        return {"rewards": np.asarray(found, np.float32).tolist()}
    except (TypeError, ValueError) as error:
        return {"malformed": f"the reward function must return numbers ({_line(error)})"}


@functools.cache
def _function(reward: str) -> Callable:
    """What computes a reward, from its JSON."""
    found = json.loads(reward)
    if isinstance(found, str):
        return resolve(found)
    task, weights, d1_compat = found
    composition = Composition(task, tuple((name, weight) for name, weight in weights), d1_compat)
    _ = composition.functions  # says where there is none
    return composition.columns


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    main()
