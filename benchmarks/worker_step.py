"""GRPO steps of this package's trainer: a contestant, see peers/worker.py.

The job is a configuration file, or a model of `rollout_shapes` with prompts of its own; a request
is one step, answered with the seconds that the trainer writes down.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import tempfile
import time
from types import SimpleNamespace

import jax
import numpy as np
from peers.worker import serve
from rollout_shapes import CONFIGS, endless

from ais_jax import config as config_lib
from ais_jax import memory, settings
from ais_jax.compilation import cache_directory
from ais_jax.tasks.rewards import Judged
from ais_jax.train import data, loop, setup
from ais_jax.train.optimizer import grpo_optimizer
from ais_jax.train.programs import build_programs
from ais_jax.train.warmup import warm_up

PHASES = ("quantize", "rollout", "score", "train", "step")


def configured(job: dict):
    """(run, what is trained, iterator of examples, judge) of a configuration file."""
    config = config_lib.load(job["config"])
    run = setup.build_run(config, pathlib.Path(tempfile.mkdtemp()))
    examples = setup.drop_long(setup.build_examples(config), run.prompter)
    params, frozen = setup.initial_params(run)
    run = dataclasses.replace(run, frozen=frozen)
    params, _ = warm_up(run, params, examples.train, cache_directory())
    iterator = data.batches(examples.train, config.grpo.prompts, config.train.seed)
    return run, params, iterator, config.composition.judge


def shaped(job: dict):
    """The same for one group of a prompt's completions, none of which ends early."""
    sizes, rows = dataclasses.asdict(CONFIGS[job["model"]]), job["rows"]
    sections = {
        "model": {"qwen3": sizes},
        "rollout": {"recipe": job["recipe"], "max_new_tokens": job["new_tokens"]},
        "grpo": {"batch_size": rows, "group_size": rows},
        "optimizer": {"learning_rate": 1e-6},
        "train": {"dtype": job["dtype"]},
    }
    config = settings.build(config_lib.Config, sections)
    run = setup.build_run(config, pathlib.Path(tempfile.mkdtemp()))
    policy = dataclasses.replace(
        run.policy, sampling=endless(run.policy.sampling, sizes["vocab_size"])
    )
    prompts = np.array(job["prompts"], np.int32)
    prompter = SimpleNamespace(
        prompts=lambda posed: (prompts[posed], np.ones((1, prompts.shape[1]), bool)),
        completions=lambda rollout: [" ".join(map(str, row)) for row in rollout.tokens.tolist()],
    )
    optimizer, mesh = grpo_optimizer(config), run.programs.mesh
    programs = build_programs(config, policy, optimizer, mesh, run.recipe[0])
    run = dataclasses.replace(run, policy=policy, programs=programs, prompter=prompter)
    params, _ = setup.initial_params(run)
    posed = ([i] for i in itertools.cycle(range(len(prompts))))

    def judge(texts, examples):
        rewards = np.array([len(set(text)) for text in texts], np.float32)
        return Judged(rewards, np.zeros(len(texts), np.float32), {})

    return run, params, posed, judge


def load(job: dict):
    run, params, iterator, judge = (configured if "config" in job else shaped)(job)
    policy = run.policy
    first = dataclasses.replace(policy, sampling=policy.sampling.resized(1))
    state = run.programs.init_state(params)
    copy, _ = run.programs.refit(run.join(state.params), None)
    carry = {"state": state, "copy": copy, "step": 0}
    mesh, size = run.programs.mesh, run.config.grpo.group_size

    def prefill(copy) -> float:
        """Seconds until a rollout of such prompts has its first tokens."""
        posed = next(iterator)
        keys = jax.random.split(jax.random.key(carry["step"]), size * len(posed))
        began = time.perf_counter()
        jax.block_until_ready(first.rollout(copy, *run.prompter.prompts(posed), keys, mesh))
        return time.perf_counter() - began

    def step(request: dict) -> dict:
        carry["step"] += 1
        state, copy, metrics, sampled = loop.train_step(
            run, carry["state"], carry["copy"], carry["step"], iterator, judge, None
        )
        carry.update(state=state, copy=copy)
        seconds = {name: metrics[f"{name}_seconds"] for name in PHASES}
        return {
            "seconds": seconds.pop("step"),
            "tokens": int(np.sum(sampled.rollout.mask)),
            "phases": {**seconds, "prefill": prefill(copy)},
        }

    step({})  # compiles
    return step, {"about": f"ais_jax, jax {jax.__version__}"}


if __name__ == "__main__":
    memory.keep_freed()  # as the command line does
    serve(load)
