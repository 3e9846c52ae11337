"""Compile time and memory of GRPO at published sizes, without allocating anything.

    python benchmarks/budget_8b.py Qwen3-8B --lora 32

Compiles the forward pass and the update ahead of time, and adds up the memory of one device by
class of tensor. Sizes of arrays are exact; temporaries are what the compiler plans, an estimate.
On a CPU they include float32 copies of bfloat16 weights that accelerators do not make. To compile
for a GPU that is not there, install jax-cuda13-plugin and jax-cuda13-pjrt (--no-deps, the version
of jax) and give XLA's description of it, a GpuTargetConfigProto as text:

    JAX_PLATFORMS=cpu XLA_FLAGS=--xla_gpu_autotune_level=0 \\
        python benchmarks/budget_8b.py Qwen3-8B --lora 32 --gpu-target h100.txtpb
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp

from ais_jax import config as config_lib
from ais_jax import mesh as mesh_lib
from ais_jax import settings
from ais_jax.quantize import bytes_of
from ais_jax.sampling import Rollout, decoding, fill_in
from ais_jax.train.setup import build_run
from ais_jax.train.step import TrainBatch

GIB = 2**30


def job(args) -> config_lib.Config:
    """One update on `rows` completions at a time."""
    lora = {"rank": args.lora, "base_recipe": args.base} if args.lora else None
    return settings.build(
        config_lib.Config,
        {
            "model": {"published": args.model, "lora": lora},
            "rollout": {
                "recipe": args.recipe,
                "max_prompt_tokens": args.prompt,
                "max_new_tokens": args.length - args.prompt,
                "score_chunk": 64,
                # Diffusion models alone: 2 tokens a step, scored at 8 canvases.
                "diffusion": {"steps": (args.length - args.prompt) // 2, "segments": 8},
            },
            "grpo": {"batch_size": args.rollouts, "micro_batch_size": args.rows},
            "train": {"remat": True},
        },
    )


def target_devices(description: pathlib.Path | None) -> list:
    """One device: of the GPU that is described, or of this machine."""
    if description is None:
        return jax.devices()[:1]
    from jax.experimental import topologies

    jax.devices()  # finds the plugin
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description.read_text(), topology="1x1x1"
    )
    return list(topology.devices)


def on(mesh, tree):
    """Shapes that lie on the mesh's one device."""
    everywhere = mesh_lib.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)


def shapes_of(run):
    """(state, frozen part, parameters that compute) as shapes."""
    programs = run.programs
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    trainable = jax.eval_shape(programs.init_trainable, key)
    state = jax.eval_shape(programs.init_state, trainable)
    if run.policy.lora is None:
        return state, None, trainable
    base = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), run.policy.model.abstract_params()
    )
    frozen = jax.eval_shape(run.policy.hold, base)
    return state, frozen, jax.eval_shape(run.policy.join, trainable, frozen)


def batch_of(run, config) -> TrainBatch:
    """A rollout batch as shapes."""
    rows, width, length = (
        config.grpo.minibatch_size,
        config.rollout.max_prompt_tokens,
        config.rollout.max_new_tokens,
    )

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype)

    mask, floats = array(bool, length), array(jnp.float32, length)
    ids = array(jnp.int32, length)
    prompts = array(jnp.int32, width), array(bool, width)
    rollout = Rollout(*prompts, ids, mask, floats, array(bool))
    if run.policy.sampling.diffusion is not None:
        keys = array(jax.random.key(0).dtype)
        rollout = rollout._replace(step_map=ids, forwards=array(jnp.int32))
        rollout = jax.eval_shape(run.programs.plan, rollout, keys)
    return TrainBatch(rollout, mask, array(jnp.float32), floats, None)


def compiled(name: str, function, *shapes, **static):
    """Compiles and says how long it took."""
    began = time.perf_counter()
    program = function.lower(*shapes, **static).compile()
    print(f"compiled {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return program


def sampler(run, copy, batch: TrainBatch, args) -> dict:
    """The programs that sample: of an autoregressive model reading prompts, and decoding."""
    policy, mesh = run.policy, run.programs.mesh
    rollout = batch.rollout
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), args.rollouts))
    inputs = copy, rollout.prompts, rollout.prompt_mask, *on(mesh, (keys,))
    if policy.sampling.diffusion is not None:
        return {"rollout": compiled("rollout", fill_in, policy, *inputs, mesh)}
    setting = decoding.Setting(policy.model, policy.sampling, mesh)
    live = jax.ShapeDtypeStruct((args.rollouts,), bool)
    begin, decode = (
        decoding.program(f, setting.platform) for f in (decoding.begin, decoding.decode)
    )
    static = {"setting": setting, "columns": args.length, "repeats": 1}
    inputs = *inputs, on(mesh, live)
    state = on(mesh, jax.eval_shape(functools.partial(decoding.begin, **static), *inputs))
    least = on(mesh, jax.ShapeDtypeStruct((), jnp.int32))
    return {
        "prefill": compiled("prefill", begin, *inputs, **static),
        "decoding": compiled("decoding", decode, copy, state, least, setting=setting),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("model")
    add("--lora", type=int, default=0, help="rank; 0 trains everything")
    add("--base", default="none", help="recipe in which the frozen base is held")
    add("--recipe", default="fp8", help="of the rollout copy")
    add("--rollouts", type=int, default=64, help="completions a step, sampled at once")
    add("--rows", type=int, default=2, help="completions a forward and backward pass")
    add("--prompt", type=int, default=512)
    add("--gpu-target", type=pathlib.Path, help="compile for this GPU")
    add("--length", type=int, default=2048, help="prompt and completion")
    args = parser.parse_args()
    config = job(args)
    run = build_run(config, pathlib.Path("unused"), target_devices(args.gpu_target))
    mesh, model = run.programs.mesh, run.policy.model
    state, frozen, params = on(mesh, shapes_of(run))
    ids = jax.ShapeDtypeStruct((args.rows, args.length), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    batch, ids, scalar = on(mesh, (batch_of(run, config), ids, scalar))
    compiled("forward", jax.jit(lambda p, x: model.logits(p, x)[:, -1]), params, ids)
    copy, _ = jax.eval_shape(lambda p: run.programs.refit(p, None), params)
    programs = {
        "refit": compiled("refit", run.programs.refit, params, on(mesh, copy)),
        "scoring": compiled("scoring", run.programs.score, params, batch.rollout),
        "update": compiled("update", run.programs.update, state, frozen, batch, scalar),
    }
    rows = {
        "frozen base": bytes_of(frozen) if frozen else 0,
        "trained parameters, float32": bytes_of(state.params),
        "Adam's moments, float32": bytes_of(state.opt_state),
        "gradients, float32": bytes_of(state.params),
        f"rollout copy, {args.recipe}": bytes_of(copy),
        "sum of these": 0,
    }
    rows["sum of these"] = sum(rows.values())
    programs |= sampler(run, on(mesh, copy), batch, args)
    if run.policy.sampling.diffusion is None:
        cache = jax.eval_shape(lambda: model.empty_cache(args.rollouts, args.length))
        rows[f"cache of {args.rollouts} rows"] = bytes_of(cache)
    for name, program in programs.items():
        rows[f"temporaries of {name}"] = program.memory_analysis().temp_size_in_bytes
    for name, size in rows.items():
        print(f"{name:>32}: {size / GIB:7.2f} GiB")


if __name__ == "__main__":
    main()
