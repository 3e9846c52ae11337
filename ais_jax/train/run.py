"""A whole run: warm-up, GRPO, evaluation before and after, results on disk."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import pathlib
import time
import zlib

import jax
import numpy as np

from ais_jax import compilation, distributed, report, settings
from ais_jax import mesh as mesh_lib
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.evaluation.accuracy import build_evaluator
from ais_jax.models import Params
from ais_jax.train import checkpoint, data, tracking
from ais_jax.train.display import console, final_table, warn
from ais_jax.train.loop import train_grpo
from ais_jax.train.metrics import write_json
from ais_jax.train.phases import Phases
from ais_jax.train.rewards import Rewarder, RewardFn
from ais_jax.train.setup import Examples, Run, build_examples, build_run, drop_long, initial_params
from ais_jax.train.state import TrainState
from ais_jax.train.warmup import warm_up


def train(
    config: Config,
    reward_fn: RewardFn | str | None = None,
    name: str = "run",
    resume: bool = True,
) -> dict:
    """Trains as `config` says and returns the summary that is also written to summary.json.

    Args:
      config: the whole run; see `ais_jax.config.load`.
      reward_fn: (completions, examples) -> float rewards [B], or "module:name" of such a function,
        which then runs in a process of its own; None takes `config.rewards`. Examples are the
        task's dicts. What happens where it fails: see `ais_jax.train.rewards.Rewarder`.
      name: begins the folder's name where `config.output_dir` is not set.
      resume: go on from the newest checkpoint in `config.output_dir`. False begins again, and
        renames a run that is there.

    Returns:
      A dict with held-out accuracy "before" and "after", "seconds" by phase, and "output_dir".

    Raises:
      UserError: the configuration cannot be run, or a checkpoint does not fit it.
      SystemExit: SIGTERM came; the code is 143, and what was done is saved.
    """
    began = time.perf_counter()
    directory = pathlib.Path(distributed.agreed(str(_directory(config, name))))
    run, examples, dropped = distributed.together(_prepare, config, directory)
    reward = config.composition if reward_fn is None else reward_fn
    named = reward_fn if reward_fn is None or isinstance(reward_fn, str) else "a function"
    _check_equal(config, examples, resume, named)
    phases = Phases()
    rewarder = Rewarder(
        reward,
        config.grpo.group_size,
        config.train.reward_timeout,
        phases,
        warn,
    )
    with phases.listening(), rewarder, _open_directory(run, resume) as checkpoints:
        _say_hello(run, examples, dropped)
        summary = _stages(run, examples, checkpoints, rewarder, phases, began)
        newest = checkpoints.latest_step()
    if distributed.first():
        _conclude(run, summary)
    if newest is None or newest < config.train.steps:
        raise UserError(
            f"the last checkpoint is not saved, the newest in {run.directory} is of step {newest}; "
            "look after the disk and start again, to go on from there"
        )
    return summary


def _conclude(run: Run, summary: dict) -> None:
    """Shows the results and writes them down."""
    title = f"{run.config.task.name}: before and after GRPO"
    final_table(summary["before"], summary["after"], title=title)
    try:
        write_json(run.directory / "summary.json", summary)
        picture = report.curves(run.directory)
    except OSError as error:
        raise UserError(f"{run.directory} cannot be written: {error.strerror or error}") from error
    console().print(f"results: {run.directory}   curves: {picture}")


def _prepare(config: Config, directory: pathlib.Path) -> tuple[Run, Examples, int]:
    """The run, its problems, and how many have prompts that are too long; no file is written."""
    try:
        tracking.check(config)
        run = build_run(config, directory)
        config.check_devices(mesh_lib.batch_devices(run.programs.mesh), jax.process_count())
        generated = build_examples(config)
        examples = drop_long(generated, run.prompter)
    except ValueError as error:
        raise UserError(str(error)) from error
    return run, examples, len(generated.train) - len(examples.train)


def _check_equal(config: Config, examples: Examples, resume: bool, reward: str | None) -> None:
    """Processes that do not run the same would wait for each other for ever, or train nonsense.

    Raises:
      UserError: something of a process is not that of process 0.
    """
    if jax.process_count() == 1:
        return
    parts = {
        "the settings": dataclasses.replace(config, output_dir=None),
        "resume": resume,
        "the reward function": reward,
        "the problems": (examples.train, examples.heldout, examples.real),
    }
    for name, part in parts.items():
        crc = distributed.gather(np.array([zlib.crc32(repr(part).encode())], np.uint32))
        if (crc != crc[0]).any():
            other = int(np.argmax(crc != crc[0]))
            raise UserError(f"{name} of process {other} and of process 0 differ; start all alike")


def _stages(
    run: Run, examples: Examples, checkpoints, rewarder: Rewarder, phases: Phases, began: float
) -> dict:
    """Warm-up, evaluation, GRPO, evaluation; returns the summary, timed from `began`."""
    config = run.config
    with phases.watched(config.train.watchdog_seconds, warn):
        run, params, cached = _warmed(run, examples, checkpoints, phases)
        warmed = time.perf_counter()
        evaluator = _evaluator(run, phases)
        reference = params if config.grpo.kl_coef else None
        with phases.phase("restore"):
            state = run.programs.init_state(params)
            del params  # without a KL term nothing else needs them
            start, iterator = _resume(run, examples, checkpoints, state)
            del state
        if start.step == 0:
            before: dict[str, float] = {}
            if config.train.eval_before:
                before = _evaluate_all(evaluator, run.join(start.state.params), examples, phases)
            start = start._replace(host={"before": before})

    grpo_began = time.perf_counter()
    heldout = examples.heldout
    state = train_grpo(
        run,
        start,
        iterator,
        checkpoints,
        rewarder,
        lambda s: evaluator(
            run.join(s.params), heldout[: config.train.eval_examples], config.train.eval_samples
        ),
        reference,
        phases,
    )
    iterator.close()
    grpo_ended = time.perf_counter()
    with phases.watched(config.train.watchdog_seconds, warn):
        after = _evaluate_all(evaluator, run.join(state.params), examples, phases)
    return {
        "before": start.host["before"],
        "after": after,
        "warmup_cached": cached,
        "seconds": {
            "warmup": warmed - began,
            "grpo": grpo_ended - grpo_began,
            "total": time.perf_counter() - began,
        },
        "parameters": _count(run.policy.model.abstract_params()),
        "trained_parameters": _count(state.params),
        "output_dir": str(run.directory),
    }


def _warmed(run: Run, examples: Examples, checkpoints, phases: Phases) -> tuple[Run, Params, bool]:
    """(run with what is frozen, what is trained after the warm-up, whether it was in the cache).

    A run that goes on and has no reference policy needs no warm-up: its checkpoint has more.
    """
    # Several processes read and write one cache, in the folder that they share anyway.
    cache = compilation.cache_directory() if jax.process_count() == 1 else run.directory / "cache"
    goes_on = distributed.agreed(str(checkpoints.latest_step())) != "None"
    with phases.interruptible(), phases.phase("warm-up"):
        params, frozen = initial_params(run)
        run = dataclasses.replace(run, frozen=frozen)
        cached = False
        if run.config.grpo.kl_coef or not goes_on:
            params, cached = warm_up(run, params, examples.train, cache, phases.leave_if_told)
    return run, params, cached


def _evaluator(run: Run, phases: Phases):
    config = run.config
    return build_evaluator(
        run.policy,
        run.prompter,
        run.programs.mesh,
        config.train.eval_batch_size,
        config.train.eval_max_new_tokens or config.rollout.max_new_tokens,
        config.train.seed,
        phases.leave_if_told,
    )


def _resume(run: Run, examples: Examples, checkpoints, state: TrainState):
    """(what is done, data iterator): of the newest checkpoint, or of a start with `state`."""
    config = run.config
    iterator = data.batches(
        examples.train,
        config.grpo.prompts,
        config.train.seed,
        part=jax.process_index(),
        parts=jax.process_count(),
        workers=config.train.data_workers,
    )
    restored = checkpoint.restore(checkpoints, state, warn)
    if restored is None:
        return checkpoint.Saved(0, state, {}), iterator
    iterator.set_state(restored.host["iterator"])
    console().print(f"going on after step {restored.step} in {run.directory}")
    return restored, iterator


def _open_directory(run: Run, resume: bool):
    """The run's folder and its checkpoints, which are checked before anything is overwritten."""
    if not resume:
        distributed.together(_move_away, run.directory)
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
        keep = run.config.train.checkpoint_keep
        checkpoints = checkpoint.manager(run.directory / "checkpoints", keep)
    except OSError as error:
        raise UserError(
            f"output_dir {run.directory} cannot be used: {error.strerror or error}"
        ) from error
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    params = jax.eval_shape(run.programs.init_trainable, key)
    checkpoint.check(checkpoints, jax.eval_shape(run.programs.init_state, params))
    distributed.together(_keep_config, run, checkpoints)
    return checkpoints


