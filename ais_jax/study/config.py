"""What a study is: arms and seeds over one base configuration."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ais_jax import settings
from ais_jax.ais_config import PRESETS
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.evaluation.accuracy import measures
from ais_jax.recipes import RECIPES
from ais_jax.settings import at_least, setting
from ais_jax.tasks import get_task

# What a preset decides; everything else is the base configuration's.
_CORRECTION = (
    *("level", "cap", "coefficient", "fixed_alpha", "mask_low", "mask_high"),
    *("geometric_low", "geometric_high", "veto"),
)
# What the loss is, whatever its tokens' weights: the same in all arms whose gradients are compared.
_LOSS = ("clip_low", "clip_high", "dual_clip", "policy_ratio", "aggregation", "max_length")
# How a measure of the task is taken, by what stands before its name: what tables call it, and what
# it is.
_TAKEN = {
    "": ("greedy", "greedy, mean over the evaluations of the tail"),
    "sampled_": ("sampled", "of samples, mean over the evaluations of the tail"),
    "final_": ("final greedy", "greedy, all problems, after the last step"),
    "final_sampled_": ("final sampled", "one sample of each of all problems, after the last step"),
}
REWARD = "reward"


class Outcome(NamedTuple):
    """What a run can be judged by."""

    label: str  # in tables
    text: str


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train: how rollouts are quantized and how their mismatch is corrected."""

    recipe: str = setting(doc="rollout.recipe", choices=tuple(RECIPES))
    correction: str = setting("none", "a preset of section ais", choices=tuple(PRESETS))
    train: bool = setting(True, "false measures its gradients alone")
    draw: bool = setting(True, "false leaves it to the tables, where figures would be crowded")
    settings: dict[str, Any] = setting(
        doc="further settings of this arm, as in a training configuration", default_factory=dict
    )


