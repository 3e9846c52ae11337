"""From a configuration to everything a run needs: examples, policy, mesh, compiled programs."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from ais_jax import mesh as mesh_lib
from ais_jax import models, tasks
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.models import LladaConfig, Model, ModelConfig, Params, PretrainedModel
from ais_jax.models.checkpoint import Checkpoint, open_model, tokenizer_of
from ais_jax.models.naming import Tensor
from ais_jax.models.tokenizers import CharTokenizer, Tokenizer, check_ids
from ais_jax.recipes import choose_recipe
from ais_jax.sampling import Policy, SamplingConfig, sampling_config
from ais_jax.sampling.prompts import Prompter
from ais_jax.tasks.common import locate
from ais_jax.train.optimizer import grpo_optimizer, learning_rate_schedule
from ais_jax.train.programs import Programs, build_programs


class Source(NamedTuple):
    """A checkpoint, checked."""

    checkpoint: Checkpoint
    tensors: list[Tensor]

    def pretrained(self, model: Model) -> PretrainedModel:
        """`model`, knowing where it comes from, as `save_pretrained` wants it."""
        return PretrainedModel(model.config, model.dtype, model.remat, checkpoint=self.checkpoint)


@dataclasses.dataclass(frozen=True)
class Run:
    """The fixed parts of a run.

    Attributes:
      recipe: quantization of the sampling copy, and why where it was chosen here.
      frozen: the part of the policy that is not trained; None if all of it is.
      source: the checkpoint that the policy starts from; None for random parameters.
    """

    config: Config
    directory: pathlib.Path
    policy: Policy
    prompter: Prompter
    programs: Programs
    learning_rate: Callable[[int], float]
    recipe: tuple[str, str | None]
    source: Source | None = None
    frozen: Params | None = None

    def join(self, trainable: Params) -> Params:
        """What the model computes with."""
        return self.policy.join(trainable, self.frozen)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Problems, disjoint by puzzle."""

    train: list[dict]
    heldout: list[dict]
    real: list[dict]  # of task.eval_file, empty where the file is absent


def build_run(config: Config, directory: pathlib.Path, devices: list | None = None) -> Run:
    """Builds policy, mesh and programs; of a checkpoint only headers are read.

    Args:
      config: the whole run.
      directory: where results go; not touched here.
      devices: those of the mesh, also ones that can only be compiled for; None takes all here.

    Raises:
      UserError: mesh and devices do not fit together, or the checkpoint cannot be used.
    """
    task = tasks.get_task(config.task.name)
    source, model, tokenizer = _open_policy(config, task)
    mesh = mesh_lib.make_mesh(config.mesh, devices)
    model = dataclasses.replace(
        model,
        mesh=mesh,
        attention=config.train.attention,
        remat_keeps=config.train.remat_keeps,
    )
    policy = Policy(model, _sampling(config, model, tokenizer), config.model.lora)
    schedule = learning_rate_schedule(config)
    updates = config.grpo.inner_epochs * config.grpo.minibatches
    recipe = _recipe(config, mesh)
    return Run(
        config=config,
        directory=directory,
        policy=policy,
        prompter=_prompter(config, task, tokenizer, model.mask_id),
        programs=build_programs(config, policy, grpo_optimizer(config), mesh, recipe[0]),
        learning_rate=lambda step: float(schedule((step - 1) * updates)),
        recipe=recipe,
        source=source,
    )


