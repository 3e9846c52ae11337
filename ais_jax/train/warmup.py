"""Supervised warm-up: to a policy that can be rewarded at all."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator

import filelock
import jax
import numpy as np
import optax

from ais_jax import distributed, masked, settings
from ais_jax.config import Config
from ais_jax.models import Params
from ais_jax.models.tokenizers import CharTokenizer
from ais_jax.sampling import DiffusionConfig, Policy, Rollout, SamplingConfig
from ais_jax.sampling.prompts import Prompter
from ais_jax.train import checkpoint, data
from ais_jax.train.display import WARMUP_COLUMNS, Progress, warn
from ais_jax.train.optimizer import warmup_optimizer
from ais_jax.train.setup import Run
from ais_jax.train.state import state_shardings

# To be raised with every change of model, tasks or training that changes what a warm-up gives.
VERSION = 2


def supervised_loss(
    params: Params, frozen: Params | None, batch: Rollout, policy: Policy
) -> jax.Array:
    """Mean cross-entropy of the demonstrations' tokens, nats; of a diffusion model its ELBO's."""
    logps, _ = policy.score(policy.join(params, frozen), batch)
    return -masked.mean(logps, batch.mask)


def warm_up(
    run: Run,
    params: Params,
    examples: list[dict],
    cache_dir: str | os.PathLike,
    between: Callable[[], object] = lambda: None,
) -> tuple[Params, bool]:
    """What is trained, after the warm-up, and whether it came from the cache.

    Args:
      run: the run; its `frozen` part is set.
      params: what is trained, at its start; given away.
      examples: problems to imitate solutions of.
      cache_dir: where warm-ups are kept.
      between: called before every step; what it raises ends the warm-up.
    """
    config = run.config.warmup
    if config.steps == 0:
        return params, False
    name = f"warmup-{fingerprint(run.config, run.prompter, examples)}"
    path = pathlib.Path(distributed.agreed(str(pathlib.Path(cache_dir) / name)))
    if not config.cache:
        return _train(run, params, examples, between), False
    with _alone(path, between):
        cached = checkpoint.load_params(path, params, warn)
        if cached is not None:
            return cached, True
        params = _train(run, params, examples, between)
        checkpoint.save_params(path, params, warn)
    return params, False


@contextlib.contextmanager
def _alone(path: pathlib.Path, between: Callable[[], object]) -> Iterator[None]:
    """Of runs that want the same warm-up at once, one makes it and the others wait to read it.

    Runs of several processes do not wait, nor does anything where the cache cannot hold a lock.
    """
    lock = filelock.FileLock(f"{path}.lock")
    with contextlib.ExitStack() as held:
        with contextlib.suppress(OSError, NotImplementedError):
            path.parent.mkdir(parents=True, exist_ok=True)
            while jax.process_count() == 1 and not lock.is_locked:
                between()
                with contextlib.suppress(filelock.Timeout):
                    held.enter_context(lock.acquire(timeout=1))
        yield


def _train(run: Run, params: Params, examples: list[dict], between: Callable[[], object]) -> Params:
    config, policy, programs = run.config.warmup, run.policy, run.programs
    plain = dataclasses.replace(policy, sampling=_supervised(policy.sampling))
    optimizer = warmup_optimizer(config)

    def step(params, frozen, opt_state, batch, keys):
        batch = plain.plan(batch, keys)
        value, grads = jax.value_and_grad(supervised_loss)(params, frozen, batch, plain)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    shardings = state_shardings(policy, optimizer, programs.mesh)
    placed = (shardings.params, shardings.opt_state)
    train_step = jax.jit(step, donate_argnums=(0, 2), out_shardings=(*placed, None))
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    seed = run.config.initial_seed
    iterator = data.batches(examples, config.batch_size, seed)
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    with Progress(config.steps, "warm-up", columns=WARMUP_COLUMNS) as progress:
        for i in range(config.steps):
            between()
            began = time.perf_counter()
            part = next(iterator)
            careless = (rng.random(len(part)) < config.careless_fraction).tolist()
            demonstrations = run.prompter.demonstrations(part, careless)
            batch = jax.tree.map(programs.put, demonstrations)
            keys = programs.put(jax.random.split(jax.random.fold_in(key, i), len(part)))
            params, opt_state, value = train_step(params, run.frozen, opt_state, batch, keys)
            metrics = {"loss": float(value)}  # waits for the step
            seconds = time.perf_counter() - began
            progress.update(
                i + 1, {**metrics, "tokens_per_second": demonstrations.mask.sum() / seconds}
            )
    return params


def _supervised(sampling: SamplingConfig) -> SamplingConfig:
    """How demonstrations are scored, whatever rollouts use: at temperature 1, and those of a
    diffusion model at randomly masked canvases."""
    diffusion = sampling.diffusion
    if diffusion is not None:
        diffusion = DiffusionConfig(diffusion.block_length, estimator="elbo")
    return dataclasses.replace(sampling, temperature=1.0, diffusion=diffusion)


def fingerprint(config: Config, prompter: Prompter, examples: list[dict]) -> str:
    """Names a warm-up by all that its result depends on, the problems themselves included."""
    tree = settings.to_dict(config)
    relevant = {key: tree[key] for key in ("model", "task", "warmup")}
    relevant["version"] = VERSION
    relevant["examples"] = examples
    relevant["warmup"] = {**tree["warmup"], "seed": config.initial_seed}
    relevant["dtype"] = config.train.dtype
    relevant["lengths"] = [config.rollout.max_prompt_tokens, config.rollout.max_new_tokens]
    if isinstance(prompter.tokenizer, CharTokenizer):
        relevant["alphabet"] = prompter.tokenizer.alphabet
    if config.model.checkpoint is not None:
        relevant["checkpoint"] = _files(pathlib.Path(config.model.checkpoint))
    text = json.dumps(relevant, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _files(path: pathlib.Path) -> list:
    """Name, size and time of change of each file of a checkpoint."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
