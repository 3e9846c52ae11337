"""Everything a run can be told: one tree of frozen dataclasses, read from YAML.

`load(path, overrides)` gives a `Config` or a `UserError` of one line. Each section checks itself;
`Config.check_devices` checks batches against the devices, once these are known.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from ais_jax import settings
from ais_jax.ais_config import AISConfig
from ais_jax.lora import LoraConfig
from ais_jax.mesh import MeshConfig
from ais_jax.models import LladaConfig, ModelConfig, Qwen3_5Config, Qwen3Config
from ais_jax.models.attention import KINDS
from ais_jax.models.blocks import KEPT
from ais_jax.models.cache import FORMATS, NONE
from ais_jax.models.published import PUBLISHED
from ais_jax.recipes import RECIPES
from ais_jax.sampling.diffusion_config import DiffusionConfig
from ais_jax.settings import at_least, setting
from ais_jax.tasks import (
    STYLES,
    TASKS,
    aime25,
    amc,
    arithmetic,
    countdown,
    d1,
    gsm8k,
    math,
    sudoku,
)
from ais_jax.tasks.rewards import Composition, of_mapping


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """The policy: a published checkpoint, or random parameters of given sizes."""

    checkpoint: str | None = setting(
        None, "folder in Hugging Face format, or a GGUF file; its sizes and tokenizer are taken"
    )
    published: str | None = setting(
        None, "sizes of a published model, with random parameters", choices=tuple(PUBLISHED)
    )
    family: str = setting(
        "qwen3",
        "the section whose sizes are taken otherwise",
        choices=("qwen3", "qwen3_5", "llada"),
    )
    qwen3: Qwen3Config = setting(doc="sizes of a Qwen3 model", default_factory=Qwen3Config)
    qwen3_5: Qwen3_5Config = setting(doc="sizes of a Qwen3.5 model", default_factory=Qwen3_5Config)
    llada: LladaConfig = setting(doc="sizes of a LLaDA model", default_factory=LladaConfig)
    lora: LoraConfig | None = setting(None, "train adapters instead of the whole model")

    def __post_init__(self):
        if self.checkpoint is not None and self.published is not None:
            raise ValueError(
                f"checkpoint={self.checkpoint!r} and published={self.published!r} exclude each "
                "other; leave one out"
            )

    @property
    def sizes(self) -> ModelConfig:
        """Sizes of a policy that has no checkpoint."""
        return PUBLISHED[self.published] if self.published else getattr(self, self.family)


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which problems are posed, and which are kept for evaluation."""

    name: str = setting("countdown", "the task", choices=TASKS)
    train_examples: int = setting(4000, "generated problems to train on")
    heldout_examples: int = setting(
        1024, "generated problems for evaluation, none of them trained on"
    )
    seed: int = setting(0, "seed of the generator")
    style: str | None = setting(
        None,
        "how problems are put: compact, or as a user's turn in the chat template in our words "
        "(instruct) or those of d1's training or evaluation (d1, d1_eval); null is instruct with a "
        "checkpoint that has a template",
        choices=STYLES,
    )
    enable_thinking: bool | None = setting(
        None, "argument of the chat template; null leaves it to the template"
    )
    system: str | None = setting(
        None, "system message of the chat template; null leaves it to the template"
    )
    eval_file: str | None = setting(
        None, "file of further problems to evaluate on at the end; skipped where it does not exist"
    )
    countdown: countdown.Options = setting(
        doc="options of the Countdown generator", default_factory=countdown.Options
    )
    sudoku: sudoku.Options = setting(
        doc="options of the Sudoku generator", default_factory=sudoku.Options
    )
    arithmetic: arithmetic.Options = setting(
        doc="options of the arithmetic generator", default_factory=arithmetic.Options
    )
    gsm8k: gsm8k.Options = setting(doc="training problems of GSM8K", default_factory=gsm8k.Options)
    math: math.Options = setting(doc="training problems of MATH", default_factory=math.Options)
    amc: amc.Options = setting(doc="training problems for AMC", default_factory=amc.Options)
    aime25: aime25.Options = setting(
        doc="training problems for AIME 2025", default_factory=aime25.Options
    )

    def __post_init__(self):
        at_least(self, 1, "train_examples", "heldout_examples")
        if self.style in ("d1", "d1_eval") and self.name not in d1.TASKS:
            raise ValueError(
                f"style={self.style} is for {', '.join(d1.TASKS)}, not {self.name}: take instruct"
            )

    @property
    def options(self):
        """Options of the chosen task's generator."""
        return getattr(self, self.name)


