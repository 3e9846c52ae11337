"""Impossible configurations are refused in a line that names the key."""

import pathlib

import pytest

from ais_jax import config as config_lib
from ais_jax import mesh as mesh_lib
from ais_jax import settings
from ais_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[1] / "configs"
CONFIGS = sorted(path for path in FOLDER.glob("*.yaml") if not path.stem.startswith("study_"))


@pytest.mark.smoke
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_load(path):
    config_lib.load(path).check_devices(1)


BENCHMARKS = {
    "llada_8b": ("gsm8k", "math", "countdown", "sudoku"),
    "qwen3_8b": ("gsm8k", "math", "amc", "aime25", "countdown", "sudoku"),
    "qwen3_5_9b": ("gsm8k", "math", "amc", "aime25", "countdown", "sudoku"),
}


@pytest.mark.parametrize("model", BENCHMARKS)
def test_every_model_has_a_config_for_each_of_its_benchmarks(model):
    found = {path.stem: path for path in CONFIGS if path.stem.startswith(model)}
    assert set(found) == {f"{model}_{task}" for task in BENCHMARKS[model]}
    for name, path in found.items():
        config, text = config_lib.load(path), path.read_text(encoding="utf-8")
        assert f"ais-jax train configs/{name}.yaml" in text
        assert "Not verified" in text and "arXiv 2" in text
        assert config.task.name == name.removeprefix(f"{model}_")
        assert config.task.eval_file is not None
        assert [term for term, _ in config.composition.terms]


def test_every_key_is_documented():
    rows = settings.describe(config_lib.Config)
    assert {"grpo.group_size", "ais.cap", "task.countdown.numbers", "mesh.tensor"} <= {
        row[0] for row in rows
    }
    assert [row[0] for row in rows if not row[3]] == []


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("grpo.group_size=0", ["grpo", "group_size=0", "at least 2"]),
        ("grpo.group_size=7", ["batch_size=128", "group_size=7"]),
        ("grpo.minibatches=3", ["minibatches=3"]),
        ("grpo.micro_batch_size=48", ["micro_batch_size=48", "128"]),
        ("rollout.top_p=0.9", ["top_p=0.9", "bias"]),
        ("rollout.top_k=5", ["top_k=5", "bias"]),
        ("rollout.temperature=0", ["temperature=0", "above 0"]),
        ("grpo.overlong_buffer=99", ["overlong_buffer=99", "max_new_tokens"]),
        ("rewards.corect=1.0", ["rewards", "'corect' is no reward", "correct"]),
        ("rewards.boxed=1.0", ["rewards", "countdown has none"]),
        ("rewards={}", ["rewards", "no reward has a weight"]),
        ("rewards=correct", ["rewards", "a mapping"]),
        ("task.name=arithmetic task.style=d1", ["task", "style=d1", "gsm8k"]),
        ("rollout.recipe=fp9", ["rollout.recipe", "fp9", "fp8"]),
        ("grpo.advantages=mad", ["grpo.advantages", "mad", "leave_one_out"]),
        ("ais.cap=-1", ["ais", "cap=-1"]),
        ("ais.aggregation=sequence_sum_norm", ["max_length"]),
        ("ais.severity_scale=often", ["severity_scale", "often", "auto"]),
        ("model.qwen3.num_key_value_heads=3", ["num_key_value_heads=3"]),
        ("model.qwen3.num_attention_heads=0", ["num_attention_heads=0"]),
        ("model.qwen3.vocab_size=-3", ["vocab_size=-3"]),
        ("warmup.learning_rate=-1", ["learning_rate=-1"]),
        ("mesh.tensor=0", ["mesh", "tensor=0"]),
        ("optimizer.max_grad_norm=0", ["max_grad_norm=0"]),
        ("optimizer.lr=1e-4", ["optimizer.lr", "learning_rate"]),
        ("train.dtype=float16", ["train.dtype", "bfloat16"]),
        ("train.steps=many", ["train.steps", "many"]),
        ("task.countdown.operators=+^", ["operators"]),
    ],
)
def test_bad_values_are_named(override, parts):
    with pytest.raises(UserError) as error:
        config_lib.load(CONFIGS[0], override.split())
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_devices_must_share_the_batch():
    config = config_lib.load(CONFIGS[0], ["grpo.batch_size=12", "grpo.group_size=4",
                                          "grpo.micro_batch_size=null"])  # fmt: skip
    with pytest.raises(ValueError, match=r"grpo.batch_size=12 .* 8 devices"):
        config.check_devices(8)


@pytest.mark.parametrize("axes", [(3, 1, 1), (-1, -1, 1), (16, 1, 1), (-1, 3, 1)])
def test_mesh_must_fit_the_devices(axes):
    with pytest.raises(UserError, match="8 devices"):
        mesh_lib.make_mesh(mesh_lib.MeshConfig(*axes))


def test_mesh_takes_what_is_left():
    assert mesh_lib.make_mesh(mesh_lib.MeshConfig(-1, 2, 2)).shape == {
        "data": 2,
        "fsdp": 2,
        "tensor": 2,
    }
