"""Bias and variance of each arm's gradient against the unquantized one, at the states of a run.

At every state the same prompts and sampling keys go through each arm's sampler and through an
unquantized one. The gradient is that of the first update on a rollout batch, without a KL term.
All gradients of a batch are held at once: this is an instrument for small models.

Letters in shapes: W weightings, A arms, P entries of a gradient.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from ais_jax import ais, compilation, settings
from ais_jax.ais_config import AISConfig
from ais_jax.sampling import Policy
from ais_jax.study import moments
from ais_jax.study.config import Gradients, Plan
from ais_jax.train import data
from ais_jax.train import state as state_lib
from ais_jax.train.collect import Judge, sample_groups
from ais_jax.train.display import Progress
from ais_jax.train.loop import build_batch, train_step
from ais_jax.train.metrics import write_json
from ais_jax.train.phases import Phases
from ais_jax.train.rewards import Rewarder
from ais_jax.train.setup import Run, build_examples, build_run, drop_long, initial_params
from ais_jax.train.step import TrainBatch
from ais_jax.train.warmup import warm_up

# Sets the problems and keys of measurements apart from those of training.
_APART = 1_000_003
_LOGGED = ("severity", "reliability", "reliability_raw", "amplification", "ratio_mean")
_RATIOS = ("mse", "variance", "efficiency")


def batch_gradients(
    params: Any, frozen: Any, batch: TrainBatch, *, policy: Policy, configs: tuple[AISConfig, ...]
) -> jax.Array:
    """[W + 1, P] float32: the uncorrected gradient, then the fully weighted one of each config.

    A loss is linear in the weights of its tokens, so one forward pass serves all.

    Args:
      params: what is trained, at the weights that sampled.
      frozen: what is not, or None.
      batch: rollouts with advantages and the trainer's log-probs.
      policy: static.
      configs: static; their coefficients are not used.
    """
    logps, pull = jax.vjp(
        lambda p: policy.score(policy.join(p, frozen), batch.rollout)[0],
        params,
    )

    def slope(config: AISConfig, alpha: float) -> jax.Array:
        def loss(x):
            return ais.ais_loss(
                x,
                batch.rollout.logps,
                batch.advantages,
                batch.mask,
                old_logps=batch.old_logps,
                coefficient=jnp.float32(alpha),
                config=config,
            ).loss

        return jax.grad(loss)(logps)

    slopes = [slope(configs[0], 0.0), *(slope(config, 1.0) for config in configs)]
    # One after the other: of a vmapped backward pass XLA:CPU (jax 0.10.2) gets all but the first
    # wrong by several times their size, for some shapes.
    return jax.lax.map(lambda x: ravel_pytree(pull(x))[0], jnp.stack(slopes))


class Sums(NamedTuple):
    """Over the batches of a block."""

    arms: jax.Array  # [A, P] gradients
    arm_squares: jax.Array  # [A]
    parts: jax.Array  # [W + 1, P] gradients of `batch_gradients`
    products: jax.Array  # [3, W] |g0|^2, <g0, g1>, |g1|^2
    logged: jax.Array  # [W, len(_LOGGED)]
    alphas: jax.Array  # [A]


class Group(NamedTuple):
    """Arms whose rollouts are the same: they differ in section `ais` alone."""

    run: Run
    arms: tuple[str, ...]
    configs: tuple[AISConfig, ...]  # of each arm
    weightings: tuple[AISConfig, ...]  # the different ones, whatever their coefficient
    of_arm: tuple[int, ...]  # which of `weightings` each arm has


def weighting_of(config: AISConfig) -> AISConfig:
    """The config as far as it says how tokens are weighted at alpha = 1, and the loss."""
    return dataclasses.replace(
        config,
        coefficient="fixed",
        fixed_alpha=1.0,
        severity_scale=1.0,
        severity_factor=1.0,
        reliability_power=1.0,
        amplification_gain=1.0,
    )


def group_arms(plan: Plan, seed: int) -> list[Group]:
    """The study's arms by what samples for them."""
    by_rollout: dict[str, list[str]] = {}
    for name in plan.arms:
        tree = settings.to_dict(plan.config(name, seed))
        del tree["ais"]
        by_rollout.setdefault(repr(tree), []).append(name)
    groups = []
    for names in by_rollout.values():
        configs = tuple(plan.config(name, seed).ais for name in names)
        kinds = tuple(dict.fromkeys(map(weighting_of, configs)))
        run = build_run(plan.config(names[0], seed), pathlib.Path())
        of_arm = tuple(kinds.index(weighting_of(config)) for config in configs)
        groups.append(Group(run, tuple(names), configs, kinds, of_arm))
    return groups


