"""Compiling ahead of time: what is compiled, what it needs, and what is said of it."""

import dataclasses
import importlib.util
import math
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from ais_jax import cli, settings
from ais_jax import config as config_lib
from ais_jax.aot import advice, programs, report, topology
from ais_jax.aot import compile as compile_lib
from ais_jax.chips import GIB, Chip
from ais_jax.errors import UserError
from ais_jax.models.published import PUBLISHED
from ais_jax.train.setup import build_run

ROOMY = Chip("a chip", GIB, *[1e12] * 5, 1e11, 1e10)
TINY = {
    "model": {
        "qwen3": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
        }
    },
    "rollout": {"recipe": "int8", "max_prompt_tokens": 16, "max_new_tokens": 24, "segment": 16},
    "grpo": {"batch_size": 32, "group_size": 4, "minibatches": 2, "micro_batch_size": 8},
    "train": {"remat": True, "eval_batch_size": 32},
    "mesh": {"fsdp": 4, "tensor": 2, "data": 1},
}


def make(**changes):
    return settings.replace(settings.build(config_lib.Config, TINY), changes)


def written(config, chip, names=()):
    """(whether all fits, the report) on this machine's devices."""
    parts = []
    fits = report.report(config, jax.devices(), chip, names, "here", parts.append)
    return fits, "\n".join(parts)


@pytest.fixture(scope="module")
def run():
    return build_run(make(), pathlib.Path("unused"), jax.devices())


@pytest.fixture(scope="module")
def shapes(run):
    return programs.shapes_of(run)


@pytest.fixture(scope="module")
def results(run, shapes):
    found = compile_lib.compile_all(run, shapes, ROOMY, ["decode", "grow", "update"])
    return {result.program.name: result for result in found}


def test_a_step_is_these_programs(run, shapes):
    # 24 tokens are two segments of 16, of all rows at once; two minibatches are two updates.
    calls = {program.name: program.calls for program in programs.programs_of(run, shapes)}
    assert list(calls) == ["quantize", "prefill", "decode", "grow", "score", "update"]
    assert calls == {"quantize": 1, "prefill": 1, "decode": 2, "grow": 1, "score": 1, "update": 2}


def test_arguments_are_split_over_the_devices(run, shapes, results):
    """What the compiler calls arguments is what sharding leaves of the arrays on one device."""
    devices = run.programs.mesh.size
    state, parameters = shapes.state, shapes.held["parameters"]
    small = [x for x in jax.tree.leaves(parameters) if "fsdp" not in str(x.sharding.spec)]
    split = sum(4 * math.prod(x.shape) for x in jax.tree.leaves(parameters)) - sum(
        4 * math.prod(x.shape) for x in small
    )
    by_hand = programs.bytes_on_a_device(parameters)
    assert split / devices < by_hand < 2.5 * split / devices
    assert programs.bytes_on_a_device(state.opt_state) == pytest.approx(2 * by_hand, abs=100)
    batch = 16 * (16 * 5 + 24 * (4 + 1 + 4 + 1 + 4) + 1 + 4) / 4
    found = results["update"].memory.arguments
    assert found == pytest.approx(programs.bytes_on_a_device(state) + batch, abs=200)


def test_what_a_program_does_not_take_lies_beside_it(run, shapes, results):
    sizes = {name: programs.bytes_on_a_device(x) for name, x in shapes.held.items()}
    state, copy = sizes["parameters"] + sizes["moments"], sizes["rollout copy"]
    assert results["update"].beside == copy
    beside = {
        program.name: sum(size for name, size in sizes.items() if name not in program.takes)
        for program in programs.programs_of(run, shapes)
    }
    assert beside == {
        "quantize": sizes["moments"],
        "prefill": state,
        "decode": state,
        "grow": state + copy,
        "score": sizes["moments"] + copy,
        "update": copy,
    }


def test_products_are_counted_by_layer_and_token(run, results):
    """The update is a forward and a backward pass: at least 6 operations a weight and token."""
    c = run.policy.model.config
    block = 32 * (2 * 32 + 2 * 16) + 3 * 32 * 64  # weights of the linears of a block
    tokens = 16 * (16 + 24 - 1)
    least = 6 * c.num_hidden_layers * block * tokens / run.programs.mesh.size
    attention = 12 * c.num_hidden_layers * 16 * (16 + 24 - 1) ** 2 * 32 / run.programs.mesh.size
    head = 8 * 16 * 24 * 32 * c.vocab_size / 4
    found = results["update"].costs.total_operations
    # Blocks are computed again in the backward pass: 8 instead of 6.
    assert least < found < 1.5 * (least * 8 / 6 + attention * 2 + head)
    assert results["update"].costs.collectives
    assert results["grow"].costs.total_operations == 0