@dataclasses.dataclass(frozen=True)
class Gradients:
    """At which states gradients are measured, and with how many batches."""

    along: tuple[str, ...] = setting(doc="arms whose runs are measured along")
    seeds: tuple[int, ...] = setting((0,), "seeds of these runs")
    steps: tuple[int, ...] = setting((0,), "after how many steps of GRPO")
    batches: int = setting(1024, "rollout batches at each state")
    blocks: int = setting(64, "parts of these batches that the bootstrap draws from")

    def __post_init__(self):
        at_least(self, 2, "blocks")
        if not self.seeds or min(self.seeds) < 0 or not self.steps or min(self.steps) < 0:
            raise ValueError(
                f"seeds={list(self.seeds)} and steps={list(self.steps)} must be at least one each, "
                "and none below 0"
            )
        if self.batches < self.blocks or self.batches % self.blocks:
            raise ValueError(f"batches={self.batches} must be a multiple of blocks={self.blocks}")


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms and seeds over one base configuration."""

    base: str = setting(doc="a training configuration, looked for beside the study's file")
    arms: dict[str, Any] = setting(doc="name: {recipe, correction, settings} of each arm")
    baseline: str = setting(doc="the arm that the others are compared with, such as bf16")
    seeds: tuple[int, ...] = setting((0, 1, 2, 3, 4), "train.seed of the runs of each arm")
    settings: dict[str, Any] = setting(
        doc="settings that replace those of base, for all arms", default_factory=dict
    )
    outcome: str = setting(
        "accuracy",
        "what verdicts are about: a measure of the task, alone or after sampled_, final_ or "
        "final_sampled_; or reward",
    )
    tail: float = setting(0.25, "last share of the steps that outcomes are means over")
    half_width: float = setting(
        0.02, "half-width of a 95 % interval above which a difference is called undecided"
    )
    gradients: Gradients | None = setting(None, "measure gradients as well")

    def __post_init__(self):
        if not self.arms:
            raise ValueError("arms is empty: name at least one")
        for name in self.arms:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"arms: {name!r} names a folder: take letters, digits and . _ + = -"
                )
        along = () if self.gradients is None else self.gradients.along
        for key, name in (("baseline", self.baseline), *(("gradients.along", x) for x in along)):
            if name not in self.arms:
                raise ValueError(f"{key}={name!r} is no arm; the arms are {', '.join(self.arms)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds={list(self.seeds)} must be whole numbers from 0, each once")
        if not 0 < self.tail <= 1:
            raise ValueError(f"tail={self.tail} must be above 0 and at most 1")
        settings.positive(self, "half_width")


@dataclasses.dataclass(frozen=True)
class Plan:
    """A study with its base configuration read and every arm checked.

    Attributes:
      study: as it was written.
      base: settings that all arms begin with.
      arms: each by its name, in the study's order.
      measures: of the task, the first of which is accuracy.
    """

    study: Study
    base: dict[str, Any]
    arms: dict[str, Arm]
    measures: tuple[str, ...]

    @property
    def outcomes(self) -> dict[str, Outcome]:
        """What runs can be judged by, of each measure greedily and in samples."""
        found = {}
        for measure in self.measures:
            words = measure.replace("_", " ")
            of_measure = "" if measure == "accuracy" else f"{words}, "
            for taken, (label, text) in _TAKEN.items():
                found[taken + measure] = Outcome(of_measure + label, f"held-out {words}, {text}")
        text = "reward of the sampling copy, mean over the steps of the tail"
        return found | {REWARD: Outcome("reward", text)}

    @property
    def evaluations(self) -> dict[str, str]:
        """What is measured of a policy now and then: the metric without "eval_", and its name."""
        found: dict[str, str] = {}
        for measure in self.measures:
            words = measure.replace("_", " ")
            found |= {measure: f"{words}, greedy", f"sampled_{measure}": f"{words}, sampled"}
        return found | {"pass_at": "pass@k"}

    def config(self, arm: str, seed: int, output_dir: pathlib.Path | None = None) -> Config:
        """The training configuration of a run."""
        chosen = self.arms[arm]
        tree: Any = self.base
        correction = {x: getattr(PRESETS[chosen.correction], x) for x in _CORRECTION}
        for part in (
            {"rollout": {"recipe": chosen.recipe}, "ais": correction},
            chosen.settings,
            {"train": {"seed": seed}, "output_dir": output_dir and str(output_dir)},
        ):
            tree = merged(tree, part)
        return settings.build(Config, tree, f"arm {arm}")


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Plan:
    """Reads a study and checks all of its arms.

    Args:
      path: a YAML file.
      overrides: such as "seeds=[5,6,7]" or "settings.train.steps=20".

    Raises:
      UserError: a file is missing or malformed, or an arm's settings cannot be.
    """
    study = settings.load(Study, path, overrides)
    base = settings.load_yaml(pathlib.Path(path).parent / study.base)
    arms = {}
    for name, given in study.arms.items():
        if not isinstance(given, Mapping):
            raise UserError(f"{path}: arms.{name}: expected keys such as recipe: fp8")
        arms[name] = settings.build(Arm, given, f"{path}: arms.{name}")
    if not arms[study.baseline].train:
        raise UserError(f"{path}: baseline={study.baseline!r} has train: false; let it be trained")
    plan = Plan(study, merged(base, study.settings), arms, ("accuracy",))
    tasks = {plan.config(name, study.seeds[0]).task.name for name in arms}
    if len(tasks) > 1:
        raise UserError(f"{path}: the arms have several tasks, {', '.join(sorted(tasks))}")
    if study.gradients is not None:
        _check_one_loss(plan, path)
    plan = dataclasses.replace(plan, measures=tuple(measures(get_task(tasks.pop()))))
    if study.outcome not in plan.outcomes:
        raise UserError(f"{path}: outcome={study.outcome!r} is none of {', '.join(plan.outcomes)}")
    return plan


def _check_one_loss(plan: Plan, path: str | os.PathLike) -> None:
    seed = plan.study.seeds[0]
    first, *others = plan.arms
    for key in _LOSS:
        wanted = getattr(plan.config(first, seed).ais, key)
        for name in others:
            value = getattr(plan.config(name, seed).ais, key)
            if value != wanted:
                raise UserError(
                    f"{path}: gradients are compared of one loss, but ais.{key} is {wanted} in arm "
                    f"{first} and {value} in {name}; make it the same, or set gradients=null"
                )


def merged(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, those of `changes` over those of `tree`."""
    result = dict(tree)
    for name, value in changes.items():
        old = result.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[name] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def tail_start(steps: int, tail: float) -> int:
    """The first step of the last share `tail` of `steps`."""
    return steps - max(math.ceil(tail * steps), 1) + 1