def _recipe(config: Config, mesh: jax.sharding.Mesh) -> tuple[str, str | None]:
    """The recipe, and why if it was left to the device."""
    recipe = config.rollout.recipe
    if recipe != "auto":
        return recipe, None
    device = mesh.devices.flat[0]
    rows = -(-config.sampled_at_once // mesh_lib.batch_devices(mesh))
    return choose_recipe(device.platform, device.device_kind, rows)


def _open_policy(config: Config, task) -> tuple[Source | None, Model, Tokenizer]:
    dtype, remat = config.train.dtype, config.train.remat
    tokenizer: Tokenizer
    if config.model.checkpoint is not None:
        checkpoint, model, tensors = open_model(config.model.checkpoint, dtype, remat)
        tokenizer, sizes = tokenizer_of(checkpoint), model.config
        source = Source(checkpoint, tensors)
    else:
        source, tokenizer = None, CharTokenizer(task.ALPHABET)
        sizes = _fit_vocabulary(config.model.sizes, tokenizer)
        model = models.build(sizes, dtype, remat)
    check_ids(tokenizer, sizes.vocab_size, config.model.checkpoint or "model")
    return source, model, tokenizer


def _fit_vocabulary(sizes: ModelConfig, tokenizer: CharTokenizer) -> ModelConfig:
    """Sizes with a row for every id of the tokenizer, and one more for a mask token."""
    if sizes.vocab_size:
        return sizes
    if isinstance(sizes, LladaConfig):
        return dataclasses.replace(
            sizes, vocab_size=tokenizer.size + 1, mask_token_id=tokenizer.size
        )
    return dataclasses.replace(sizes, vocab_size=tokenizer.size)


def _sampling(config: Config, model: Model, tokenizer: Tokenizer) -> SamplingConfig:
    sampling = sampling_config(
        model,
        tokenizer,
        config.rollout.diffusion,
        max_new_tokens=config.rollout.max_new_tokens,
        temperature=config.rollout.temperature,
        score_chunk=config.rollout.score_chunk,
        kv_cache=config.rollout.kv_cache,
        slots=config.rollout.slots,
        segment=config.rollout.segment,
        prefill_chunk=config.rollout.prefill_chunk,
        compact_steps=config.rollout.compact_steps,
    )
    if config.train.eval_max_new_tokens is not None:
        sampling.resized(config.train.eval_max_new_tokens)  # said before anything is trained
    return sampling


def _prompter(config: Config, task, tokenizer: Tokenizer, mask_id: int | None) -> Prompter:
    template = tokenizer.has_chat_template
    style = config.task.style or ("instruct" if template else "compact")
    return Prompter(
        task,
        tokenizer,
        config.rollout.max_prompt_tokens,
        config.rollout.max_new_tokens,
        style=style,
        chat=template and style != "compact",
        enable_thinking=config.task.enable_thinking,
        system=config.task.system,
        mask_id=mask_id,
    )


def initial_params(run: Run) -> tuple[Params, Params | None]:
    """What is trained, at its start, and what is frozen (None if nothing is).

    Raises:
      UserError: a file of the checkpoint cannot be read.
    """
    config, programs, model = run.config, run.programs, run.policy.model
    key = jax.random.key(config.initial_seed)
    lora = run.policy.lora
    if run.source is None and lora is None:
        return programs.init_trainable(key), None
    if run.source is None:
        base = programs.init_base(key)
    else:
        shardings = models.shardings_of(model, programs.mesh)
        dtype = "float32" if lora is None else config.train.dtype
        base = models.load_params(*run.source, model, shardings, dtype)
    if lora is None:
        return base, None
    return programs.init_trainable(key), programs.hold(base)


def drop_long(examples: Examples, prompter: Prompter) -> Examples:
    """Without the training problems whose prompts are above `max_prompt_tokens`.

    Raises:
      UserError: none is left.
    """
    room = prompter.max_prompt_tokens
    lengths = [len(prompter.prompt_ids(example)) for example in examples.train]
    train = [x for x, n in zip(examples.train, lengths, strict=True) if n <= room]
    if not train:
        raise UserError(
            f"all prompts are above rollout.max_prompt_tokens={room}, the shortest has "
            f"{min(lengths)} tokens; raise it"
        )
    return dataclasses.replace(examples, train=train)


def build_examples(config: Config) -> Examples:
    """Generates the problems, or reads them; none of the real file's is among them.

    Raises:
      UserError: a file is malformed, or that of the training problems is absent.
      ValueError: there are fewer problems than asked for.
    """
    task, c = tasks.get_task(config.task.name), config.task
    real: list[dict] = []
    if c.eval_file is not None:
        path = locate(c.eval_file)
        real = task.load(path) if path else []
    exclude = {task.key(example) for example in real}
    train = task.generate(c.train_examples, c.seed, "train", c.options, exclude)
    heldout = task.generate(c.heldout_examples, c.seed, "heldout", c.options, exclude)
    return Examples(train, heldout, real)
