"""The command as a person meets it: in its own process, by exit code and streams."""

import pathlib
import subprocess
import sys

import jax
import pytest
from tiny_job import one_device

from ais_jax import settings
from ais_jax.config import Config
from ais_jax.models import LladaConfig, Qwen3Config, build, save_pretrained
from ais_jax.models.tokenizers import CharTokenizer, save_char_tokenizer

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "countdown_tiny.yaml"


def run(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "ais_jax", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=one_device(),
    )


@pytest.mark.smoke
def test_help_lists_every_key_with_its_meaning():
    result = run("train", "--help")
    assert result.returncode == 0, result.stderr
    flat = " ".join(result.stdout.split())
    assert "--no-resume" in flat
    for key, _, _, doc in settings.describe(Config):
        assert f" {key} (" in flat, key
        assert " ".join(doc.split()) in flat, key


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["no.yaml"], ["no.yaml"]),
        ([CONFIG, "grpo.groupsize=4"], ["grpo.groupsize", "group_size"]),
        ([CONFIG, "mesh.data=3"], ["mesh.data=3", "1 devices"]),
        ([CONFIG, "model.qwen3.vocab_size=5"], ["vocab_size=5"]),
        ([CONFIG, "task.heldout_examples=10000000"], ["10000000", "exist"]),
        ([CONFIG, "rollout.max_prompt_tokens=4"], ["max_prompt_tokens=4"]),
        ([CONFIG, "rollout.max_new_tokens=2"], ["max_new_tokens=2"]),
        ([CONFIG, "--processes", 2], ["--coordinator and --process-id missing"]),
        ([CONFIG, "train.data_workers=-1"], ["data_workers=-1"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, parts, tmp_path):
    result = run("train", *args, "warmup.cache=false", cwd=tmp_path)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ais-jax: error: ")
    for part in parts:
        assert part in lines[0]


def test_report_of_nothing(tmp_path):
    result = run("report", tmp_path)
    assert result.returncode == 2
    assert "metrics.jsonl" in result.stderr


def test_importing_tasks_does_not_import_jax():
    code = (
        "import sys, ais_jax.tasks; ais_jax.tasks.get_task('sudoku'); print('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


ALPHABET = "0123456789+-*="
QWEN = Qwen3Config(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
LLADA = LladaConfig(
    vocab_size=20,
    d_model=16,
    mlp_hidden_size=32,
    n_layers=2,
    n_heads=2,
    n_kv_heads=2,
    mask_token_id=19,
)


def saved(config, folder):
    model = build(config, "float32")
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    save_pretrained(model, params, folder)
    save_char_tokenizer(CharTokenizer(ALPHABET), folder)
    return folder


def generated(folder, *options):
    result = run("generate", folder, "12+3=", "--max-new-tokens", 8, *options)
    assert result.returncode == 0, result.stderr
    return result


def test_what_is_kept_of_the_law_is_drawn_from(tmp_path):
    """One token kept is the most probable one, at any temperature; all of them are not."""
    folder = saved(QWEN, tmp_path)
    greedy = generated(folder).stdout
    hot = ("--temperature", 50, "--samples", 4)
    assert generated(folder, *hot).stdout != 4 * greedy
    for keep in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert generated(folder, *hot, *keep).stdout == 4 * greedy


def test_the_recipe_is_chosen_and_said(tmp_path):
    result = generated(saved(QWEN, tmp_path), "--recipe", "auto")
    assert result.stderr.startswith("recipe int8_head: CPUs ")


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (QWEN, ["--temperature", 1, "--top-k", -1], ["top_k=-1"]),
        (QWEN, ["--temperature", 1, "--top-p", 0], ["top_p=0.0"]),
        (QWEN, ["--temperature", 1, "--top-p", "nan"], ["top_p=nan"]),
        (QWEN, ["--temperature", 1, "--min-p", 1.5], ["min_p=1.5"]),
        (QWEN, ["--top-p", 0.9], ["top_p=0.9", "temperature 0"]),
        (LLADA, ["--temperature", 1, "--top-k", 5], ["top_k", "autoregressive"]),
    ],
)
def test_truncations_that_mean_nothing_are_refused(tmp_path, config, options, words):
    result = run("generate", saved(config, tmp_path), "12+3=", *options)
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("ais-jax: error: ")
    for word in words:
        assert word in lines[0]