@dataclasses.dataclass(frozen=True)
class WarmupConfig:
    """Supervised training on demonstrations before GRPO."""

    steps: int = setting(0, "optimizer steps; 0 skips the warm-up")
    batch_size: int = setting(128, "demonstrations a step")
    learning_rate: float = setting(2e-3, "peak learning rate")
    learning_rate_warmup: int = setting(50, "steps of linear rise to the peak")
    weight_decay: float = setting(0.0, "AdamW weight decay")
    careless_fraction: float = setting(
        0.0, "share of demonstrations that have the right form but do not try to solve the problem"
    )
    seed: int | None = setting(
        None,
        "seed of the initial parameters and of this phase; null is train.seed. Runs that differ in "
        "train.seed alone then begin at one policy, as those of a published checkpoint do",
    )
    cache: bool = setting(True, "keep the result, and take it when the same warm-up is asked again")

    def __post_init__(self):
        at_least(self, 0, "steps", "learning_rate", "learning_rate_warmup", "seed")
        at_least(self, 0, "weight_decay", "careless_fraction")
        at_least(self, 1, "batch_size")
        if self.careless_fraction > 1:
            raise ValueError(f"careless_fraction={self.careless_fraction} must be at most 1")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled for training."""

    recipe: str = setting(
        "fp8",
        "quantization of the sampling copy; auto takes what pays on the device",
        choices=("auto", *RECIPES),
    )
    temperature: float = setting(1.0, "sampling temperature, the same in sampler and trainer")
    top_p: float = setting(1.0, "must stay 1: a truncated distribution biases every ratio")
    top_k: int = setting(0, "must stay 0, for the same reason")
    max_prompt_tokens: int = setting(32, "prompts are padded to this length")
    max_new_tokens: int = setting(32, "completions are cut at this length")
    score_chunk: int = setting(128, "positions whose logits exist at the same time while scoring")
    kv_cache: str = setting(
        NONE, "format of cached keys and values; none is train.dtype", choices=FORMATS
    )
    slots: int | None = setting(
        None, "completions sampled at a time, the others wait for a row; null takes all"
    )
    segment: int = setting(256, "tokens by which the cache grows")
    prefill_chunk: int = setting(512, "tokens of each prompt that are read at a time")
    compact_steps: int = setting(
        64, "a batch that has half ended shrinks if at least this many steps may follow"
    )
    diffusion: DiffusionConfig = setting(
        doc="how diffusion models are sampled and scored; others ignore it",
        default_factory=DiffusionConfig,
    )

    def __post_init__(self):
        at_least(self, 1, "max_prompt_tokens", "max_new_tokens", "score_chunk", "slots")
        at_least(self, 1, "segment", "prefill_chunk", "compact_steps")
        if self.temperature <= 0:
            raise ValueError(
                f"temperature={self.temperature} must be above 0: greedy rollouts have no ratio"
            )
        if self.top_p != 1 or self.top_k != 0:
            raise ValueError(
                f"top_p={self.top_p} and top_k={self.top_k} must be 1 and 0 in training: they "
                "renormalise the sampled distribution and bias every importance ratio"
            )


@dataclasses.dataclass(frozen=True)
class GRPOConfig:
    """Group-relative policy optimization: groups, advantages and how a batch is used."""

    batch_size: int = setting(128, "completions a step")
    group_size: int = setting(8, "completions of the same prompt")
    advantages: str = setting(
        "std",
        "reward minus group mean, divided by the group's standard deviation (std), undivided as in "
        "Dr.GRPO (mean), or minus the mean of the others (leave_one_out)",
        choices=("std", "mean", "leave_one_out"),
    )
    inner_epochs: int = setting(1, "times each rollout batch is gone through")
    minibatches: int = setting(1, "optimizer steps an inner epoch")
    micro_batch_size: int | None = setting(
        None, "completions a forward and backward pass; null takes the whole minibatch"
    )
    kl_coef: float = setting(0.0, "weight of the k3 KL to the policy before GRPO; 0 is off")
    mask_truncated: bool = setting(False, "leave completions without an end token out of the loss")
    dynamic_sampling: bool = setting(
        False, "replace groups whose rewards are all equal by sampling further prompts"
    )
    dynamic_sampling_rounds: int = setting(4, "sampling rounds a step at most")
    overlong_buffer: int | None = setting(
        None,
        "tokens below rollout.max_new_tokens from which on length is penalized, as in DAPO; null "
        "is never",
    )
    overlong_penalty: float = setting(
        1.0, "what the longest completions lose; those in the buffer lose less, in a line"
    )

    def __post_init__(self):
        at_least(self, 2, "group_size")
        at_least(self, 1, "overlong_buffer")
        at_least(self, 0, "overlong_penalty")
        at_least(
            self,
            1,
            "batch_size",
            "inner_epochs",
            "minibatches",
            "micro_batch_size",
            "dynamic_sampling_rounds",
        )
        at_least(self, 0, "kl_coef")
        if self.batch_size % self.group_size:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by group_size={self.group_size}"
            )
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by minibatches={self.minibatches}"
            )
        if self.minibatch_size % self.rows:
            raise ValueError(
                f"micro_batch_size={self.micro_batch_size} does not divide the minibatch of "
                f"{self.minibatch_size} completions (batch_size / minibatches)"
            )

    @property
    def prompts(self) -> int:
        """Prompts a step."""
        return self.batch_size // self.group_size

    @property
    def minibatch_size(self) -> int:
        """Completions an optimizer step."""
        return self.batch_size // self.minibatches

    @property
    def rows(self) -> int:
        """Completions a forward and backward pass."""
        return self.micro_batch_size or self.minibatch_size


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW by optax."""

    learning_rate: float = setting(2e-4, "peak learning rate")
    warmup_steps: int = setting(0, "updates of linear rise to the peak")
    schedule: str = setting("constant", "after the rise", choices=("constant", "cosine", "linear"))
    final_fraction: float = setting(0.1, "learning rate at the end, as a fraction of the peak")
    b1: float = setting(0.9, "decay of the first moment")
    b2: float = setting(0.95, "decay of the second moment")
    mu_dtype: str = setting(
        "float32",
        "dtype of the first moment; the second is float32, bfloat16 would lose its small changes",
        choices=("float32", "bfloat16"),
    )
    weight_decay: float = setting(0.0, "decoupled weight decay, on kernels and embeddings alone")
    max_grad_norm: float = setting(1.0, "clip of the global gradient norm")

    def __post_init__(self):
        at_least(self, 0, "learning_rate", "warmup_steps", "weight_decay", "final_fraction")
        if not (0 <= self.b1 < 1 and 0 <= self.b2 < 1):
            raise ValueError(f"b1={self.b1} and b2={self.b2} must be in [0, 1)")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm={self.max_grad_norm} must be above 0")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, precision and bookkeeping of the run."""

    steps: int = setting(100, "GRPO steps, one rollout batch each")
    seed: int = setting(0, "seed of parameters, data order and sampling")
    dtype: str = setting(
        "bfloat16",
        "dtype of activations; master weights stay float32",
        choices=("bfloat16", "float32"),
    )
    remat: bool = setting(False, "recompute each block in the backward pass to save memory")
    remat_keeps: str = setting(
        "nothing",
        "what remat does not compute again; products, the results of linears, take memory and save "
        "most of the time",
        choices=tuple(KEPT),
    )
    attention: str = setting(
        "auto",
        "to whole sequences: whole holds all scores at once, chunked those of some queries, cudnn "
        "(GPU) and splash (TPU) none; auto picks by device and length",
        choices=KINDS,
    )
    checkpoint_every: int = setting(50, "steps between checkpoints; 0 saves at the end alone")
    checkpoint_keep: int = setting(2, "newest checkpoints that are kept")
    eval_every: int = setting(0, "steps between held-out evaluations; 0 evaluates before and after")
    eval_before: bool = setting(True, "evaluate before the first step, too")
    eval_examples: int | None = setting(
        None, "held-out problems of the evaluations between; null is all, as before and after"
    )
    eval_samples: int = setting(
        1, "samples of each of these problems; of several pass@k is measured, too"
    )
    eval_batch_size: int = setting(256, "completions a batch in evaluation")
    eval_max_new_tokens: int | None = setting(
        None, "length of completions in evaluation; null takes rollout.max_new_tokens"
    )
    samples_every: int = setting(10, "steps between looks at sampled completions in samples.jsonl")
    max_skipped_updates: int = setting(10, "non-finite updates in a row that stop the run")
    data_workers: int = setting(
        0, "processes that read problems ahead; 0 reads them when a step begins"
    )
    wandb: str | None = setting(
        None, "project of Weights & Biases that metrics go to as well; null is none"
    )
    reward_timeout: float = setting(
        120.0,
        "seconds that the rewards of a batch may take; after that its rows are asked one by one, "
        "and one that takes as long has no reward",
    )
    watchdog_seconds: float = setting(
        600.0, "seconds after which a phase that has not ended is named; 0 is off"
    )

    def __post_init__(self):
        at_least(
            self,
            1,
            "steps",
            "eval_examples",
            "eval_samples",
            "eval_batch_size",
            "eval_max_new_tokens",
            "samples_every",
            "max_skipped_updates",
            "checkpoint_keep",
        )
        at_least(self, 0, "seed", "checkpoint_every", "eval_every", "data_workers")
        at_least(self, 0, "watchdog_seconds")
        if self.reward_timeout <= 0:
            raise ValueError(f"reward_timeout={self.reward_timeout} must be above 0")


