"""Accuracy of a policy on a list of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np

from ais_jax.models import Params
from ais_jax.sampling import Policy
from ais_jax.sampling.prompts import Prompter

Evaluator = Callable[[Params, list[dict]], dict[str, float]]


def measures(task: ModuleType) -> dict[str, Callable]:
    """What is measured of a task's completions by name: a number, or one a completion."""
    return {"accuracy": task.score, **getattr(task, "MEASURES", {})}


def build_evaluator(
    policy: Policy,
    prompter: Prompter,
    put: Callable,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
) -> Evaluator:
    """A function (params, examples) -> {"accuracy", "sampled_accuracy", ...}.

    `accuracy` is the share of examples solved by greedy decoding, `sampled_accuracy` by one sample
    at the policy's own temperature; further ones are the task's `MEASURES`. Prompts may be longer
    than those of training.
    """
    sampling = policy.sampling.resized(max_new_tokens)
    programs = {}
    for prefix, temperature in (("", 0.0), ("sampled_", sampling.temperature)):
        at = dataclasses.replace(sampling, temperature=temperature)
        programs[prefix] = jax.jit(dataclasses.replace(policy, sampling=at).rollout)

    def evaluate(params: Params, examples: list[dict]) -> dict[str, float]:
        fitting = prompter.fitting(examples)
        texts: dict[str, list[str]] = {prefix: [] for prefix in programs}
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            padded = part + [part[-1]] * (batch_size - len(part))
            prompts = [put(x) for x in fitting.prompts(padded)]
            keys = put(jax.random.split(jax.random.key(seed + start), batch_size))
            for prefix, program in programs.items():
                rollout = program(params, *prompts, keys)
                texts[prefix] += prompter.completions(rollout)[: len(part)]
        return {
            prefix + name: float(np.mean(measure(found, examples)))
            for prefix, found in texts.items()
            for name, measure in measures(prompter.task).items()
        }

    return evaluate
