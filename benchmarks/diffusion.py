"""The masked diffusion sampler, each choice beside its alternative in one run.

    python benchmarks/diffusion.py --model 100m --repeats 3 --output FILE

a  output layer and draw on the active block, against the whole canvas
b  caches: none, prefix, dual; and how far they bend the log-probs
c  schedules: a fixed number of tokens a step, threshold, factor
d  bfloat16 against a quantized copy, and the share of the fastest matmul that is reached

The variants of a comparison take turns, so a machine that drifts shifts all of them. Weights are
random: times are those of a trained model, texts and confidences are not.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import pathlib
import shlex
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import interleave, load, machine, spread, table

from ais_jax import quantize as quant
from ais_jax.models import LladaConfig, Model, Params, cast_params, positions_of
from ais_jax.sampling import DiffusionConfig, Policy, Rollout, SamplingConfig, estimators
from ais_jax.sampling import logps as lp

TOKENS_A_STEP = 2
RATES = ("", "s a rollout", "tokens/s", "times the first", "forwards: mean row", "slowest row")


@dataclasses.dataclass(frozen=True)
class Job:
    """A model with the canvas that it fills. `wide` has the vocabulary of part a."""

    config: LladaConfig
    wide: LladaConfig
    batches: tuple[int, ...]
    prompt: int
    length: int
    block: int
    recipe: str

    def policy(self, **settings) -> Policy:
        """The sampler, at temperature 1; the static schedule commits `TOKENS_A_STEP`."""
        steps = self.length // TOKENS_A_STEP
        diffusion = DiffusionConfig(self.block, steps, segments=0, **settings)
        last = self.config.mask_token_id
        sampling = SamplingConfig(self.length, 1, 0, (1,), last, mask_id=last, diffusion=diffusion)
        return Policy(Model(self.config), sampling)

    @property
    def canvas(self) -> str:
        sizes = f"Canvas {self.prompt} + {self.length}, blocks of {self.block}"
        return f"{sizes}, vocabulary {self.config.vocab_size:,}"

    def inputs(self, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Random prompts, their mask, a key a row."""
        shape = (rows, self.prompt)
        prompts = jax.random.randint(jax.random.key(1), shape, 2, self.config.mask_token_id)
        return prompts, jnp.ones(shape, bool), jax.random.split(jax.random.key(2), rows)


def job_of(name: str, recipe: str | None) -> Job:
    recipe = recipe or ("fp8" if jax.default_backend() == "gpu" else "int8")

    large = (4096, 12288, 32, 32, 32)
    sizes = {"tiny": (64, 128, 2, 4, 4), "100m": (768, 2048, 12, 12, 12), "8b": large}[name]

    def config(vocabulary: int) -> LladaConfig:
        return LladaConfig(vocabulary, *sizes, mask_token_id=vocabulary - 1)

    return {
        "tiny": Job(config(256), config(1024), (4,), 16, 16, 8, recipe),
        "100m": Job(config(8192), config(32_000), (8,), 64, 64, 32, recipe),
        "8b": Job(config(126_464), config(126_464), (8, 32), 200, 256, 32, recipe),
    }[name]


def init(job: Job) -> Params:
    """Random bfloat16 parameters whose logits and attention scores vary as those of a trained one.

    As they are initialized, every distribution would be nearly flat: no token is ever confident,
    every query sees the mean of all keys, and caches and schedules have nothing to get wrong.
    """
    unit = 1 / (0.02 * job.config.d_model**0.5)  # brings outputs of a kernel to a deviation of 1
    factors = {"q_proj": 1.3 * unit, "k_proj": 1.3 * unit, "lm_head": 13 * unit}

    def create(key):
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x * factors.get(path[-1].key, 1.0), Model(job.config).init(key)
        )
        return cast_params(Model(job.config), params, "bfloat16")

    return jax.jit(create)(jax.random.key(0))


def output_layer(job: Job, repeats: int) -> list[str]:
    """One step with the output layer, and the draw, over all of the canvas or the active block."""
    job = dataclasses.replace(job, config=job.wide)
    policy, mask_id = job.policy(), job.config.mask_token_id
    prompts, mask, keys = job.inputs(job.batches[0])
    ids = jnp.pad(prompts, ((0, 0), (0, job.length)), constant_values=mask_id)
    mask = jnp.pad(mask, ((0, 0), (0, job.length)), constant_values=True)
    arguments = (init(job), ids, mask, keys, jnp.int32(job.prompt))
    programs: dict[str, Any] = {
        name: jax.jit(functools.partial(_step, policy, *wide)).lower(*arguments).compile()
        for name, wide in {
            "both on the whole canvas": (True, True),
            "output layer on the whole canvas, draw on the block": (True, False),
            "both on the block, as the sampler": (False, False),
        }.items()
    }
    variants = {k: functools.partial(p, *arguments) for k, p in programs.items()}
    seconds, _ = interleave(variants, repeats)
    *_, block = seconds.values()
    lines = []
    for name, s in seconds.items():
        held = programs[name].memory_analysis().temp_size_in_bytes / 2**20
        lines.append((name, spread(1e3 * s, 0), f"{np.median(s / block):.2f}", f"{held:,.0f}"))
    head = ("", "ms a step", "times the block's", "temporaries, MiB")
    return [f"{job.canvas}. A step: forward, output layer, draw, choice.", "", *table(head, *lines)]