def accumulate(
    sums: Sums | None,
    params: Any,
    frozen: Any,
    batch: TrainBatch,
    scales: jax.Array,
    *,
    policy: Policy,
    configs: tuple[AISConfig, ...],
    weightings: tuple[AISConfig, ...],
    of_arm: tuple[int, ...],
) -> Sums:
    """A further batch added; `scales` [A] are the arms' severity scales D0, nats."""
    found = [
        ais.diagnose(
            ais.importance_weights(batch.old_logps, batch.rollout.logps, batch.mask, config),
            batch.advantages,
        )
        for config in weightings
    ]
    alphas = jnp.stack(
        [
            ais.mixing_coefficient(found[w], config, scales[i])
            for i, (config, w) in enumerate(zip(configs, of_arm, strict=True))
        ]
    )
    parts = batch_gradients(params, frozen, batch, policy=policy, configs=weightings)
    plain, weighted = parts[0], parts[1:]
    mixed = plain + alphas[:, None] * (weighted[jnp.array(of_arm)] - plain)
    new = Sums(
        arms=mixed,
        arm_squares=jnp.sum(jnp.square(mixed), axis=1),
        parts=parts,
        products=jnp.stack(
            [
                jnp.broadcast_to(plain @ plain, len(weightings)),
                weighted @ plain,
                jnp.sum(jnp.square(weighted), axis=1),
            ]
        ),
        logged=jnp.stack([jnp.stack([getattr(d, x) for x in _LOGGED]) for d in found]),
        alphas=alphas,
    )
    return new if sums is None else jax.tree.map(jnp.add, sums, new)


class Sampler:
    """Rollout batches of a group at one state, the same prompts and keys for every group."""

    def __init__(self, group: Group, state: Any, examples: list[dict], seed: int, judge: Judge):
        """Takes a copy of the state's parameters."""
        self._run, self._state, self._judge = group.run, state, judge
        self._copy, _ = group.run.programs.refit(group.run.join(state.params), None)
        config = group.run.config
        self._iterator = data.batches(examples, config.grpo.prompts, seed)
        self._key = jax.random.key(seed)

    def batch(self, number: int) -> TrainBatch:
        """The next batch; `number`, as a step in training, gives its key."""
        key = jax.random.fold_in(self._key, number)
        sampled = sample_groups(self._run, self._copy, key, self._iterator, self._judge, Phases())
        return build_batch(self._run, self._state, self._copy, sampled, None, key)[0]


def calibrated(group: Group, state: Any, examples: list[dict], judge: Judge) -> np.ndarray:
    """[A] D0 of each arm in nats: its config's number, or `auto` of the run's own first batches.

    Prompts and keys are those of training, so that it differs from what the trainer finds by what
    the first few updates change alone.
    """
    sampler = Sampler(group, state, examples, group.run.config.train.seed, judge)
    calibrations = [state_lib.Calibration(jnp.float32(0), jnp.int32(0)) for _ in group.configs]
    for step in range(1, state_lib.CALIBRATION_BATCHES + 1):
        found = _severities(sampler.batch(step), group.configs)
        calibrations = [state_lib.calibrate(*x) for x in zip(calibrations, found, strict=True)]
    pairs = zip(calibrations, group.configs, strict=True)
    return np.array([state_lib.severity_scale(*pair) for pair in pairs], np.float32)