def test_a_decoding_call_is_a_segment(run, results):
    """Twice the tokens of a segment are twice the products."""
    longer = build_run(make(**{"rollout.segment": 24}), pathlib.Path("unused"), jax.devices())
    (other,) = compile_lib.compile_all(longer, programs.shapes_of(longer), None, ["decode"])
    assert other.program.turns == 24
    assert other.times is None
    assert results["decode"].program.turns == 16
    ratio = other.costs.total_operations / results["decode"].costs.total_operations
    assert ratio == pytest.approx(24 / 16)


def test_the_report_says_what_fits():
    fits, text = written(make(), ROOMY, ["quantize"])
    assert fits
    assert "8 x cpu of 1.00 GiB, mesh data 1 x fsdp 4 x tensor 2, rollouts in int8" in text
    assert "Compiled, not run" in text
    lines = [line for line in text.splitlines() if line.startswith("quantize ")]
    assert len(lines) == 2
    assert lines[0].endswith(" fits")
    assert "does not fit" not in text


def test_the_report_says_what_would_help():
    fits, text = written(make(), dataclasses.replace(ROOMY, memory=1e4), ["score"])
    assert not fits
    assert "score does not fit: it needs" in text
    help_lines = text.split("What would help most:\n")[1].splitlines()
    assert len(help_lines) == 3
    assert all(line.startswith("  ") and "GiB less" in line for line in help_lines)


def test_without_figures_there_is_no_verdict():
    fits, text = written(make(), None, ["quantize"])
    assert fits
    assert "No figures are known of cpu" in text
    assert " fits" not in text


def exhausted(program, peak):
    memory = compile_lib.Memory(None, None, None, peak)
    return compile_lib.Result(program, 1.0, memory, 0, 1000.0)


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
        "hbm. Used 40.24G of 15.75G hbm. Exceeded hbm capacity by 24.49G.",
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory "
        "required for HLO temporaries (40.24G) exceeds available HBM (15.75G). HLO module: jit_f.",
    ],
)
def test_running_out_of_memory_is_an_answer(run, shapes, message):
    program = {p.name: p for p in programs.programs_of(run, shapes)}["update"]

    def give_up():
        raise jax.errors.JaxRuntimeError(message)

    found = compile_lib._compile(program._replace(lower=give_up), run.programs.mesh, 7, ROOMY)
    assert not found.fits
    assert found.memory.peak == int(40.24 * GIB)
    assert (found.needed, found.limit) == (found.memory.peak + 7, int(15.75 * GIB))
    assert len(advice.advise(run, shapes, found)) == 3


def test_other_errors_of_the_compiler_are_errors(run, shapes):
    program = programs.programs_of(run, shapes)[0]

    def give_up():
        raise jax.errors.JaxRuntimeError("INTERNAL: something broke")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something broke"):
        compile_lib._compile(program._replace(lower=give_up), run.programs.mesh, 0, ROOMY)


@pytest.mark.parametrize(
    ("name", "first"),
    [
        ("update", "grpo.micro_batch_size=4"),
        ("score", "grpo.micro_batch_size=4"),
        ("decode", "rollout.slots=16"),
        ("prefill", "rollout.slots=16"),
    ],
)
def test_large_temporaries_call_for_fewer_rows(run, shapes, name, first):
    program = {p.name: p for p in programs.programs_of(run, shapes)}[name]
    settings_ = [a.setting for a in advice.advise(run, shapes, exhausted(program, 10**9))]
    assert settings_[0] == first


def test_advice_is_taken_by_the_config(run, shapes):
    """Every setting can be put behind the command as it stands."""
    for program in programs.programs_of(run, shapes):
        for found in advice.advise(run, shapes, exhausted(program, 10**9), count=9):
            changes = [settings.parse_override(text) for text in found.setting.split()]
            data = settings.apply_overrides(settings.to_dict(run.config), changes)
            changed = settings.build(config_lib.Config, data)
            assert changed != run.config, found.setting