def _keep_config(run: Run, checkpoints) -> None:
    """Writes the settings down, and says which differ from those of before."""
    if not distributed.first():
        return
    before = run.directory / "config.yaml"
    if checkpoints.latest_step() is not None and before.exists():
        changed = settings.changed_keys(settings.load_yaml(before), settings.to_dict(run.config))
        if changed:
            console().print(f"going on with other settings than before: {', '.join(changed)}")
    settings.save_yaml(run.config, run.directory / "config.yaml")


def _evaluate_all(evaluator, params, examples: Examples, phases: Phases) -> dict[str, float]:
    with phases.interruptible(), phases.phase("evaluation"):
        result = {f"heldout_{k}": v for k, v in evaluator(params, examples.heldout).items()}
        if examples.real:
            result |= {f"real_{k}": v for k, v in evaluator(params, examples.real).items()}
    return result


def _say_hello(run: Run, examples: Examples, dropped: int) -> None:
    size = _count(run.policy.model.abstract_params())
    device, processes = jax.devices()[0], jax.process_count()
    places = f"{jax.device_count()} {device.platform} device(s)"
    if processes > 1:
        places += f" of {processes} processes"
    recipe, why = run.recipe
    console().print(
        f"{run.config.task.name}: {size / 1e6:.2f} M parameters on {places}, "
        f"rollouts in {recipe}, "
        f"{len(examples.train)} problems to train on, {len(examples.heldout)} held out"
    )
    if why:
        console().print(f"rollouts in {recipe}: {why}")
    if dropped:
        console().print(
            f"{dropped} further problems are left out: their prompts are above "
            f"rollout.max_prompt_tokens={run.config.rollout.max_prompt_tokens}"
        )
    if run.config.task.eval_file and not examples.real:
        console().print(f"{run.config.task.eval_file} is not here: evaluation on it is skipped")


def _count(params) -> int:
    return sum(x.size for x in jax.tree.leaves(params))


def _directory(config: Config, name: str) -> pathlib.Path:
    if config.output_dir is not None:
        return pathlib.Path(config.output_dir)
    path = pathlib.Path("runs") / f"{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return _free(path)  # a run that began in the same second keeps its folder to itself


def _move_away(path: pathlib.Path) -> None:
    """Renames the run that is in `path`, if there is one."""
    if not distributed.first() or not (path / "checkpoints").is_dir():
        return
    target = _free(path)
    try:
        path.rename(target)
    except OSError as error:
        raise UserError(
            f"output_dir {path} holds a run and cannot be renamed: {error.strerror or error}; "
            "take another output_dir"
        ) from error
    console().print(f"the run that was in {path} is now {target}")


def _free(path: pathlib.Path) -> pathlib.Path:
    """`path`, or where it exists the first free of `path`-2, `path`-3, ..."""
    others = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return path if not path.exists() else next(p for p in others if not p.exists())
