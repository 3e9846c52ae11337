"""What a GPU would run: programs compiled for an H100 that need not be there.

Needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, CUDA's toolkit (where CUDA_HOME says,
the package nvidia-cuda-nvcc, or /usr/local/cuda) and a description of the GPU. One process compiles
all programs; without a GPU XLA cannot time kernels, so each is compiled with either family that it
chooses from, Triton's and cuBLASLt's.
"""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

IN, OUT = 4096, 12288  # an up projection of Qwen3-8B
KERNEL = IN * OUT  # bytes of one in 8 bits
pytestmark = pytest.mark.parity

HEADING = "compiled for an H100: "

# name: (recipe, rows, kernels apart, stacked or held [in, out], Triton's kernels or cuBLASLt's)
CASES = {
    f"{recipe} {rows} {form} {kernels}": (recipe, rows, form, kernels)
    for recipe, rows, form, kernels in [
        *[("none", 64, "apart", k) for k in ("triton", "cublas")],
        *[("fp8", rows, "apart", k) for rows in (8, 64) for k in ("triton", "cublas")],
        ("fp8", 64, "in_out", "cublas"),
        ("fp8", 64, "stacked", "triton"),
        *[("fp8_weight_only", rows, "apart", "triton") for rows in (8, 64)],
        ("fp8_weight_only", 8, "apart", "cublas"),
        *[("int8", 64, "apart", k) for k in ("triton", "cublas")],
    ]
}

# Decoding as a run compiles it, two blocks of Qwen3-8B: (recipe, kv_cache).
DECODING = {"decode none": ("none", "none"), "decode fp8": ("fp8", "fp8_kv")}
ROWS, COLUMNS = 64, 1280
KEYS = ROWS * COLUMNS * 8 * 128  # bytes of a block's keys in 8 bits


def compile_all(target: str) -> None:
    """Prints {name: [temporary bytes, donated bytes, program]} as JSON."""
    from ais_jax.aot import topology

    (device,) = topology.devices_of("cuda:1x1x1", target)
    found = {name: layers(device, *how) for name, how in CASES.items()}
    found |= {name: decoding(device, *how) for name, how in DECODING.items()}
    print(HEADING + json.dumps(found))


def summary(lowered, triton: bool):
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": triton}
    compiled = lowered.compile(options)
    plan = compiled.memory_analysis()
    return plan.temp_size_in_bytes, plan.alias_size_in_bytes, compiled.as_text()


def decoding(device, recipe, kv_cache):
    from ais_jax import config as config_lib
    from ais_jax import settings
    from ais_jax.aot import programs
    from ais_jax.train.setup import build_run

    sizes = {
        "vocab_size": 151_936,
        "hidden_size": IN,
        "intermediate_size": OUT,
        "num_hidden_layers": 2,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
    lengths = {"max_prompt_tokens": 256, "max_new_tokens": COLUMNS - 256}
    config = settings.build(
        config_lib.Config,
        {
            "model": {"qwen3": sizes},
            "rollout": {"recipe": recipe, "kv_cache": kv_cache, **lengths},
            "grpo": {"batch_size": ROWS, "group_size": 8},
        },
    )
    run = build_run(config, pathlib.Path("unused"), [device])
    every = programs.programs_of(run, programs.shapes_of(run))
    (program,) = [program for program in every if program.name == "decode"]
    return summary(program.lower(), triton=True)


def layers(device, recipe, rows, form, kernels):
    import jax
    import jax.numpy as jnp

    from ais_jax.linear import linear
    from ais_jax.quantize import prepare, quantize

    place = jax.sharding.SingleDeviceSharding(device)

    def shapes(tree):
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            tree,
        )

    def block(x, w):
        return linear(jax.nn.silu(linear(x, w["up_proj"])), w["down_proj"])

    def apart(x, layers):
        for w in layers:
            x = block(x, w)
        return x

    def stacked(x, layers):
        return jax.lax.scan(lambda x, w: (block(x, w), None), x, layers)[0]

    def copy(*stack):
        zeros = {
            "up_proj": jnp.zeros((*stack, IN, OUT)),
            "down_proj": jnp.zeros((*stack, OUT, IN)),
        }
        held = quantize(zeros, recipe)
        return held if form == "in_out" else prepare(held, device.platform)

    held = jax.eval_shape(lambda: copy(2) if form == "stacked" else [copy(), copy()])
    x = jax.ShapeDtypeStruct((rows, IN), jnp.bfloat16)
    program = jax.jit(stacked if form == "stacked" else apart).lower(*shapes((x, held)))
    return summary(program, triton=kernels == "triton")