@functools.partial(jax.jit, static_argnums=1)
def _severities(batch: TrainBatch, configs: tuple[AISConfig, ...]) -> list[jax.Array]:
    return [
        jnp.asarray(
            ais.diagnose(
                ais.importance_weights(batch.old_logps, batch.rollout.logps, batch.mask, config),
                batch.advantages,
            ).severity
        )
        for config in configs
    ]


def measure_along(
    plan: Plan,
    along: str,
    seed: int,
    folder: pathlib.Path,
    between: Callable[[], object],
    say: Callable[[str], None],
) -> None:
    """Measures at every state of a run that has no file in `folder` yet.

    The run is repeated up to each state. Files are step_N.json, see `_result`.

    Args:
      plan: the study.
      along: the arm of the run whose states are measured at.
      seed: of the run whose states are measured at.
      folder: where results go.
      between: called between batches; what it raises ends the measurement.
      say: is told what is done.
    """
    wanted = plan.study.gradients
    assert wanted is not None
    steps = sorted(set(wanted.steps))
    missing = [step for step in steps if not (folder / f"step_{step}.json").exists()]
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    groups = group_arms(plan, seed)
    config = plan.config(along, seed)
    run = build_run(config, folder)
    examples = drop_long(build_examples(config), run.prompter).train
    rewarder = Rewarder(
        config.composition, config.grpo.group_size, config.train.reward_timeout, Phases(), say
    )
    with rewarder:
        judge = functools.partial(rewarder.judge, score=run.prompter.task.score)
        scales: list[np.ndarray] = []
        for step, run_now, state in _states(run, examples, judge, missing[-1], between):
            groups = [g._replace(run=_with_frozen(g.run, run_now)) for g in groups]
            if step == 0:
                scales = [calibrated(g, state, examples, judge) for g in groups]
            if step in missing:
                of_state = seed + _APART + step
                found = _measure_state(
                    groups, scales, state, examples, judge, wanted, of_state, between
                )
                write_json(folder / f"step_{step}.json", {"step": step, "seed": seed, **found})
                say(f"gradients along {along}, seed {seed}: step {step} is measured")


def _with_frozen(run: Run, like: Run) -> Run:
    return dataclasses.replace(run, frozen=like.frozen)


def _states(
    run: Run, examples: list[dict], judge: Judge, last: int, between: Callable[[], object]
) -> Iterator[tuple[int, Run, Any]]:
    """(step, run, state) from the start of GRPO to step `last`."""
    config = run.config
    params, frozen = initial_params(run)
    run = dataclasses.replace(run, frozen=frozen)
    params, _ = warm_up(run, params, examples, compilation.cache_directory(), between)
    state = run.programs.init_state(params)
    reference = params if config.grpo.kl_coef else None
    iterator = data.batches(examples, config.grpo.prompts, config.train.seed)
    copy, _ = run.programs.refit(run.join(state.params), None)
    yield 0, run, state
    for step in range(1, last + 1):
        between()
        state, copy, _, _ = train_step(run, state, copy, step, iterator, judge, reference)
        yield step, run, state


def _measure_state(
    groups: list[Group],
    scales: list[np.ndarray],
    state: Any,
    examples: list[dict],
    judge: Judge,
    wanted: Gradients,
    seed: int,
    between: Callable[[], object],
) -> dict:
    """The result of one state: arms by name, see `_result`."""
    everyone, exact = _with_unquantized(groups)
    scales = [*scales, np.zeros(1, np.float32)][: len(everyone)]
    samplers = [Sampler(g, state, examples, seed, judge) for g in everyone]
    size = wanted.batches // wanted.blocks
    blocks = []
    with Progress(wanted.batches, "gradients", columns=()) as progress:
        for block in range(wanted.blocks):
            sums: list[Any] = [None] * len(everyone)
            for i in range(block * size, (block + 1) * size):
                between()
                for j, (g, sampler) in enumerate(zip(everyone, samplers, strict=True)):
                    args = state.params, g.run.frozen, sampler.batch(i), scales[j]
                    sums[j] = _program(g)(sums[j], *args)
            blocks.append(jax.tree.map(lambda x: np.asarray(x) / size, sums))
            progress.update((block + 1) * size, {})
    stacked = jax.tree.map(lambda *x: np.stack(x), *blocks)
    r = stacked[exact].parts[:, 0], stacked[exact].products[:, 0, 0]
    result: dict[str, Any] = {"batches": wanted.batches, "arms": {}, "weightings": []}
    unquantized = _draws(everyone[exact], stacked[exact], *r)
    for group, scale, of_group in zip(groups, scales, stacked, strict=False):
        result["arms"] |= _result(group, scale, of_group, _draws(group, of_group, *r), unquantized)
        result["weightings"] += _mixtures(group, of_group, *r)
    return result


