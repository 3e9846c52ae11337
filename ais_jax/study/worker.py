"""A process that runs parts of a study, one after the other: `python -m ais_jax.study.worker`.

Requests and answers are lines of JSON on standard input and output. Whatever else is printed goes
to standard error.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from typing import Any

from ais_jax import child, compilation, memory
from ais_jax.errors import UserError


def main() -> int:
    """Serves requests until standard input ends."""
    memory.keep_freed()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what training shows is for the log
    cores = [int(core) for core in sys.argv[2].split(",") if core]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # before JAX counts them
    child.die_with(int(sys.argv[1]))
    # Every run compiles the same programs, also the small ones.
    compilation.keep(least_seconds=0.0)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _serve(request)
        except UserError as error:
            answer = {"failed": str(error)}
        except SystemExit:  # told to leave; what was done is saved
            return 143
        print(json.dumps(answer), file=answers, flush=True)
    return 0


def _serve(request: dict[str, Any]) -> dict[str, Any]:
    from ais_jax import settings
    from ais_jax.config import Config
    from ais_jax.train.run import train

    if "config" in request:
        return {"summary": train(settings.build(Config, request["config"], "study"))}
    return _measure(request)


def _measure(request: dict[str, Any]) -> dict[str, Any]:
    from ais_jax.study import config, gradients
    from ais_jax.train.phases import Phases

    plan = config.load(request["study"], request["overrides"])
    phases = Phases()
    with phases.listening():
        gradients.measure_along(
            plan,
            request["along"],
            request["seed"],
            pathlib.Path(request["folder"]),
            phases.leave_if_told,
            print,
        )
    return {}


if __name__ == "__main__":
    raise SystemExit(main())
