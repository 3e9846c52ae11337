"""`ais-jax eval`: a model on benchmarks, by a published protocol, resumable."""

from __future__ import annotations

import dataclasses
import datetime
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ais_jax import config as config_lib
from ais_jax import mesh as mesh_lib
from ais_jax import policies, settings, tasks
from ais_jax.errors import UserError
from ais_jax.evaluation import benchmarks, generations, table
from ais_jax.evaluation.benchmarks import Benchmark
from ais_jax.evaluation.generations import Generation
from ais_jax.mesh import MeshConfig
from ais_jax.models import Model
from ais_jax.models.tokenizers import Tokenizer
from ais_jax.recipes import RECIPES
from ais_jax.sampling import DiffusionConfig, Policy, sampling_config, sampling_copy
from ais_jax.sampling.prompts import Prompter
from ais_jax.sampling.types import check_truncation
from ais_jax.settings import at_least
from ais_jax.train.display import Column, Progress, console

_COLUMNS = (
    Column("right", "right", "{:.1%}".format),
    Column("tokens_per_second", "tok/s", "{:.0f}".format),
)
# An autoregressive sampler fills the rows that end with further prompts; so it is given several
# times what it holds, where that does not take minutes, and what is lost by a stop stays small.
_HOTTEST = 100
_ROUNDS = {"cpu": 1, "gpu": 4, "tpu": 4}


