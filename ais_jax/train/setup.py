"""From a configuration to everything a run needs: examples, policy, mesh, compiled programs."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable

from ais_jax import mesh as mesh_lib
from ais_jax import models, tasks
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.models.tokenizers import CharTokenizer
from ais_jax.sampling import Policy, SamplingConfig
from ais_jax.sampling.prompts import Prompter
from ais_jax.train.optimizer import grpo_optimizer, learning_rate_schedule
from ais_jax.train.programs import Programs, build_programs


@dataclasses.dataclass(frozen=True)
class Run:
    """The fixed parts of a run."""

    config: Config
    directory: pathlib.Path
    policy: Policy
    prompter: Prompter
    programs: Programs
    learning_rate: Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Examples:
    """Problems, disjoint by puzzle."""

    train: list[dict]
    heldout: list[dict]
    real: list[dict]  # of task.eval_file, empty where the file is absent


def build_run(config: Config, directory: pathlib.Path) -> Run:
    """Builds policy, mesh and programs.

    Raises:
      UserError: batch, mesh and devices do not fit together.
    """
    task = tasks.get_task(config.task.name)
    tokenizer = CharTokenizer(task.ALPHABET)
    model_config = config.model
    if model_config.vocab_size == 0:
        model_config = dataclasses.replace(model_config, vocab_size=tokenizer.size)
    elif model_config.vocab_size < tokenizer.size:
        raise UserError(
            f"model.vocab_size={model_config.vocab_size} is below the tokenizer's {tokenizer.size}"
        )
    model = models.build(model_config, config.train.dtype, config.train.remat)
    sampling = SamplingConfig(
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        pad_id=tokenizer.pad_id,
        eos_ids=(tokenizer.eos_id,),
        token_count=tokenizer.size,
        score_chunk=config.rollout.score_chunk,
    )
    policy = Policy(model, sampling)
    mesh = mesh_lib.make_mesh(config.mesh)
    config.check_devices(mesh.shape["data"] * mesh.shape["fsdp"])
    optimizer = grpo_optimizer(config)
    schedule = learning_rate_schedule(config)
    updates = config.grpo.inner_epochs * config.grpo.minibatches
    return Run(
        config=config,
        directory=directory,
        policy=policy,
        prompter=Prompter(
            task, tokenizer, config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
        ),
        programs=build_programs(config, policy, optimizer, mesh),
        learning_rate=lambda step: float(schedule((step - 1) * updates)),
    )


def build_examples(config: Config) -> Examples:
    """Generates the problems; none of the real file's puzzles is among them."""
    task, c = tasks.get_task(config.task.name), config.task
    real: list[dict] = []
    if c.eval_file is not None:
        path = find_shared(c.eval_file)
        real = task.load(path) if path else []
    exclude = {task.key(example) for example in real}
    train = task.generate(c.train_examples, c.seed, "train", c.options, exclude)
    heldout = task.generate(c.heldout_examples, c.seed, "heldout", c.options, exclude)
    return Examples(train, heldout, real)


def find_shared(name: str) -> pathlib.Path | None:
    """A data file, as it stands or under $AIS_SHARED (default ../shared); None where absent."""
    shared = pathlib.Path(os.environ.get("AIS_SHARED", "../shared"))
    for path in (pathlib.Path(name), shared / name):
        if path.is_file():
            return path
    return None