def _with_unquantized(groups: list[Group]) -> tuple[list[Group], int]:
    """The groups, with one that samples without quantization, and which of them that is."""
    for i, group in enumerate(groups):
        if group.run.recipe[0] == "none":
            return groups, i
    first = groups[0].run
    rollout = dataclasses.replace(first.config.rollout, recipe="none")
    config = dataclasses.replace(first.config, rollout=rollout)
    run = _with_frozen(build_run(config, first.directory), first)
    kind = weighting_of(config.ais)
    return [*groups, Group(run, ("unquantized",), (kind,), (kind,), (0,))], len(groups)


def _program(group: Group) -> Callable:
    return _compiled(group.run.policy, group.configs, group.weightings, group.of_arm)


@functools.cache
def _compiled(policy: Policy, configs, weightings, of_arm) -> Callable:
    """`accumulate` of a group, jitted once, whatever the state."""
    return jax.jit(
        functools.partial(
            accumulate, policy=policy, configs=configs, weightings=weightings, of_arm=of_arm
        ),
        donate_argnums=0,
    )


def _draws(group: Group, sums: Any, r: np.ndarray, r2: np.ndarray) -> dict[str, dict]:
    """By arm: `moments.draws`, from the same resamples for all."""
    return {
        name: moments.draws(moments.Blocks(sums.arms[:, i], r, sums.arm_squares[:, i], r2))
        for i, name in enumerate(group.arms)
    }


def _result(group: Group, scale: np.ndarray, sums: Any, drawn: dict, unquantized: dict) -> dict:
    """By arm: severity_scale, mean coefficient and diagnostics, intervals of `moments.draws`.

    `against` sets it against every other arm of its recipe and the unquantized ones, drawn in
    pairs: how many times as large mse, variance and efficiency are, by how much bias2 is larger.
    """
    found = {}
    for i, (name, w) in enumerate(zip(group.arms, group.of_arm, strict=True)):
        mine = drawn[name]
        found[name] = {
            "recipe": group.run.recipe[0],
            "severity_scale": float(scale[i]),
            "coefficient": float(sums.alphas[:, i].mean()),
            **dict(zip(_LOGGED, sums.logged[:, w].mean(axis=0).tolist(), strict=True)),
            **{x: list(moments.interval(values)) for x, values in mine.items()},
            "against": {
                other: {
                    **{x: list(moments.interval(mine[x] / others[x])) for x in _RATIOS},
                    "bias2": list(moments.interval(mine["bias2"] - others["bias2"])),
                }
                for other, others in (unquantized | drawn).items()
                if other != name
            },
        }
    return found


def _mixtures(group: Group, sums: Any, r: np.ndarray, r2: np.ndarray) -> list[dict]:
    """Of each weighting: the arms that have it, and the best constant coefficient."""
    squares, cross, own = (sums.products[:, k] for k in range(3))
    found = []
    for w in range(len(group.weightings)):
        plain = moments.Blocks(sums.parts[:, 0], r, squares[:, w], r2)
        weighted = moments.Blocks(sums.parts[:, w + 1], r, own[:, w], r2)
        arms = [name for name, kind in zip(group.arms, group.of_arm, strict=True) if kind == w]
        best = moments.best_mixture(plain, weighted, cross[:, w])
        found.append({"arms": arms, "best_coefficient": list(best)})
    return found