def _step(policy, wide_head, wide_draw, params, ids, mask, keys, start):
    """The canvas after a step. What is wide is done for every position and then cut."""
    model, sampling, length = policy.model, policy.sampling, policy.sampling.settings.block_length

    def cut(x):
        return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)

    hidden, _ = model.hidden(params, ids, positions_of(mask), mask)
    logits = model.unembed(params, hidden if wide_head else cut(hidden))
    logits = cut(logits) if wide_head and not wide_draw else logits
    law = lp.log_probs(logits, sampling.temperature, sampling.allowed_ids(logits.shape[-1]))
    tokens, logps = (cut(x) if wide_draw else x for x in lp.sample(law, keys))
    sure = jnp.where(cut(ids) == sampling.mask_id, logps, -jnp.inf)
    chosen = sure >= jax.lax.top_k(sure, TOKENS_A_STEP)[0][:, -1:]
    new = jnp.where(chosen, tokens.astype(ids.dtype), cut(ids))
    return jax.lax.dynamic_update_slice_in_dim(ids, new, start, axis=1)


def rates(job: Job, params: Params, policies: dict[str, Policy], repeats: int):
    """(the columns `RATES`, the rollout) of each policy."""
    arguments = (params, *job.inputs(job.batches[0]))
    variants = {k: functools.partial(p.rollout, *arguments) for k, p in policies.items()}
    seconds, rollouts = interleave(variants, repeats)
    first, columns = next(iter(seconds.values())), {}
    for name, s in seconds.items():
        forwards, tokens = np.asarray(rollouts[name].forwards), rollouts[name].tokens.size
        speed = (f"{tokens / np.median(s):,.1f}", f"{np.median(first / s):.2f}")
        columns[name] = (name, spread(s, 2), *speed, f"{forwards.mean():.1f}", forwards.max())
    return columns, rollouts


def caches(job: Job, repeats: int) -> list[str]:
    """Whole rollouts with each cache, and their log-probs against an uncached score."""
    policies = {name: job.policy(cache=name) for name in ("none", "prefix", "dual")}
    params = init(job)
    columns, rollouts = rates(job, params, policies, repeats)
    score = jax.jit(functools.partial(_uncached, job.policy()))
    errors = {name: np.asarray(score(params, r)) for name, r in rollouts.items()}
    lines = [(*columns[k], f"{np.mean(e):.4f}", f"{np.max(e):.2f}") for k, e in errors.items()]
    head = (*RATES, "mean abs. difference of log-probs, nats", "largest")
    text = (
        f"{job.canvas}, {TOKENS_A_STEP} tokens a step. A rollout's log-probs against those of "
        "the same tokens at the same canvases without a cache; none against none is rounding."
    )
    return [text, "", *table(head, *lines)]


def _uncached(policy: Policy, params: Params, rollout: Rollout) -> jax.Array:
    """[B, T]: by how much a rollout's log-probs are off an exact replay of its steps."""
    plan = estimators.trajectory(rollout, policy.sampling)
    logps, _ = policy.score(params, rollout._replace(plan=plan))
    return jnp.abs(logps - rollout.logps)


def schedules(job: Job, repeats: int) -> list[str]:
    """Whole rollouts with each schedule."""
    policies = {
        f"static, {TOKENS_A_STEP} tokens a step": job.policy(),
        "threshold 0.9": job.policy(schedule="threshold", threshold=0.9),
        "threshold 0.7": job.policy(schedule="threshold", threshold=0.7),
        "factor 1": job.policy(schedule="factor", factor=1.0),
    }
    columns, rollouts = rates(job, init(job), policies, repeats)
    lines = [(*columns[k], f"{np.mean(np.exp(r.logps)):.2f}") for k, r in rollouts.items()]
    text = (
        f"{job.canvas}. How many forwards the adaptive schedules take is a matter of these "
        "random weights, whose logits were scaled to a standard deviation of 13 so that some "
        "tokens are sure; the time of a forward is not. A batch waits for its slowest row."
    )
    return [text, "", *table((*RATES, "mean probability of a token when committed"), *lines)]


