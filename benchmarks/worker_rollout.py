"""Rollouts of one recipe: a contestant, see peers/worker.py."""

from __future__ import annotations

import ctypes
import time

import jax
import numpy as np
from peers.worker import serve
from rollout_shapes import CONFIGS, policy_of, random_params, work_of

from ais_jax import AISConfig, ais, masked, memory
from ais_jax.models import Model
from ais_jax.sampling import Policy, Rollout, sampling_copy

# Their logits exist at the same time.
SCORED_AT_ONCE = 8


def load(job: dict):
    recipe, _, kv_cache = job["recipe"].partition("+")
    kv_cache = kv_cache or "none"
    model = Model(CONFIGS[job["model"]], job["dtype"])
    prepare = jax.jit(sampling_copy, static_argnums=(0, 2, 3))
    copy = jax.block_until_ready(
        prepare(model, random_params(model), recipe, jax.default_backend())
    )
    _give_back()
    prompts = np.array(job["prompts"], np.int32)

    def sample(request: dict) -> Rollout:
        rows = prompts[: request["rows"]]
        policy = policy_of(model, request["new_tokens"], kv_cache)
        keys = jax.random.split(jax.random.key(request.get("seed", 0)), len(rows))
        return policy.rollout(copy, rows, np.ones(rows.shape, bool), keys)

    def run(request: dict) -> dict:
        if request.get("mismatch"):
            found = mismatch(policy_of(model, request["new_tokens"]), sample(request))
            _give_back()
            return found
        began = time.perf_counter()
        rollout = jax.block_until_ready(sample(request))
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": int(np.sum(rollout.mask)), **_device_peak()}

    return run, {
        "about": f"ais_jax, jax {jax.__version__}",
        "work": vars(work_of(model, copy, kv_cache)),
    }


def mismatch(policy: Policy, rollout: Rollout) -> dict:
    """How far a rollout's log-probs are from the unquantized trainer's, over all of its tokens."""
    params, score = random_params(policy.model), jax.jit(policy.score)
    parts = [
        score(params, jax.tree.map(lambda x, i=i: x[i : i + SCORED_AT_ONCE], rollout))
        for i in range(0, len(rollout.tokens), SCORED_AT_ONCE)
    ]
    logps, entropy = (np.concatenate(part) for part in zip(*parts, strict=True))
    config = AISConfig()
    importance = ais.importance_weights(logps, rollout.logps, rollout.mask, config)
    # Of a reward that has nothing to do with the mismatch.
    advantages = np.random.default_rng(0).normal(size=len(rollout.tokens)).astype(np.float32)
    found = ais.diagnose(importance, advantages)
    return {
        "severity": float(found.severity),
        "reliability": float(found.reliability),
        "coefficient": float(ais.mixing_coefficient(found, config)),
        "entropy": float(masked.mean(entropy, rollout.mask)),
        "tokens": int(found.tokens),
    }


def _give_back():
    """What was taken and freed so far: others need it, and it is no peak of what comes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _device_peak() -> dict:
    stats = jax.local_devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {} if peak is None else {"peak_device_mib": peak / 2**20}


if __name__ == "__main__":
    memory.keep_freed()  # as the command line does
    serve(load)