def _section(cls, doc: str):
    return setting(doc=doc, default_factory=cls)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    model: PolicyConfig = _section(PolicyConfig, "the policy")
    task: TaskConfig = _section(TaskConfig, "the problems")
    warmup: WarmupConfig = _section(WarmupConfig, "supervised start")
    rollout: RolloutConfig = _section(RolloutConfig, "sampling")
    grpo: GRPOConfig = _section(GRPOConfig, "policy optimization")
    ais: AISConfig = _section(AISConfig, "mismatch correction and clipped loss")
    optimizer: OptimizerConfig = _section(OptimizerConfig, "AdamW")
    train: TrainConfig = _section(TrainConfig, "the run")
    mesh: MeshConfig = _section(MeshConfig, "devices")
    rewards: dict[str, Any] = setting(
        doc="what is rewarded and how much: task (its own reward), correct, boxed (by "
        "math-verify), format, d1, or a function of yours as module:function",
        default_factory=lambda: {"task": 1.0},
    )
    d1_compat: bool = setting(
        False, "rewards of d1 with the bugs of its published code, to repeat its runs"
    )
    output_dir: str | None = setting(
        None,
        "folder of the results; null is runs/<config name>-<time>. A run that is there goes on",
    )

    def __post_init__(self):
        buffer, longest = self.grpo.overlong_buffer, self.rollout.max_new_tokens
        if buffer is not None and buffer > longest:
            raise ValueError(
                f"grpo.overlong_buffer={buffer} must be at most rollout.max_new_tokens={longest}"
            )
        try:
            _ = self.composition
        except ValueError as error:
            raise ValueError(f"rewards: {error}") from None

    @property
    def composition(self) -> Composition:
        """`rewards` for the task."""
        return of_mapping(self.task.name, self.rewards, self.d1_compat)

    @property
    def initial_seed(self) -> int:
        """Seed of the initial parameters and of the warm-up."""
        return self.train.seed if self.warmup.seed is None else self.warmup.seed

    @property
    def sampled_at_once(self) -> int:
        """Completions that are sampled at a time."""
        return min(self.rollout.slots or self.grpo.batch_size, self.grpo.batch_size)

    def check_devices(self, batch_devices: int, processes: int = 1) -> None:
        """Refuses batches that cannot be shared out evenly.

        Args:
          batch_devices: those of data x fsdp, which share the rows.
          processes: share the prompts, whose completions they reward.

        Raises:
          ValueError: names the key.
        """
        micro = "micro_batch_size" if self.grpo.micro_batch_size else "batch_size / minibatches"
        sizes = {
            "grpo.batch_size": self.grpo.batch_size,
            f"grpo.{micro}": self.grpo.rows,
            "train.eval_batch_size": self.train.eval_batch_size,
        }
        if self.warmup.steps:
            sizes["warmup.batch_size"] = self.warmup.batch_size
        for key, rows in sizes.items():
            if rows % batch_devices:
                raise ValueError(
                    f"{key}={rows} is not divisible by the {batch_devices} devices of "
                    "mesh.data x mesh.fsdp"
                )
        if self.grpo.prompts % processes:
            raise ValueError(
                f"grpo.batch_size / grpo.group_size={self.grpo.prompts} prompts are not divisible "
                f"by the {processes} processes"
            )


def load(path: str | os.PathLike, overrides: Sequence[str] = ()) -> Config:
    """Reads a run's configuration.

    Args:
      path: a YAML file.
      overrides: `key=value` strings with dotted keys, such as "optimizer.learning_rate=1e-4".

    Raises:
      UserError: the file is missing or malformed, a key is unknown, a value is wrong.
    """
    return settings.load(Config, path, overrides)
