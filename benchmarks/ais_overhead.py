"""What AIS costs beside plain truncated importance sampling, in one run.

    python benchmarks/ais_overhead.py configs/countdown_tiny.yaml --repeats 100

Both sides take one and the same rollout batch of the config's job through scoring and the update.
TIS uses the coefficient 1; AIS measures the batch first and uses the coefficient that comes out.
The two alternate, and each pair gives one difference, so a machine that drifts shifts both.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
import time

import jax
import numpy as np
from common import show

from ais_jax import config as config_lib
from ais_jax.train import collect, data, loop, setup
from ais_jax.train.phases import Phases


def prepare(path: str):
    """A run after its first rollout: (run, state, sampled, seconds of refit and rollout)."""
    config = config_lib.load(path, ["warmup.steps=0"])
    run = setup.build_run(config, pathlib.Path(tempfile.mkdtemp()))
    examples = setup.build_examples(config)
    state = run.programs.init_state(run.programs.init_trainable(jax.random.key(0)))
    iterator = data.batches(examples.train, config.grpo.prompts, seed=0)
    seconds = []
    for i in range(4):  # the first compiles
        began = time.perf_counter()
        copy, _ = jax.block_until_ready(run.programs.refit(state.params, None))
        sampled = collect.sample_groups(
            run, copy, jax.random.key(i), iterator, config.composition.judge, Phases()
        )
        seconds.append(time.perf_counter() - began)
    # Rewards of an untrained policy are all 0; advantages must differ to cost what they cost.
    rewards = np.random.default_rng(0).integers(0, 2, len(sampled.rewards)).astype(np.float32)
    sampled = _with_rewards(sampled, rewards)
    batch, _ = loop.build_batch(run, state, copy, sampled, None, jax.random.key(0))
    return run, state, batch, float(np.median(seconds[1:]))


def _with_rewards(sampled: collect.Sampled, rewards: np.ndarray) -> collect.Sampled:
    return collect.Sampled(**{**vars(sampled), "rewards": rewards})


def measure(path: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of a step, and of what AIS adds to it."""
    run, state, batch, sampling = prepare(path)

    def step(state, adaptive: bool):
        began = time.perf_counter()
        jax.block_until_ready(run.programs.score(state.params, batch.rollout))
        coefficient = 1.0
        if adaptive:
            calibration, measured = run.programs.measure(state.calibration, batch)
            state = state._replace(calibration=calibration)
            coefficient = measured.coefficient
        state, metrics = run.programs.update(
            state, run.frozen, batch, jax.numpy.float32(coefficient)
        )
        jax.block_until_ready((state, metrics))
        return state, time.perf_counter() - began

    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(repeats + 3):
        for adaptive in (True, False) if i % 2 else (False, True):
            state, seconds = step(state, adaptive)
            if i >= 3:
                times[adaptive].append(seconds)
    alone = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(run.programs.measure(state.calibration, batch))
        alone.append(time.perf_counter() - began)
    ais, tis = np.array(times[True]), np.array(times[False])
    step_ms = 1e3 * (sampling + np.median(tis))
    return {
        "step with TIS": step_ms,
        "score and update with TIS": 1e3 * float(np.median(tis)),
        "score and update with AIS": 1e3 * float(np.median(ais)),
        "measuring a batch, alone": 1e3 * float(np.median(alone)),
        "AIS minus TIS, median of pairs": 1e3 * float(np.median(ais - tis)),
        "AIS minus TIS, % of a step": 100 * 1e3 * float(np.median(ais - tis)) / step_ms,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--repeats", type=int, default=100)
    args = parser.parse_args()
    command = f"benchmarks/ais_overhead.py {args.config} --repeats {args.repeats}"
    show(f"AIS against TIS: {args.config}", command, measure(args.config, args.repeats))


if __name__ == "__main__":
    main()
