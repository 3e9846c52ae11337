"""Compile time and memory of GRPO at published sizes, without allocating anything.

    python benchmarks/budget_8b.py Qwen3-8B --lora 32

Compiles the programs of a step ahead of time, as `ais-jax aot` does, and adds up the memory of one
device by class of tensor. Sizes of arrays are exact; temporaries are what the compiler plans, an
estimate. On a CPU they include float32 copies of bfloat16 weights that accelerators do not make. To
compile for a GPU that is not there, install jax-cuda13-plugin and jax-cuda13-pjrt (--no-deps, the
version of jax) and give XLA's description of it, a GpuTargetConfigProto as text:

    JAX_PLATFORMS=cpu python benchmarks/budget_8b.py Qwen3-8B --lora 32 --gpu-target h100.txtpb
"""

from __future__ import annotations

import argparse
import pathlib

import jax

from ais_jax import config as config_lib
from ais_jax import settings
from ais_jax.aot import programs
from ais_jax.aot.compile import compile_all
from ais_jax.aot.topology import devices_of
from ais_jax.chips import GIB
from ais_jax.quantize import bytes_of
from ais_jax.train.setup import build_run


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
    target = args.gpu_target
    devices = devices_of("cuda:1x1x1", target) if target else jax.devices()[:1]
    run = build_run(job(args), pathlib.Path("unused"), devices)
    shapes = programs.shapes_of(run)
    held = {name: bytes_of(tree) for name, tree in shapes.held.items() if tree is not None}
    rows = {
        "frozen base": held.get("frozen base", 0),
        "trained parameters, float32": held["parameters"],
        "Adam's moments, float32": held["moments"],
        "gradients, float32": held["parameters"],
        f"rollout copy, {args.recipe}": held["rollout copy"],
        "sum of these": 0,
    }
    rows["sum of these"] = sum(rows.values())
    if run.policy.sampling.diffusion is None:
        cache = programs.decoding_state(run, shapes, args.length).cache
        rows[f"cache of {args.rollouts} rows"] = bytes_of(cache)
    for result in compile_all(run, shapes, None):
        print(f"compiled {result.program.name}: {result.seconds:.0f} s", flush=True)
        rows[f"temporaries of {result.program.name}"] = result.memory.temporaries or 0
    for name, size in rows.items():
        print(f"{name:>32}: {size / GIB:7.2f} GiB")


if __name__ == "__main__":
    main()