def test_a_large_state_calls_for_adapters(run, shapes):
    """A program without temporaries of its own, beside a large state."""
    program = {p.name: p for p in programs.programs_of(run, shapes)}["update"]
    memory = compile_lib.Memory(0, 0, 0, 0)
    result = compile_lib.Result(program, 1.0, memory, 0, 1.0)
    assert advice.advise(run, shapes, result)[0].setting == "model.lora.rank=32"


def test_adapters_leave_a_frozen_base():
    changes = {"model.lora": {"rank": 4, "base_recipe": "int8_weight_only"}, "grpo.kl_coef": 0.1}
    run = build_run(make(**changes), pathlib.Path("unused"), jax.devices())
    shapes = programs.shapes_of(run)
    sizes = {name: programs.bytes_on_a_device(x) for name, x in shapes.held.items()}
    assert sizes["reference"] == sizes["parameters"] > 0
    assert shapes.batch.ref_logps.shape == (32, 24)
    taken = {program.name: program.takes for program in programs.programs_of(run, shapes)}
    assert taken["update"] == {"parameters", "moments", "frozen base"}
    frozen = shapes.frozen["layers"]["q_proj"].values
    assert frozen.dtype == "int8"
    assert frozen.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_a_diffusion_model_is_filled_in_block_by_block():
    sizes = {"d_model": 32, "mlp_hidden_size": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
    changes = {
        "model.family": "llada",
        "model.llada": sizes,
        "rollout.diffusion": {
            "block_length": 8,
            "steps": 12,
            "estimator": "one_step",
            "draws": 2,
        },
    }
    run = build_run(make(**changes), pathlib.Path("unused"), jax.devices())
    shapes = programs.shapes_of(run)
    found = {p.name: p for p in programs.programs_of(run, shapes)}
    assert list(found) == ["quantize", "rollout", "score", "update"]
    assert found["rollout"].turns == 4  # steps of each of three blocks
    assert found["score"].calls == 2  # the copy is scored at the plans' canvases too
    assert shapes.batch.rollout.tokens.shape == (64, 24)
    (result,) = compile_lib.compile_all(run, shapes, ROOMY, ["rollout"])
    block = 32 * 4 * 32 + 3 * 32 * 64
    least = 2 * 2 * block * 32 * 40 * 12 / 8  # every step goes through prompt and completion
    # On a CPU kernels that share their input are one, which is not split over `tensor`.
    assert least < result.costs.total_operations < 3 * least


def test_an_absent_checkpoint_is_planned_by_its_name(tmp_path):
    config = make(**{"model.checkpoint": "models/Qwen3-8B"})
    planned, note = report.without_absent_checkpoint(config)
    assert planned.model.sizes == PUBLISHED["Qwen3-8B"]
    assert "models/Qwen3-8B is not here" in note[0]
    (tmp_path / "Qwen3-8B").mkdir()
    for path in ("models/other", str(tmp_path / "Qwen3-8B")):
        config = make(**{"model.checkpoint": path})
        assert report.without_absent_checkpoint(config) == (config, [])


@pytest.mark.parametrize("name", ["v5p", "v5p:", "v5p:4x", "4x4", "h100:2x2", "v5e:4x4:2"])
def test_malformed_topologies(name):
    with pytest.raises(UserError, match="v5e:4x4"):
        topology.devices_of(name)


def test_what_a_topology_of_gpus_needs(tmp_path):
    with pytest.raises(UserError, match="--gpu-target"):
        topology.devices_of("cuda:1x1x1")
    with pytest.raises(UserError, match="--gpu-target"):
        topology.devices_of("v5e:2x2", tmp_path / "h100.txtpb")


def test_the_compiler_of_tpus_is_asked_for(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(UserError, match=r"pip install 'ais-jax\[tpu\]'"):
        topology.devices_of("v5e:2x2")


def test_halves_of_a_chip_are_devices():
    class Device:
        device_kind = "TPU7x"

    whole = topology.chip_of([Device()] * 4, "tpu7x:2x2x1")
    half = topology.chip_of([Device()] * 8, "tpu7x:2x2x1")
    assert half.memory == whole.memory / 2
    assert topology.chip_of(jax.devices(), "v5e:2x4") is None


@pytest.mark.parametrize(("memory", "code"), [(1e12, 0), (1e4, 1)])
def test_exit_codes(tmp_path, monkeypatch, capsys, memory, code):
    chip = dataclasses.replace(ROOMY, memory=memory)
    monkeypatch.setattr(report, "devices_of", lambda name, target: jax.devices())
    monkeypatch.setattr(report, "chip_of", lambda devices, name: chip)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    settings.save_yaml(make(), tmp_path / "job.yaml")
    arguments = ["aot", str(tmp_path / "job.yaml"), "--topology", "x", "--program", "quantize"]
    assert cli.main(arguments) == code
    assert "quantize" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "program", "words"),
    [
        ("mesh.fsdp=3", "quantize", ["mesh.fsdp=3", "8 devices"]),
        ("grpo.micro_batch_size=2", "quantize", ["micro_batch_size=2", "4 devices"]),
        ("train.steps=9", "rollout", ["--program rollout", "quantize, prefill, decode"]),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, override, program, words):
    monkeypatch.setattr(report, "devices_of", lambda name, target: jax.devices())
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    settings.save_yaml(make(), tmp_path / "job.yaml")
    job = str(tmp_path / "job.yaml")
    assert cli.main(["aot", job, override, "--topology", "x", "--program", program]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    for word in words:
        assert word in line


def on_a_tpu(tmp_path, *arguments, **changes):
    """For a slice of a TPU v5e that is not there."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the compiler of TPUs: pip install libtpu, no TPU has to be there")
    return command(tmp_path, *arguments, **changes)


def command(tmp_path, *arguments, **changes):
    """`ais-jax aot` in a process of its own."""
    settings.save_yaml(make(**changes), tmp_path / "job.yaml")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    words = ["-m", "ais_jax", "aot", tmp_path / "job.yaml", "--topology", *arguments]
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])},
    )


@pytest.mark.parity
def test_a_tiny_model_for_a_tpu(tmp_path):
    result = on_a_tpu(tmp_path, "v5e:2x4")
    assert result.returncode == 0, result.stderr[-2000:]
    assert "v5e:2x4: 8 x TPU v5 lite of 15.75 GiB" in result.stdout
    for name in ("quantize", "prefill", "decode", "grow", "score", "update"):
        rows = [x for x in result.stdout.splitlines() if x.startswith(f"{name} ")]
        assert len(rows) == 2
        assert rows[0].endswith(" fits")
        assert {"compute", "memory", "network"} & set(rows[1].split())
    assert "A step in which every completion has full length" in result.stdout


@pytest.mark.parity
def test_long_sequences_go_through_the_kernel_of_a_tpu(tmp_path):
    """Splash attention, forward and backward, over rows and heads: no scores are in memory."""
    sizes = {"model.qwen3.head_dim": 128, "rollout.max_new_tokens": 8176, "rollout.segment": 8176}
    temporaries = {}
    for kind in ("auto", "whole"):
        changes = {**sizes, "train.attention": kind}
        result = on_a_tpu(tmp_path, "v5e:2x4", "--program", "update", **changes)
        assert result.returncode == 0, result.stderr[-2000:]
        rows = [x.split() for x in result.stdout.splitlines() if x.startswith("update ")]
        temporaries[kind] = float(rows[0][3])  # GiB
    assert temporaries["auto"] < temporaries["whole"] / 2


@pytest.mark.parity
def test_a_tiny_model_for_a_gpu(tmp_path, shared_file):
    """Two of them; without cuDNN, which has to see a GPU, long sequences go in chunks."""
    target = shared_file("goldens/h100_target.txtpb")
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, --no-deps")
    changes = {"mesh.fsdp": 2, "mesh.tensor": 1, "rollout.recipe": "fp8"}
    result = command(tmp_path, "cuda:1x1x2", "--gpu-target", target, **changes)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "cuda:1x1x2: 2 x NVIDIA H100" in result.stdout
    for name in ("quantize", "prefill", "decode", "grow", "score", "update"):
        assert any(x.startswith(f"{name} ") for x in result.stdout.splitlines())


@pytest.mark.parity
def test_a_tpu_that_is_too_small(tmp_path):
    """262144 sequences at once, all activations kept: the compiler gives up, and that is said."""
    changes = {"grpo.batch_size": 2**19, "grpo.micro_batch_size": None, "train.remat": False}
    result = on_a_tpu(tmp_path, "v5e:2x4", "--program", "update", **changes)
    assert result.returncode == 1, result.stderr[-2000:]
    assert "update does not fit: it needs" in result.stdout
    assert "of 15.75 on each device" in result.stdout
    assert "grpo.micro_batch_size=131072" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parity
def test_a_topology_that_does_not_exist(tmp_path):
    result = on_a_tpu(tmp_path, "v5e:999x999")
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "v5e:999x999" in line
