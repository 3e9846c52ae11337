"""What saving a checkpoint costs a training run.

    python benchmarks/checkpoint_overhead.py configs/countdown_tiny.yaml --saves 12

The job of the config saves every 10 steps. A save holds the run up until the state is copied, and
may slow the steps after it until it is written, by no more than that takes. Both together, of one
save in 50 steps, bound the share that saving has of a run.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import tempfile
import threading
import time

import jax
import numpy as np
from common import show

from ais_jax import config as config_lib
from ais_jax import memory
from ais_jax.train import checkpoint, data, loop, setup

EVERY, SHARE = 10, 50


def measure(path: str, saves: int) -> dict[str, float]:
    """Milliseconds by name; the last one is per cent."""
    config = config_lib.load(path, ["warmup.steps=0"])
    folder = pathlib.Path(tempfile.mkdtemp())
    run = setup.build_run(config, folder)
    examples = setup.build_examples(config)
    iterator = data.batches(examples.train, config.grpo.prompts, seed=0)
    state = run.programs.init_state(run.programs.init_trainable(jax.random.key(0)))
    copy, _ = run.programs.refit(run.join(state.params), None)
    held, written, steps = [], [], []

    def await_written(began: float) -> None:
        while manager.is_saving_in_progress():
            time.sleep(1e-3)
        written.append(time.perf_counter() - began)

    with checkpoint.manager(folder) as manager:
        keeper = checkpoint.Keeper(manager, sys.exit)
        for step in range(1, (saves + 1) * EVERY + 1):
            began = time.perf_counter()
            state, copy, _, _ = loop.train_step(
                run, state, copy, step, iterator, config.composition.judge, None
            )
            steps.append(time.perf_counter() - began)
            if step % EVERY == 0:
                began = time.perf_counter()
                keeper.save(checkpoint.Saved(step, state, {"iterator": iterator.get_state()}))
                held.append(time.perf_counter() - began)
                threading.Thread(target=await_written, args=(time.perf_counter(),)).start()
        keeper.finish()
    # The first ones compile.
    step, hold, write = (1e3 * float(np.median(x)) for x in (steps[EVERY:], held[1:], written[1:]))
    return {
        "step": step,
        "a save holds the run up for": hold,
        "and is written, beside the next steps, in": write,
        f"share of {SHARE} steps at most, %": 100 * (hold + write) / (SHARE * step),
    }


def main() -> None:
    memory.keep_freed()  # as the command line does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--saves", type=int, default=12)
    args = parser.parse_args()
    command = f"benchmarks/checkpoint_overhead.py {args.config} --saves {args.saves}"
    show(f"Saving checkpoints: {args.config}", command, measure(args.config, args.saves))


if __name__ == "__main__":
    main()
