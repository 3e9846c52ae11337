"""A step's rollouts with their rewards: groups of completions of the same prompt."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax
import numpy as np

from ais_jax import distributed
from ais_jax.sampling import Rollout
from ais_jax.tasks.rewards import Judged
from ais_jax.train import grpo
from ais_jax.train.phases import Phases
from ais_jax.train.setup import Run

Judge = Callable[[list[str], list[dict]], Judged]


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One step's rollouts, groups in consecutive rows.

    The statistics are of everything that was sampled, also of groups that dynamic sampling drops.
    Arrays are whole in every process; examples and completions are None where another one has them.
    """

    rollout: Rollout
    examples: list[dict | None]
    completions: list[str | None]
    rewards: np.ndarray  # [B] float32
    reward: float
    accuracy: float
    informative: float  # share of groups whose rewards differ
    solved: float  # share of groups with a completion that solves the problem
    count: int  # tokens
    seconds: float  # time spent in the sampler
    reward_seconds: float  # time until all processes have their rewards
    terms: dict[str, float]  # mean of each term of the reward, without its weight


def sample_groups(run: Run, copy, key, iterator, judge: Judge, phases: Phases) -> Sampled:
    """Rollouts of `grpo.prompts` groups with their rewards.

    With dynamic sampling, groups without reward variance are replaced by groups of further
    prompts, for some rounds; what is still missing then is filled with such groups.
    """
    c = run.config.grpo
    rounds: list[Sampled] = []
    kept = 0
    for i in range(c.dynamic_sampling_rounds if c.dynamic_sampling else 1):
        of_round = jax.random.fold_in(key, i)
        rounds.append(_sample_round(run, copy, of_round, iterator, judge, phases))
        kept += int(grpo.informative_groups(rounds[-1].rewards, c.group_size).sum())
        if kept >= c.prompts:
            break
    if len(rounds) == 1:
        return rounds[0]
    return select_groups(rounds, c.group_size, c.prompts)


def _sample_round(run: Run, copy, key, iterator, judge: Judge, phases: Phases) -> Sampled:
    c = run.config.grpo
    posed, own_prompts = distributed.together(_pose, run, iterator)
    prompts = distributed.gather(own_prompts)
    keys = jax.random.split(key, len(prompts[0]) * c.group_size)
    began = time.perf_counter()
    rollout = run.programs.rollout(copy, *prompts, keys, between=phases.leave_if_told)
    seconds = time.perf_counter() - began
    own = distributed.share(len(keys))
    examples = [example for example in posed for _ in range(c.group_size)]
    completions = run.prompter.completions(jax.tree.map(lambda x: x[own], rollout))
    began = time.perf_counter()
    answers = run.prompter.answers(completions)
    judged = distributed.gather(distributed.together(judge, answers, examples))
    reward_seconds = time.perf_counter() - began
    rewards, scores, terms = _penalized(run, judged, rollout)
    return Sampled(
        rollout,
        _among(examples, own, len(keys)),
        _among(completions, own, len(keys)),
        rewards,
        reward=float(rewards.mean()),
        accuracy=_mean(scores),
        informative=float(grpo.informative_groups(rewards, c.group_size).mean()),
        solved=_solved(scores, c.group_size),
        count=int(np.asarray(rollout.mask).sum()),
        seconds=seconds,
        reward_seconds=reward_seconds,
        terms={name: float(values.mean()) for name, values in terms.items()},
    )


def _mean(scores: np.ndarray) -> float:
    """Of the completions that were scored at all."""
    known = scores[np.isfinite(scores)]
    return float(known.mean()) if known.size else 0.0


def _solved(scores: np.ndarray, group_size: int) -> float:
    """The sampler's pass@k with k the size of a group; a score that is unknown solves nothing."""
    return float((scores.reshape(-1, group_size) > 0.5).any(axis=1).mean())


def _pose(run: Run, iterator) -> tuple[list[dict], tuple[np.ndarray, np.ndarray]]:
    """The next problems that this process poses, and their prompts."""
    posed = next(iterator)
    return posed, run.prompter.prompts(posed)


def _penalized(run: Run, judged: Judged, rollout: Rollout) -> Judged:
    """With the penalty of long completions, if there is one."""
    c, sampling = run.config.grpo, run.policy.sampling
    if c.overlong_buffer is None:
        return judged
    lengths = grpo.completion_lengths(rollout.tokens, rollout.mask, sampling.eos_ids)
    overlong = grpo.overlong_penalty(lengths, sampling.max_new_tokens, c.overlong_buffer)
    rewards = judged.rewards + np.float32(c.overlong_penalty) * overlong
    return judged._replace(rewards=rewards, terms={**judged.terms, "overlong": overlong})


def _among(own: list, rows: slice, total: int) -> list:
    """A list of `total` entries with this process's own at their rows, and None elsewhere."""
    return [None] * rows.start + own + [None] * (total - rows.stop)


def select_groups(rounds: list[Sampled], group_size: int, groups: int) -> Sampled:
    """`groups` groups of several rounds: those whose rewards differ, in order, then others."""
    rewards = np.concatenate([r.rewards for r in rounds])
    useful = grpo.informative_groups(rewards, group_size)
    order = np.argsort(~useful, kind="stable")[:groups]
    rows = (order[:, None] * group_size + np.arange(group_size)).ravel()
    rollout = jax.tree.map(
        lambda *parts: np.concatenate(parts)[rows],
        *[r.rollout for r in rounds],
    )
    examples = [example for r in rounds for example in r.examples]
    completions = [text for r in rounds for text in r.completions]
    return Sampled(
        rollout,
        [examples[i] for i in rows],
        [completions[i] for i in rows],
        rewards[rows],
        reward=float(rewards.mean()),
        accuracy=float(np.mean([r.accuracy for r in rounds])),
        informative=float(useful.mean()),
        solved=float(np.mean([r.solved for r in rounds])),
        count=sum(r.count for r in rounds),
        seconds=sum(r.seconds for r in rounds),
        reward_seconds=sum(r.reward_seconds for r in rounds),
        terms={x: float(np.mean([r.terms[x] for r in rounds])) for x in rounds[0].terms},
    )