def quantized(job: Job, repeats: int) -> list[str]:
    """Whole rollouts of the bfloat16 and the quantized policy, for each number of rows."""
    params = init(job)
    copies = {"bfloat16": params, job.recipe: quant.prepare(quant.quantize(params, job.recipe))}
    rollout, lines = job.policy().rollout, []
    for rows in job.batches:
        inputs = job.inputs(rows)
        variants = {k: functools.partial(rollout, p, *inputs) for k, p in copies.items()}
        seconds, _ = interleave(variants, repeats)
        ceilings = matmul_ceilings(job, rows, max(repeats, 5))
        work = job.length // TOKENS_A_STEP * forward_operations(job, rows)
        for name, s in seconds.items():
            speed_up = spread(seconds["bfloat16"] / s, 2) if name != "bfloat16" else "1"
            tokens = f"{rows * job.length / np.median(s):,.1f}"
            reached, top = work / np.median(s), ceilings[name]
            rates = (f"{reached / 1e9:,.0f}", f"{top / 1e9:,.0f}", f"{100 * reached / top:.0f} %")
            lines.append((rows, name, spread(s, 2), tokens, speed_up, *rates))
    columns = ("s a rollout", "tokens/s", "times bfloat16", "Gop/s", "ceiling, Gop/s", "share")
    text = (
        f"{job.canvas}, {TOKENS_A_STEP} tokens a step. Operations of linears, attention and output "
        "layer, of which only the linears are quantized; the ceiling is the rate of the bare "
        "products of the linears' shapes in that format."
    )
    return [text, "", *table(("rows", "linears", *columns), *lines)]


def linear_shapes(config: LladaConfig) -> list[tuple[int, int]]:
    """(in, out) of the linears of a block."""
    d, f = config.d_model, config.mlp_hidden_size
    return [(d, d)] * 4 + [(d, f)] * 2 + [(f, d)]


def forward_operations(job: Job, rows: int) -> float:
    """Operations of a forward with the output layer on a block."""
    config, canvas = job.config, job.prompt + job.length
    weights = sum(a * b for a, b in linear_shapes(config))
    block = 2 * rows * canvas * weights + 4 * rows * canvas**2 * config.d_model
    return config.n_layers * block + 2 * rows * job.block * config.d_model * config.vocab_size


def matmul_ceilings(job: Job, rows: int, repeats: int) -> dict[str, float]:
    """Operations a second of the bare products, weighted as in the model, by format."""
    count = rows * (job.prompt + job.length)
    shapes = linear_shapes(job.config)
    product = jax.jit(_product, static_argnums=(2, 3))
    exact = jnp.int32 if job.recipe.startswith("int") else jnp.float32
    variants: dict[tuple, Callable] = {}
    for inner, outer in set(shapes):
        x = jax.random.normal(jax.random.key(3), (count, inner), jnp.bfloat16)
        w = jax.random.normal(jax.random.key(4), (inner, outer), jnp.bfloat16)
        copy = quant.prepare(quant.quantize({"q_proj": w}, job.recipe))["q_proj"]
        codes = jnp.clip(jnp.round(x * 32), -127, 127).astype(copy.values.dtype)
        plain = functools.partial(product, x, w, False, jnp.float32)
        coded = functools.partial(product, codes, copy.values, copy.transposed, exact)
        variants |= {("bfloat16", inner, outer): plain, (job.recipe, inner, outer): coded}
    seconds, _ = interleave(variants, repeats)
    work = 2 * count * sum(a * b for a, b in shapes)
    times = {n: sum(np.median(seconds[(n, *s)]) for s in shapes) for n in ("bfloat16", job.recipe)}
    return {name: work / time for name, time in times.items()}


def _product(x: jax.Array, w: jax.Array, transposed: bool, exact) -> jax.Array:
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=exact)


PARTS = {
    "a": ("Output layer on the block or on the whole canvas", output_layer),
    "b": ("Caches", caches),
    "c": ("Schedules", schedules),
    "d": ("Quantized against bfloat16", quantized),
}


def header(args: argparse.Namespace, job: Job) -> list[str]:
    c = job.config
    count = sum(x.size for x in jax.tree.leaves(Model(job.config).abstract_params())) / 1e6
    return [
        f"# Masked diffusion sampler: {args.model}\n",
        f"    python {shlex.join(sys.argv)}\n",
        f"{machine()}. {load()} as it began.\n",
        f"LLaDA of {count:,.1f} M random bfloat16 parameters at a vocabulary of "
        f"{c.vocab_size:,}: {c.n_layers} blocks of width {c.d_model}, {c.n_heads} heads. "
        f"{job.batches[0]} rows unless a table says otherwise. Medians (least to largest) of "
        f"{args.repeats} repeats, taken in turns.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("tiny", "100m", "8b"), default="tiny")
    parser.add_argument("--only", default="a,b,c,d", help="parts, with commas")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", choices=("int8", "int4", "fp8", "fp4"), help="of part d")
    parser.add_argument("--output", type=pathlib.Path, help="file for the tables")
    args = parser.parse_args()
    parts = args.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only {args.only} must be some of a,b,c,d")
    lines = header(args, job := job_of(args.model, args.recipe))
    print("\n".join(lines), flush=True)
    for part in parts:
        title, measure = PARTS[part]
        new = [f"\n## {title}\n", *measure(job, args.repeats), f"\n{load()} as it ended."]
        print("\n".join(new), flush=True)
        lines += new
        if args.output:
            args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
