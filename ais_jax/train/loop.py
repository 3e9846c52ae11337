"""The training loop: sample, reward, measure, update, write down."""

from __future__ import annotations

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ais_jax import distributed, masked, settings
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.models import Params
from ais_jax.sampling.estimators import covered
from ais_jax.train import checkpoint, grpo, guards, throughput, tracking
from ais_jax.train.collect import Judge, Sampled, sample_groups
from ais_jax.train.display import GRPO_COLUMNS, Progress
from ais_jax.train.metrics import write_json
from ais_jax.train.phases import Phases, Preempted
from ais_jax.train.rewards import Rewarder
from ais_jax.train.setup import Run
from ais_jax.train.state import TrainState
from ais_jax.train.step import TrainBatch

# Sets the keys of canvases apart from those of sampling rounds.
PLAN = 2**31 - 1


def train_grpo(
    run: Run,
    start: checkpoint.Saved,
    iterator,
    checkpoints,
    rewarder: Rewarder,
    evaluate: Callable[[TrainState], dict[str, float]],
    reference: Params | None,
    phases: Phases,
) -> TrainState:
    """Runs the steps after `start`; returns the last state, which has been saved.

    `reference` is what `state.params` were in the policy that the KL term refers to, None where
    there is none.

    Raises:
      Preempted: SIGTERM came; what was done is saved.
      UserError: too many updates were not finite; the last batch is saved beside the checkpoint.
    """
    config, last = run.config, start
    progress = Progress(config.train.steps, "GRPO", columns=GRPO_COLUMNS, initial_step=start.step)

    def warn(text: str) -> None:
        progress.message(f"warning: {text}")

    with (
        progress,
        tracking.open_writer(
            config, run.directory, start.step, start.host.get("lengths"), warn
        ) as writer,
        phases.watched(config.train.watchdog_seconds, warn),
    ):
        keeper = checkpoint.Keeper(checkpoints, warn)
        copy, _ = run.programs.refit(run.join(start.state.params), None)
        watch = guards.Watch.of_json(start.host.get("watch", guards.Watch().to_json()))
        judge = functools.partial(rewarder.judge, score=run.prompter.task.score)
        saving = 0.0  # seconds that the checkpoint of the step before has held this one up
        try:
            for step in range(start.step + 1, config.train.steps + 1):
                state, copy, metrics, sampled = train_step(
                    run, last.state, copy, step, iterator, judge, reference, phases
                )
                failed = distributed.gather(np.array([rewarder.take_failed()]))
                metrics["reward_failures"] = int(failed.sum())
                metrics["checkpoint_seconds"] = saving
                if _every(config.train.eval_every, step):
                    metrics |= _evaluated(evaluate, state, phases)
                writer.write(step, metrics)
                if step == 1 or _every(config.train.samples_every, step):
                    writer.write_samples(step, _samples(sampled, config.grpo.group_size))
                progress.update(step, metrics)
                watch = _guarded(run, watch, step, metrics, warn)
                known = _host(config, iterator, writer, watch)
                last = checkpoint.Saved(step, state, {**start.host, **known})
                began = time.perf_counter()
                keeper.look()
                if int(state.skipped) >= config.train.max_skipped_updates:
                    raise UserError(_stuck(run, last, sampled, keeper))
                if _every(config.train.checkpoint_every, step) or step == config.train.steps:
                    with phases.phase("checkpoint"):
                        keeper.save(last)
                saving = time.perf_counter() - began
                phases.leave_if_told()
        except Preempted:
            if last.step > start.step:
                with phases.phase("checkpoint"):
                    keeper.save(last)
            progress.message(f"told to leave: {last.step} steps are done, the next run goes on")
            raise
        finally:
            with phases.phase("checkpoint"):
                keeper.finish()
    return last.state


def _host(config: Config, iterator, writer: tracking.Writer, watch: guards.Watch) -> dict:
    """What a checkpoint holds beside the state."""
    return {
        "iterator": iterator.get_state(),
        "lengths": writer.lengths(),
        "watch": watch.to_json(),
        "config": settings.to_dict(config),
    }