@pytest.fixture
def programs(shared_file):
    """{name: (temporary bytes, donated bytes, program)}."""
    for part in ("jax_plugins", "jax_plugins.xla_cuda13"):
        if importlib.util.find_spec(part) is None:
            pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, --no-deps")
    return compiled(shared_file("goldens/h100_target.txtpb"), toolkit())


def toolkit() -> pathlib.Path:
    """The folder of CUDA's toolkit."""
    package = importlib.util.find_spec("nvidia")
    parts = [] if package is None else package.submodule_search_locations or []
    places = [pathlib.Path(part) / "cu13" for part in parts] + [pathlib.Path("/usr/local/cuda")]
    if "CUDA_HOME" in os.environ:
        places = [pathlib.Path(os.environ["CUDA_HOME"])]
    found = [place for place in places if (place / "bin" / "ptxas").exists()]
    if not found:
        pytest.skip(f"needs CUDA's toolkit, and {places} have no bin/ptxas: set CUDA_HOME")
    return found[0]


@functools.cache
def compiled(target: pathlib.Path, toolkit: pathlib.Path) -> dict:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_gpu_cuda_data_dir={toolkit}",
        "PYTHONPATH": str(pathlib.Path(__file__).parents[1]),
    }
    done = subprocess.run(
        [sys.executable, __file__, str(target)],
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = [x for x in done.stdout.splitlines() if x.startswith(HEADING)]
    return json.loads(line.removeprefix(HEADING))


DOT = re.compile(r" = \S+ dot\(%(\S+), %([^)]+)\)")


def dots(text: str) -> list[set[str]]:
    """Dtypes of the operands of each product that is not a call of cuBLASLt."""
    types = dict(re.findall(r"%(\S+) = (\w+)\[", text))
    return [{types[name] for name in match.groups()} for match in DOT.finditer(text)]


def calls(text: str) -> list[str]:
    """What each call of cuBLASLt multiplies."""
    return re.findall(r'custom_call_target="__cublas\$lt\$matmul(\$\w+)?"', text)


@pytest.mark.parametrize("rows", [8, 64])
def test_fp8_multiplies_fp8(programs, rows):
    temporary, _, text = programs[f"fp8 {rows} apart triton"]
    assert dots(text) == [{"f8e4m3fn"}] * 4 and not calls(text)
    assert temporary < KERNEL / 4
    temporary, _, text = programs[f"fp8 {rows} apart cublas"]
    assert calls(text) == ["$f8"] * 4 and not dots(text)
    # cuBLASLt's own workspace is in it, of up to 32 MiB. Copies of kernels are not.
    assert temporary < KERNEL


def test_the_compute_dtype_does_not(programs):
    *_, text = programs["none 64 apart triton"]
    assert dots(text) == [{"bf16"}] * 4
    *_, text = programs["none 64 apart cublas"]
    assert calls(text) == [""] * 4


@pytest.mark.parametrize("rows", [8, 64])
def test_weights_alone_are_widened_inside_the_product(programs, rows):
    temporary, _, text = programs[f"fp8_weight_only {rows} apart triton"]
    assert dots(text) == [{"bf16"}] * 4 and not calls(text)
    assert temporary < KERNEL / 4
    # cuBLASLt takes no mixed operands: XLA must then hold a kernel in bfloat16.
    assert programs["fp8_weight_only 8 apart cublas"][0] > 2 * KERNEL


def test_int8_multiplies_int8(programs):
    temporary, _, text = programs["int8 64 apart triton"]
    assert dots(text) == [{"s8"}] * 4 and temporary < KERNEL / 4
    temporary, _, text = programs["int8 64 apart cublas"]
    assert calls(text) == [""] * 4 and temporary < KERNEL
    assert len(re.findall(r"= \(s32\[64,\d+\]\S*, \S+\) custom-call", text)) == 4


def test_kernels_held_in_out_would_be_transposed(programs):
    assert programs["fp8 64 in_out cublas"][0] > KERNEL


def test_stacked_kernels_would_be_copied(programs):
    assert programs["fp8 64 stacked triton"][0] > KERNEL


def test_decoding_multiplies_fp8_and_widens_no_cache(programs):
    """Of each block queries, keys and values at once, gate and up at once, and the other two."""
    temporary, given, text = programs["decode fp8"]
    found = dots(text)
    assert found.count({"f8e4m3fn"}) == 2 * 4
    # Attention's two products a block, and the output layer.
    assert found.count({"bf16"}) == 2 * 2 + 1 and len(found) == 13 and not calls(text)
    assert temporary < KEYS
    assert 2 * 2 * KEYS < given < 1.1 * 2 * 2 * KEYS
    _, given, text = programs["decode none"]
    assert {"f8e4m3fn"} not in dots(text) and 4 * 2 * KEYS < given < 1.1 * 4 * 2 * KEYS


if __name__ == "__main__":
    compile_all(sys.argv[1])
