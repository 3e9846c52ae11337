"""Accuracy of a policy on a list of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import numpy as np

from ais_jax.models import Params
from ais_jax.sampling import Policy
from ais_jax.sampling.prompts import Prompter

Evaluator = Callable[[Params, list[dict]], dict[str, float]]


def build_evaluator(
    policy: Policy,
    prompter: Prompter,
    put: Callable,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
) -> Evaluator:
    """A function (params, examples) -> {"accuracy", "sampled_accuracy"}.

    `accuracy` is the share of examples solved by greedy decoding, `sampled_accuracy` by one sample
    at the policy's own temperature. Prompts may be longer than those of training.
    """
    sampling = dataclasses.replace(policy.sampling, max_new_tokens=max_new_tokens)
    programs = {}
    for name, temperature in (("accuracy", 0.0), ("sampled_accuracy", sampling.temperature)):
        at = dataclasses.replace(sampling, temperature=temperature)
        programs[name] = jax.jit(dataclasses.replace(policy, sampling=at).rollout)

    def evaluate(params: Params, examples: list[dict]) -> dict[str, float]:
        fitting = prompter.fitting(examples)
        solved: dict[str, list[float]] = {name: [] for name in programs}
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            padded = part + [part[-1]] * (batch_size - len(part))
            prompts = [put(x) for x in fitting.prompts(padded)]
            keys = put(jax.random.split(jax.random.key(seed + start), batch_size))
            for name, program in programs.items():
                texts = prompter.completions(program(params, *prompts, keys))[: len(part)]
                solved[name].extend(prompter.task.score(texts, part))
        return {name: float(np.mean(values)) for name, values in solved.items()}

    return evaluate