def _evaluated(evaluate, state: TrainState, phases: Phases) -> dict[str, float]:
    """Metrics of an evaluation; none where SIGTERM cuts it short, which ends the run soon after."""
    try:
        with phases.interruptible(), phases.phase("evaluation"):
            clock: dict[str, float] = {}
            found = _timed(clock, "eval_seconds", evaluate, state)
            return {f"eval_{name}": value for name, value in found.items()} | clock
    except Preempted:
        return {}


def _guarded(run: Run, watch: guards.Watch, step: int, metrics: dict, warn) -> guards.Watch:
    """The guards after a step whose warnings have been shown."""
    config = run.config
    selected = config.grpo.dynamic_sampling or config.grpo.mask_truncated
    selected |= not run.policy.unbiased
    calibrating = config.ais.severity_scale == "auto"
    watch, warnings = guards.watch(
        watch, {"step": step, **metrics}, calibrating=calibrating, selected=selected
    )
    for text in warnings:
        warn(text)
    return watch


def train_step(
    run: Run,
    state,
    copy,
    step: int,
    iterator,
    judge: Judge,
    reference,
    phases: Phases | None = None,
):
    """One GRPO step. Returns the new state, its sampling copy, the metrics and what was sampled.

    Args:
      state: given away once the update begins, and left alone if SIGTERM comes before.
      copy: its sampling copy; given away.
    """
    phases = phases or Phases()
    clock: dict[str, float] = {}
    began = time.perf_counter()
    key = jax.random.fold_in(jax.random.key(run.config.train.seed), step)
    with phases.interruptible():
        with phases.phase(f"step {step}: rollout"):
            sampled = sample_groups(run, copy, key, iterator, judge, phases)
        phases.leave_if_told()
        clock["rollout_seconds"] = sampled.seconds
        clock["reward_seconds"] = sampled.reward_seconds
        with phases.phase(f"step {step}: score"):
            batch, entropy = _timed(
                clock, "score_seconds", build_batch, run, state, copy, sampled, reference, key
            )
        phases.leave_if_told()
    calibration, measured = run.programs.measure(state.calibration, batch)
    state = state._replace(calibration=calibration)
    with phases.phase(f"step {step}: update"):
        state, learned = _timed(
            clock, "train_seconds", update_epochs, run, state, batch, measured.coefficient, step
        )
    with phases.phase(f"step {step}: quantize"):
        copy, changed = _timed(
            clock, "quantize_seconds", run.programs.refit, run.join(state.params), copy
        )
    clock["step_seconds"] = time.perf_counter() - began

    if sampled.rollout.forwards is not None:
        learned["forwards"] = np.asarray(sampled.rollout.forwards).mean()
    lengths = np.asarray(sampled.rollout.mask).sum(axis=1)
    metrics = {
        "reward": sampled.reward,
        "accuracy": sampled.accuracy,
        "group_accuracy": sampled.solved,
        **_named_terms(sampled.terms),
        "coefficient": measured.coefficient,
        "severity_scale": measured.severity_scale,
        "reliability_applied": measured.reliability_applied,
        **measured.diagnostics._asdict(),
        **learned,
        "entropy": entropy,
        "completion_length": lengths.mean(),
        "truncated_fraction": np.asarray(sampled.rollout.truncated).mean(),
        "zero_variance_fraction": 1 - sampled.informative,
        "learning_rate": run.learning_rate(step),
        "codes_changed": changed,
        "tokens_per_second": sampled.count / clock["rollout_seconds"],
        **clock,
        **_throughput(run, sampled, clock, reference),
    }
    return state, copy, {name: float(value) for name, value in metrics.items()}, sampled


def _named_terms(terms: dict[str, float]) -> dict[str, float]:
    """Metrics of the terms of a reward; none where there is only one, which is the reward."""
    return {f"reward/{x}": value for x, value in terms.items()} if len(terms) > 1 else {}


def _throughput(run: Run, sampled: Sampled, clock: dict[str, float], reference):
    c = run.config.grpo
    scores = 1 + (reference is not None) + (not run.policy.recorded)
    work = throughput.work_of(run.policy, scores=scores, epochs=c.inner_epochs)
    return throughput.measure(
        work, sampled.rollout, sampled.count, c.group_size, clock, run.programs.mesh
    )


