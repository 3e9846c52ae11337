"""What saving a checkpoint costs a training run.

    python benchmarks/checkpoint_overhead.py configs/countdown_tiny.yaml --saves 12

The job of the config saves every 10 steps. A save holds the run up until the state is copied, and
may slow the steps after it while it is written; those are compared with the later ones before the
next save. The share is that of one save in 50 steps.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import platform
import sys
import tempfile
import time

import jax
import numpy as np

from ais_jax import config as config_lib
from ais_jax import memory
from ais_jax.train import checkpoint, data, loop, setup

EVERY, SLOWED, SHARE = 10, 4, 50


def measure(path: str, saves: int) -> dict[str, float]:
    """Milliseconds by name; the last one is per cent."""
    config = config_lib.load(path, ["warmup.steps=0"])
    folder = pathlib.Path(tempfile.mkdtemp())
    run = setup.build_run(config, folder)
    examples = setup.build_examples(config)
    iterator = data.batches(examples.train, config.grpo.prompts, seed=0)
    state = run.programs.init_state(run.programs.init_trainable(jax.random.key(0)))
    copy, _ = run.programs.refit(run.join(state.params), None)
    held, steps = [], []
    with checkpoint.manager(folder) as manager:
        keeper = checkpoint.Keeper(manager, sys.exit)
        for step in range(1, (saves + 1) * EVERY + 1):
            began = time.perf_counter()
            state, copy, _, _ = loop.train_step(
                run, state, copy, step, iterator, run.prompter.task.reward, None
            )
            steps.append(time.perf_counter() - began)
            if step % EVERY == 0:
                began = time.perf_counter()
                keeper.save(checkpoint.Saved(step, state, {"iterator": iterator.get_state()}))
                held.append(time.perf_counter() - began)
        keeper.finish()
    after = np.median(np.reshape(steps[EVERY:], (saves, EVERY)), axis=0)  # the first compile
    undisturbed = float(np.median(after[SLOWED:]))
    slower = float(after[:SLOWED].sum() - SLOWED * undisturbed)
    hold = float(np.median(held[1:]))
    return {
        "step": 1e3 * undisturbed,
        "a save holds the run up for": 1e3 * hold,
        f"the {SLOWED} steps after it take longer by, together": 1e3 * slower,
        f"share of {SHARE} steps, %": 100 * (hold + slower) / (SHARE * undisturbed),
    }


def main() -> None:
    memory.keep_freed()  # as the command line does
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--saves", type=int, default=12)
    args = parser.parse_args()
    device = jax.devices()[0]
    print(f"# Saving checkpoints: {args.config}\n")
    print(f"`python benchmarks/checkpoint_overhead.py {args.config} --saves {args.saves}`")
    print(f"on {device.device_kind}, {platform.machine()}, jax {jax.__version__}, "
          f"{datetime.date.today()}\n")  # fmt: skip
    print("| | ms (last row: %) |\n|---|---|")
    for name, value in measure(args.config, args.saves).items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