@dataclasses.dataclass(frozen=True)
class Options:
    """How to evaluate.

    Attributes:
      benchmarks: names in `benchmarks.BENCHMARKS`.
      lengths: most tokens of a completion; each is an evaluation of its own.
      recipes: quantization of what samples; each is an evaluation of its own.
      samples: completions of each problem.
      temperature: 0 is greedy.
      top_k, top_p: truncation of the sampled law, see `SamplingConfig`.
      protocol: "own" or "d1"; None takes d1's for diffusion models with a chat template.
      thinking: `enable_thinking` of the chat template; None leaves it to the template.
      data: of one benchmark, where its problems come from instead of the published file.
      limit: only the first problems.
      batch_size: completions at a time.
      seed: of the noise.
      diffusion: settings of `DiffusionConfig` that replace those of d1's protocol, of the run that
        is evaluated, or else blocks of 32 with one token a step.
      tensor: devices over which each layer is split; the others share the rows.
    """

    benchmarks: tuple[str, ...]
    lengths: tuple[int, ...] = (256,)
    recipes: tuple[str, ...] = ("none",)
    samples: int = 1
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    protocol: str | None = None
    thinking: bool | None = None
    data: str | None = None
    limit: int | None = None
    batch_size: int = 32
    seed: int = 0
    diffusion: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tensor: int = 1

    def __post_init__(self):
        try:
            at_least(self, 1, "samples", "limit", "batch_size", "tensor")
            at_least(self, 0, "temperature", "seed")
            check_truncation(self.top_k, self.top_p, 0.0)
        except ValueError as error:
            raise UserError(str(error)) from None
        if not self.temperature <= _HOTTEST:
            raise UserError(f"--temperature {self.temperature} must be from 0 to {_HOTTEST}")
        if self.seed >= 2**31:
            raise UserError(f"--seed {self.seed} must be from 0 to {2**31 - 1}")
        if min(self.lengths) < 1:
            raise UserError(f"--lengths {min(self.lengths)} must be at least 1")
        for recipe in self.recipes:
            if recipe not in RECIPES:
                raise UserError(f"--recipe {recipe!r} is unknown; choose of {', '.join(RECIPES)}")
        if self.temperature == 0 and self.samples > 1:
            raise UserError(
                f"--samples {self.samples} at temperature 0 would all be the same: raise "
                "--temperature"
            )
        if self.temperature == 0 and (self.top_k, self.top_p) != (0, 1):
            raise UserError("--top-k and --top-p change nothing at temperature 0: raise it")
        if self.data is not None and len(self.benchmarks) > 1:
            raise UserError(f"--data {self.data} is for one --task, and there are several")

    def recorded(self) -> dict:
        """What two runs must have in common to share a folder."""
        names = ("samples", "temperature", "top_k", "top_p", "thinking", "seed", "data")
        found = {name: getattr(self, name) for name in names}
        return found | {"diffusion": dict(self.diffusion) or None}


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A model that is ready to be asked."""

    policy: policies.LoadedPolicy
    tokenizer: Tokenizer
    model: Model
    mesh: jax.sharding.Mesh | None
    trained_with: config_lib.Config | None
    protocol: str
    thinking: bool | None  # as asked for, or as the run was trained
    system: str | None


def evaluate(
    model: str, options: Options, output: str | None = None, dtype: str = "float32"
) -> pathlib.Path:
    """Evaluates a model and returns the folder with every generation and the tables.

    What is in the folder already is not sampled again.

    Args:
      model: a checkpoint folder in Hugging Face format, a GGUF file, or the folder of a run.
      options: how.
      output: folder of the results; None takes eval/<model>-<time>.
      dtype: of parameters and activations, "bfloat16" or "float32".

    Raises:
      UserError: the model, the problems or the options cannot be used.
    """
    posed = {name: benchmarks.get_benchmark(name) for name in options.benchmarks}
    loaded = _load(model, options, dtype)
    examples = {name: _examples(x, loaded, options) for name, x in posed.items()}
    measures = {name: benchmarks.counts_of(x, loaded.protocol) for name, x in posed.items()}
    samplings = {length: _sampling(loaded, options, length) for length in options.lengths}
    prompters = {name: _prompter(x, loaded) for name, x in posed.items()}
    folder = pathlib.Path(output or _free_name(model))
    done = {
        "model": model,
        "weights": _identity(pathlib.Path(model)),
        "protocol": loaded.protocol,
        "dtype": dtype,
        **options.recorded(),
        "opens_thought": all(p.opens_thought for p in prompters.values()),
    }
    generations.open_folder(folder, done)
    results = []
    for recipe in options.recipes:
        copy = _copy(loaded, recipe)
        for name, benchmark in posed.items():
            for length, sampling in samplings.items():
                results.append(
                    _evaluate_one(
                        Policy(loaded.model, sampling),
                        copy,
                        _Unit(name, benchmark, length, recipe, measures[name]),
                        examples[name],
                        dataclasses.replace(prompters[name], max_new_tokens=length),
                        loaded,
                        options,
                        folder,
                    )
                )
        del copy
    table.write(folder, done, results)
    return folder


@dataclasses.dataclass(frozen=True)
class _Unit:
    """One cell of the table."""

    name: str
    benchmark: Benchmark
    length: int
    recipe: str
    measures: dict[str, benchmarks.Count]


def _load(model: str, options: Options, dtype: str) -> _Loaded:
    many = len(jax.devices()) > 1
    layout = MeshConfig(data=-1, tensor=options.tensor)
    mesh = mesh_lib.make_mesh(layout) if many or options.tensor > 1 else None
    if mesh is not None and options.batch_size % mesh_lib.batch_devices(mesh):
        raise UserError(
            f"--batch-size {options.batch_size} is not divisible by the "
            f"{mesh_lib.batch_devices(mesh)} devices that share it"
        )
    policy = policies.load_policy(model, dtype, None if mesh is None else layout)
    tokenizer = policies.need_tokenizer(policy, model)
    folder = pathlib.Path(model)
    trained = config_lib.load(folder / "config.yaml") if policies.is_run(folder) else None
    chat = tokenizer.has_chat_template
    protocol = options.protocol
    if protocol is None:
        protocol = "d1" if policy.model.mask_id is not None and chat else "own"
    if options.thinking is not None and not chat:
        raise UserError(f"--thinking needs a chat template, and {model} has none")
    structure = dataclasses.replace(policy.structure, mesh=mesh)
    thinking, system = options.thinking, None
    if trained is not None and protocol == "own":  # d1's prompts are what they are
        thinking = trained.task.enable_thinking if thinking is None else thinking
        system = trained.task.system
    return _Loaded(policy, tokenizer, structure, mesh, trained, protocol, thinking, system)


def _examples(benchmark: Benchmark, loaded: _Loaded, options: Options) -> list[dict]:
    trained = loaded.trained_with
    same = trained is not None and trained.task.name == benchmark.task
    of_run = trained.task.options if trained is not None and same else None
    found = benchmarks.load_examples(benchmark, options.data, loaded.protocol, of_run)
    return found[: options.limit]


def _sampling(loaded: _Loaded, options: Options, length: int):
    """How completions of a length are sampled. Raises UserError where that does not fit."""
    model, trained = loaded.policy.model, loaded.trained_with
    if options.diffusion and model.mask_id is None:
        raise UserError("--diffusion is for diffusion models, and this one is autoregressive")
    try:
        diffusion = DiffusionConfig(min(32, length))
        if loaded.protocol == "d1":
            diffusion = DiffusionConfig(block_length=32, steps=max(length // 2, 1))
        elif trained is not None and model.mask_id is not None:
            rollout = trained.rollout
            diffusion = rollout.diffusion.resized(rollout.max_new_tokens, length)
        changed = {**settings.to_dict(diffusion), **options.diffusion}
        return sampling_config(
            model,
            loaded.tokenizer,
            settings.build(DiffusionConfig, changed, "--diffusion"),
            max_new_tokens=length,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            slots=None if model.mask_id is not None else options.batch_size,
        )
    except ValueError as error:
        raise UserError(f"--lengths {length}: {error}") from None


def _copy(loaded: _Loaded, recipe: str):
    platform = jax.devices()[0].platform
    return jax.jit(lambda params: sampling_copy(loaded.model, params, recipe, platform))(
        loaded.policy.params
    )


def _evaluate_one(
    policy: Policy,
    copy,
    unit: _Unit,
    examples: list[dict],
    prompter: Prompter,
    loaded: _Loaded,
    options: Options,
    folder: pathlib.Path,
) -> table.Result:
    """Samples what is not there yet, and says what all of it is worth."""
    path = folder / f"{unit.name}-{unit.length}-{unit.recipe}.jsonl"
    task = tasks.get_task(unit.benchmark.task)
    wanted = [(i, s) for i in range(len(examples)) for s in range(options.samples)]
    done = {(g.index, g.sample): g for g in generations.read(path)}
    for (index, _), generation in done.items():
        if index < len(examples) and generation.problem != task.key(examples[index]):
            raise UserError(f"{path} is of other problems: take another --output")
    missing = [pair for pair in wanted if pair not in done]
    sampled, seconds = 0, 0.0
    label = f"{unit.benchmark.title} {unit.length} {unit.recipe}"
    if missing:
        prompter = prompter.fitting(examples)
    headline = next(iter(unit.measures))
    with Progress(len(wanted), label, columns=_COLUMNS, initial_step=len(done)) as progress:
        for part in _parts(missing, policy, options.batch_size):
            began = time.perf_counter()
            found = _generate(policy, copy, part, examples, prompter, loaded, options, unit)
            seconds += time.perf_counter() - began
            sampled += sum(g.tokens for g in found)
            generations.append(path, found)
            done |= {(g.index, g.sample): g for g in found}
            right = sum(g.counts[headline][0] for g in done.values())
            total = sum(g.counts[headline][1] for g in done.values())
            rate = {"right": right / max(total, 1), "tokens_per_second": sampled / seconds}
            progress.update(len(done), rate)
    kept = [done[pair] for pair in wanted]
    return table.summarize(
        unit.name, unit.benchmark.title, unit.length, unit.recipe, kept, options.samples,
        seconds=seconds, sampled=sampled,
    )  # fmt: skip


def _parts(pairs: list, policy: Policy, batch_size: int) -> Iterator[list]:
    rounds = 1 if policy.sampling.diffusion else _ROUNDS[jax.default_backend()]
    size = rounds * batch_size
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]


def _generate(
    policy: Policy,
    copy,
    pairs: Sequence[tuple[int, int]],
    examples: list[dict],
    prompter: Prompter,
    loaded: _Loaded,
    options: Options,
    unit: _Unit,
) -> list[Generation]:
    """Samples and judges completions of (problem, sample) pairs.

    The noise of a completion depends on the seed and its pair alone.
    """
    size = options.batch_size
    padded = list(pairs) + [pairs[-1]] * (-len(pairs) % size)
    keys = _keys(options.seed, np.array(padded))
    posed = [examples[index] for index, _ in padded]
    rollout = policy.rollout(copy, *prompter.prompts(posed), keys, loaded.mesh)
    texts = prompter.completions(rollout)[: len(pairs)]
    answered = prompter.answers(texts)
    posed = posed[: len(pairs)]
    truncated = np.asarray(rollout.truncated).tolist()[: len(pairs)]
    read = benchmarks.with_ends(answered, truncated, loaded.protocol)
    counts = {name: count(read, posed) for name, count in unit.measures.items()}
    extract = getattr(prompter.task, "extract", lambda text: None)
    lengths = np.asarray(rollout.mask).sum(axis=1)
    return [
        Generation(
            index=index,
            sample=sample,
            completion=texts[row],
            tokens=int(lengths[row]),
            truncated=truncated[row],
            counts={
                name: (int(right[row]), int(total[row])) for name, (right, total) in counts.items()
            },
            answer=extract(answered[row]),
            problem=prompter.task.key(posed[row]),
        )
        for row, (index, sample) in enumerate(pairs)
    ]


@jax.jit
def _keys(seed: jax.Array, pairs: jax.Array) -> jax.Array:
    fold = jax.random.fold_in
    return jax.vmap(lambda pair: fold(fold(jax.random.key(seed), pair[0]), pair[1]))(pairs)


def _prompter(benchmark: Benchmark, loaded: _Loaded) -> Prompter:
    """How the problems are put; lengths come later."""
    trained, style = (
        loaded.trained_with,
        "instruct" if loaded.tokenizer.has_chat_template else "compact",
    )
    if loaded.protocol == "d1":
        style = "d1_eval"
    elif trained is not None and trained.task.style is not None:
        style = trained.task.style
    return Prompter(
        tasks.get_task(benchmark.task),
        loaded.tokenizer,
        max_prompt_tokens=1,  # grows to the longest prompt
        max_new_tokens=1,
        style=style,
        chat=loaded.tokenizer.has_chat_template and style != "compact",
        enable_thinking=loaded.thinking,
        system=loaded.system,
        mask_id=loaded.policy.model.mask_id,
    )


def _identity(path: pathlib.Path) -> list[str]:
    """Names, sizes and times of the files that hold a model; of a run, its newest checkpoint."""
    if policies.is_run(path):
        steps = [p for p in (path / "checkpoints").iterdir() if p.name.isdecimal()]
        files = sorted(steps, key=lambda p: int(p.name))[-1:]
        return [f"step {file.name} {file.stat().st_mtime_ns}" for file in files]
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return [f"{x.name} {x.stat().st_size} {x.stat().st_mtime_ns}" for x in files]


def _free_name(model: str) -> str:
    name = pathlib.Path(model).resolve().name
    return f"eval/{name}-{datetime.datetime.now():%Y%m%d-%H%M%S}"


def say(folder: pathlib.Path) -> None:
    """Shows the tables of a folder."""
    out: Callable[[str], object] = console().print
    out((folder / table.FILE).read_text())
    out(f"results: {folder}")
