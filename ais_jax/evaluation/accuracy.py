"""Accuracy of a policy on a list of examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from ais_jax.models import Params
from ais_jax.sampling import Policy, sampling_copy
from ais_jax.sampling.prompts import Prompter


class Evaluator(Protocol):
    """What `build_evaluator` returns."""

    def __call__(self, params: Params, examples: list[dict], samples: int = 1) -> dict[str, float]:
        """The measures of a policy; with several `samples` of a problem also their pass@k."""


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
    """A function (params, examples, samples) -> {"accuracy", "sampled_accuracy", ...}.

    `accuracy` is the share of examples solved by greedy decoding, `sampled_accuracy` the mean share
    of `samples` at the policy's own temperature; further ones are the task's `MEASURES`. Of several
    samples `pass_at_<samples>` is the share of examples that at least one of them solves. Prompts
    may be longer than those of training. `between` is called now and then; what it raises ends the
    evaluation.
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
        at: Policy,
        params: Params,
        examples: list[dict],
        fitting: Prompter,
        key: jax.Array,
        samples: int,
    ) -> list[str]:
        # An autoregressive sampler shares out its slots itself.
        size = batch_size if at.sampling.diffusion else len(examples)
        texts: list[str] = []
        for start in range(0, len(examples), size):
            part = examples[start : start + size]
            padded = part + [part[-1]] * (size - len(part))
            keys = jax.random.split(jax.random.fold_in(key, start), size * samples)
            between()
            rollout = at.rollout(params, *fitting.prompts(padded), keys, mesh, between)
            texts += prompter.answers(prompter.completions(rollout))[: len(part) * samples]
        return texts

    platform = mesh.devices.flat[0].platform
    lay_out = jax.jit(lambda params: sampling_copy(policy.model, params, "none", platform))

    def evaluate(params: Params, examples: list[dict], samples: int = 1) -> dict[str, float]:
        if platform == "cpu":  # elsewhere memory is dearer than the time it would save
            params = lay_out(params)
        fitting, key = prompter.fitting(examples), jax.random.key(seed)
        found: dict[str, float] = {}
        for prefix, at in policies.items():
            times = samples if prefix else 1
            texts = complete(at, params, examples, fitting, key, times)
            repeated = [example for example in examples for _ in range(times)]
            for name, measure in measures(prompter.task).items():
                values = np.asarray(measure(texts, repeated))
                found[prefix + name] = float(values.mean())
                if times > 1 and name == "accuracy":
                    solved = values.reshape(-1, times).any(axis=1)
                    found[f"pass_at_{times}"] = float(solved.mean())
        return found

    return evaluate
