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
    policy: Policy, prompter: Prompter, put: Callable, batch_size: int, seed: int = 0
) -> Evaluator:
    """A function (params, examples) -> {"accuracy", "sampled_accuracy"}.

    `accuracy` is the share of examples solved by greedy decoding, `sampled_accuracy` by one sample
    at the policy's own temperature. It compiles once for all example lists.
    """
    greedy = dataclasses.replace(
        policy, sampling=dataclasses.replace(policy.sampling, temperature=0.0)
    )
    programs = {"accuracy": jax.jit(greedy.rollout), "sampled_accuracy": jax.jit(policy.rollout)}

    def evaluate(params: Params, examples: list[dict]) -> dict[str, float]:
        solved: dict[str, list[float]] = {name: [] for name in programs}
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            padded = part + [part[-1]] * (batch_size - len(part))
            prompts = [put(x) for x in prompter.prompts(padded)]
            keys = put(jax.random.split(jax.random.key(seed + start), batch_size))
            for name, program in programs.items():
                texts = prompter.completions(program(params, *prompts, keys))[: len(part)]
                solved[name].extend(prompter.task.score(texts, part))
        return {name: float(np.mean(values)) for name, values in solved.items()}

    return evaluate
