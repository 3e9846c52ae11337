"""Supervised warm-up: from random parameters to a policy that can be rewarded at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import time

import jax
import numpy as np
import optax

from ais_jax import masked, settings
from ais_jax.config import Config
from ais_jax.models import Params
from ais_jax.sampling import Policy, Rollout
from ais_jax.sampling.prompts import Prompter
from ais_jax.train import checkpoint, data
from ais_jax.train.display import WARMUP_COLUMNS, Progress
from ais_jax.train.optimizer import warmup_optimizer
from ais_jax.train.state import state_shardings

# To be raised with every change of model, tasks or training that changes what a warm-up gives.
VERSION = 1


def supervised_loss(params: Params, batch: Rollout, policy: Policy) -> jax.Array:
    """Mean cross-entropy of the demonstrations' tokens, nats."""
    logps, _ = policy.score(params, batch)
    return -masked.mean(logps, batch.mask)


def warm_up(
    config: Config, policy: Policy, prompter: Prompter, examples: list[dict], programs, cache_dir
) -> tuple[Params, bool]:
    """Parameters after the warm-up, and whether they came from the cache."""
    init_key = jax.random.key(config.train.seed)
    params = programs.init_params(init_key)
    if config.warmup.steps == 0:
        return params, False
    path = pathlib.Path(cache_dir) / f"warmup-{fingerprint(config, prompter, examples)}"
    if config.warmup.cache and checkpoint.exists(path):
        return checkpoint.load_params(path, params), True
    params = _train(config, policy, prompter, examples, programs, params)
    if config.warmup.cache:
        checkpoint.save_params(path, params)
    return params, False


def _train(config, policy, prompter, examples, programs, params) -> Params:
    # Demonstrations are scored at temperature 1, whatever the rollouts use.
    plain = dataclasses.replace(
        policy, sampling=dataclasses.replace(policy.sampling, temperature=1.0)
    )
    optimizer = warmup_optimizer(config.warmup)

    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(supervised_loss)(params, batch, plain)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    shardings = state_shardings(policy.model, optimizer, programs.mesh)
    placed = (shardings.params, shardings.opt_state)
    train_step = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*placed, None))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    iterator = data.batches(examples, config.warmup.batch_size, config.train.seed)
    rng = np.random.default_rng(config.train.seed)
    with Progress(config.warmup.steps, "warm-up", columns=WARMUP_COLUMNS) as progress:
        for i in range(config.warmup.steps):
            began = time.perf_counter()
            examples = next(iterator)
            careless = rng.random(len(examples)) < config.warmup.careless_fraction
            demonstrations = prompter.demonstrations(examples, careless)
            batch = jax.tree.map(programs.put, demonstrations)
            params, opt_state, value = train_step(params, opt_state, batch)
            metrics = {"loss": float(value)}  # waits for the step
            seconds = time.perf_counter() - began
            progress.update(
                i + 1, {**metrics, "tokens_per_second": demonstrations.mask.sum() / seconds}
            )
    return params


def fingerprint(config: Config, prompter: Prompter, examples: list[dict]) -> str:
    """Names a warm-up by all that its result depends on, the problems themselves included."""
    tree = settings.to_dict(config)
    relevant = {key: tree[key] for key in ("model", "task", "warmup")}
    relevant["version"] = VERSION
    relevant["examples"] = examples
    relevant["train"] = {key: tree["train"][key] for key in ("seed", "dtype")}
    relevant["lengths"] = [config.rollout.max_prompt_tokens, config.rollout.max_new_tokens]
    relevant["alphabet"] = prompter.tokenizer.alphabet
    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