def build_batch(run: Run, state: TrainState, copy, sampled: Sampled, reference, key):
    """The training batch: advantages and the trainer's own log-probs. Also the mean entropy.

    Of a diffusion model each of its `draws` of random canvases is a part of the batch, with all
    rows. Where they are not those that tokens were sampled at, the sampling copy is scored at them
    too.
    """
    c, draws = run.config.grpo, run.policy.sampling.draws
    rollout = jax.tree.map(run.programs.put, sampled.rollout)
    keys = run.programs.put(jax.random.split(jax.random.fold_in(key, PLAN), c.batch_size))
    rollout = run.programs.plan(rollout, keys)
    if not run.policy.recorded:
        rollout = rollout._replace(logps=run.programs.score(copy, rollout)[0])
    scored = rollout.mask if rollout.plan is None else rollout.mask & covered(rollout.plan)
    mask = scored & ~rollout.truncated[:, None] if c.mask_truncated else scored
    advantages = np.tile(
        np.asarray(grpo.group_advantages(sampled.rewards, c.group_size, c.advantages)), draws
    )
    old_logps, entropy = run.programs.score(run.join(state.params), rollout)
    ref_logps = None
    if reference is not None:
        ref_logps, _ = run.programs.score(run.join(reference), rollout)
    mean_entropy = masked.mean(entropy, scored)
    batch = TrainBatch(rollout, mask, run.programs.put(advantages), old_logps, ref_logps)
    return batch, mean_entropy


def update_epochs(run: Run, state: TrainState, batch: TrainBatch, coefficient, step: int):
    """All optimizer steps on one rollout batch. Returns the state and the mean of their metrics.

    Every inner epoch goes through all rows of one draw of canvases.
    """
    c, draws = run.config.grpo, run.policy.sampling.draws
    rng = np.random.default_rng((run.config.train.seed, step))
    history = []
    for epoch in range(c.inner_epochs):
        if c.minibatches == draws == 1:
            parts = [batch]
        else:
            rows = epoch % draws * c.batch_size + rng.permutation(c.batch_size)
            parts = [run.programs.take(batch, part) for part in rows.reshape(c.minibatches, -1)]
        for part in parts:
            state, metrics = run.programs.update(state, run.frozen, part, coefficient)
            history.append(metrics)
    mean = {name: float(np.mean([m[name] for m in history])) for name in history[0]}
    return state, mean


def _samples(sampled: Sampled, group_size: int) -> list[dict]:
    """The first group of this process's own, for a person to read."""
    own = [i for i, example in enumerate(sampled.examples) if example is not None]
    return [
        {
            "example": sampled.examples[i],
            "completion": sampled.completions[i],
            "reward": float(sampled.rewards[i]),
        }
        for i in own[:group_size]
    ]


def _timed(clock: dict[str, float], name: str, function, *args):
    began = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    clock[name] = time.perf_counter() - began
    return result


def _every(period: int, step: int) -> bool:
    return period > 0 and step % period == 0


def _stuck(run: Run, last: checkpoint.Saved, sampled: Sampled, keeper: checkpoint.Keeper) -> str:
    """Saves the state and the batch that cannot be learned from; returns what to say of it."""
    keeper.save(last)
    folder = run.directory / f"nonfinite_step_{last.step}"
    try:
        _save_batch(folder, sampled)
        saved = f"the batch is in {folder}"
    except OSError as error:
        saved = f"{folder} cannot be written ({error.strerror or error})"
    return (
        f"step {last.step}: the last {int(last.state.skipped)} updates were not finite and were "
        f"skipped, {saved}; lower optimizer.learning_rate, or raise train.max_skipped_updates"
    )


def _save_batch(folder: pathlib.Path, sampled: Sampled) -> None:
    folder.mkdir(exist_ok=True)
    process = jax.process_index()
    leaves = jax.tree_util.tree_leaves_with_path(sampled.rollout)
    arrays: dict[str, Any] = {jax.tree_util.keystr(p).strip("."): np.asarray(x) for p, x in leaves}
    np.savez(folder / f"batch_{process}.npz", rewards=sampled.rewards, **arrays)
    rows = _samples(sampled, len(sampled.completions))
    write_json(folder / f"rows_{process}.json", rows)
