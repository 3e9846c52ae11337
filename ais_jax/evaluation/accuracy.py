"""Accuracy of a policy on a list of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import jax
import numpy as np
from jax.sharding import Mesh

from ais_jax.models import Params
from ais_jax.sampling import Policy, sampling_copy
from ais_jax.sampling.prompts import Prompter

Evaluator = Callable[[Params, list[dict]], dict[str, float]]


def measures(task: ModuleType) -> dict[str, Callable]:
    """What is measured of a task's completions by name: a number, or one a completion."""
    return {"accuracy": task.score, **getattr(task, "MEASURES", {})}


def build_evaluator(
    policy: Policy,
    prompter: Prompter,
    mesh: Mesh,
    batch_size: int,
    max_new_tokens: int,
    seed: int = 0,
    between: Callable[[], object] = lambda: None,
) -> Evaluator:
    """A function (params, examples) -> {"accuracy", "sampled_accuracy", ...}.

    `accuracy` is the share of examples solved by greedy decoding, `sampled_accuracy` by one sample
    at the policy's own temperature; further ones are the task's `MEASURES`. Prompts may be longer
    than those of training. `between` is called now and then; what it raises ends the evaluation.
    """
    sampling = policy.sampling.resized(max_new_tokens)
    if sampling.diffusion is None:
        # What is evaluated is the policy, not the approximations that make its rollouts fast.
        sampling = dataclasses.replace(sampling, slots=batch_size, kv_cache="none")
    policies = {
        prefix: dataclasses.replace(
            policy, sampling=dataclasses.replace(sampling, temperature=temperature)
        )
        for prefix, temperature in (("", 0.0), ("sampled_", sampling.temperature))
    }

    def complete(
        at: Policy, params: Params, examples: list[dict], fitting: Prompter, key: jax.Array
    ) -> list[str]:
        # An autoregressive sampler shares out its slots itself.
        size = batch_size if at.sampling.diffusion else len(examples)
        texts: list[str] = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            padded = part + [part[-1]] * (size - len(part))
            keys = jax.random.split(jax.random.fold_in(key, start), size)
            between()
            rollout = at.rollout(params, *fitting.prompts(padded), keys, mesh, between)
            texts += prompter.answers(prompter.completions(rollout))[: len(part)]
        return texts

    platform = mesh.devices.flat[0].platform
    lay_out = jax.jit(lambda params: sampling_copy(policy.model, params, "none", platform))

    def evaluate(params: Params, examples: list[dict]) -> dict[str, float]:
        if platform == "cpu":  # elsewhere memory is dearer than the time it would save
            params = lay_out(params)
        fitting, key = prompter.fitting(examples), jax.random.key(seed)
        found = {
            prefix: complete(at, params, examples, fitting, key) for prefix, at in policies.items()
        }
        return {
            prefix + name: float(np.mean(measure(texts, examples)))
            for prefix, texts in found.items()
            for name, measure in measures(prompter.task).items()
        }

    return evaluate
