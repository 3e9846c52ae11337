"""Formats and generation, through the functions behind the commands and the commands themselves."""

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file
from tiny_job import one_device

import ais_jax
from ais_jax import config as config_lib
from ais_jax import generate, settings
from ais_jax.convert import convert
from ais_jax.errors import UserError
from ais_jax.models import (
    LladaConfig,
    Qwen3_5Config,
    Qwen3Config,
    build,
    from_pretrained,
    save_pretrained,
)
from ais_jax.models.tokenizers import CharTokenizer, load_tokenizer, save_char_tokenizer
from ais_jax.policies import load_policy
from ais_jax.sampling import DiffusionConfig

TOKENIZER = CharTokenizer("0123456789+-*=")
QWEN = Qwen3Config(
    vocab_size=20,  # four more than the tokenizer has ids
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
HYBRID = Qwen3_5Config(
    vocab_size=20,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=4,
    full_attention_interval=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
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
FAMILIES = {"qwen3": QWEN, "qwen3_5": HYBRID, "llada": LLADA}


def run(*args):
    command = [sys.executable, "-m", "ais_jax", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=one_device())


def save(config, folder):
    model = build(config, "float32")
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    save_pretrained(model, params, folder)
    save_char_tokenizer(TOKENIZER, folder)
    return folder


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_orbax_and_back(tmp_path, name):
    folder = save(FAMILIES[name], tmp_path / "hf")
    convert(folder, tmp_path / "orbax", "orbax", "float32")
    convert(tmp_path / "orbax", tmp_path / "again", "hf", "float32")
    first = from_pretrained(folder, "float32")
    for other in ("orbax", "again"):
        model = from_pretrained(tmp_path / other, "float32")
        assert model.config == first.config
        same(model.params, first.params)
        assert load_tokenizer(tmp_path / other).encode("1+2=") == TOKENIZER.encode("1+2=")
    half = from_pretrained(tmp_path / "orbax").params
    same(half, from_pretrained(folder).params)


def test_an_orbax_folder_of_other_sizes_is_refused(tmp_path):
    convert(save(QWEN, tmp_path / "hf"), tmp_path / "orbax", "orbax", "float32")
    file = tmp_path / "orbax" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 48}))
    with pytest.raises(UserError, match=r"down_proj is \[2, 32, 16\].* make it \[2, 48, 16\]"):
        from_pretrained(tmp_path / "orbax")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    sizes = dataclasses.asdict(dataclasses.replace(QWEN, vocab_size=0))
    config = settings.build(
        config_lib.Config,
        {
            "model": {"qwen3": sizes},
            "task": {"name": "arithmetic", "train_examples": 100, "heldout_examples": 16},
            "rollout": {"max_prompt_tokens": 6, "max_new_tokens": 4},
            "warmup": {"steps": 2, "batch_size": 16, "cache": False},
            "grpo": {"batch_size": 16},
            "train": {"steps": 2, "eval_batch_size": 16},
            "mesh": {"data": 8},
            "output_dir": str(folder),
        },
    )
    ais_jax.train(config)
    return folder


def test_a_run_becomes_a_folder(trained, tmp_path):
    convert(trained, tmp_path / "hf", "hf", "float32")
    model = from_pretrained(tmp_path / "hf", "float32")
    same(model.params, load_policy(trained, "float32").params)
    tokenizer = load_tokenizer(tmp_path / "hf")
    ids = TOKENIZER.encode("12*3=")
    assert tokenizer.encode("12*3=") == ids and tokenizer.decode(ids) == "12*3="
    assert tokenizer.eos_ids == (1,) and tokenizer.size == TOKENIZER.size


@pytest.mark.parametrize("recipe", ["none", "int8"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation_of_every_family(tmp_path, name, recipe):
    policy = load_policy(save(FAMILIES[name], tmp_path / "model"), "float32")
    ids = policy.tokenizer.encode("12+3=")
    for temperature in (0.0, 1.0):
        options = generate.Options(
            max_new_tokens=8,
            temperature=temperature,
            recipe=recipe,
            samples=3,
            diffusion=DiffusionConfig(4, 4) if name == "llada" else None,
        )
        result = generate.generate(policy.structure, policy.params, policy.tokenizer, ids, options)
        assert 0 < result.tokens <= 24
        assert all(set(text) <= set(TOKENIZER.alphabet) for text in result.texts)
        again = generate.generate(policy.structure, policy.params, policy.tokenizer, ids, options)
        assert again.texts == result.texts
        assert (len(set(result.texts)) == 1) == (temperature == 0)


def test_greedy_text_is_the_argmax_of_the_logits(tmp_path):
    policy = load_policy(save(QWEN, tmp_path / "model"), "float32")
    ids = policy.tokenizer.encode("7*8=")
    options = generate.Options(max_new_tokens=5)
    result = generate.generate(policy.structure, policy.params, policy.tokenizer, ids, options)
    row = list(ids)
    while len(row) < len(ids) + 5:
        logits = policy.structure.logits(policy.params, np.array([row]))[0, -1, : TOKENIZER.size]
        token = int(jnp.argmax(logits.at[0].set(-jnp.inf)))  # padding is never written
        if token == 1:
            break
        row.append(token)
    assert result.texts == [TOKENIZER.decode(row[len(ids) :])]


@pytest.mark.smoke
def test_the_commands(tmp_path):
    folder = save(QWEN, tmp_path / "hf")
    done = run("convert", folder, tmp_path / "half")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'half'}\n"), done.stderr
    assert from_pretrained(tmp_path / "half").params["norm"].dtype == jnp.bfloat16
    done = run("generate", folder, "1+2=", "--max-new-tokens", 4, "--recipe", "fp8")
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.strip()) <= set(TOKENIZER.alphabet)
    assert "tokens/s" in done.stderr


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: ["generate", d / "hf", "1+2=", "--recipe", "fp9"], ["fp9", "fp8"]),
        (lambda d: ["generate", d / "hf", "1+2=", "--thinking", "on"], ["chat template"]),
        (lambda d: ["generate", d / "hf", "what?"], ["encode"]),
        (lambda d: ["generate", d / "hf", ""], ["prompt is empty"]),
        (lambda d: ["generate", d / "hf", "1", "--max-new-tokens", "0"], ["max_new_tokens=0"]),
        (lambda d: ["generate", d / "hf", "1", "--samples", "9" * 11], ["samples=999"]),
        (lambda d: ["generate", d / "hf", "1", "--temperature", "nan"], ["temperature=nan"]),
        (lambda d: ["generate", d / "hf", "1", "--seed", "9" * 22], ["seed=999"]),
        (lambda d: ["generate", d / "none", "hello"], ["none", "no such folder"]),
        (lambda d: ["convert", d / "hf", d / "hf"], ["not empty"]),
        (lambda d: ["convert", d / "hf", d / "x", "--to", "adapter"], ["no adapters"]),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, make, words):
    save(QWEN, tmp_path / "hf")
    done = run(*make(tmp_path))
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]
    assert not (tmp_path / "x").exists()


def test_a_run_on_eight_devices_is_read_on_one(trained, tmp_path):
    done = run("convert", trained, tmp_path / "hf", "--dtype", "float32")
    assert done.returncode == 0, done.stderr
    same(from_pretrained(tmp_path / "hf", "float32").params, load_policy(trained, "float32").params)
    description = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert description == {"eos_token_id": 1, "pad_token_id": 0}


def test_what_is_not_rounded_stays_so(tmp_path):
    """Decay rates and the norm of linear attention, through a bfloat16 model and Orbax."""
    convert(save(HYBRID, tmp_path / "hf"), tmp_path / "half", "hf", "bfloat16")
    convert(tmp_path / "half", tmp_path / "orbax", "orbax", "bfloat16")
    exact = from_pretrained(tmp_path / "hf", "float32").params["layers"]["linear"]
    for name in ("half", "orbax"):
        blocks = from_pretrained(tmp_path / name).params["layers"]["linear"]
        assert blocks["out_proj"].dtype == jnp.bfloat16
        for leaf in ("A_log", "dt_bias", "linear_norm"):
            np.testing.assert_array_equal(blocks[leaf], exact[leaf])


def test_a_multimodal_checkpoint_becomes_a_text_model_in_orbax(tmp_path):
    folder = save(HYBRID, tmp_path / "hf")
    raw = json.loads((folder / "config.json").read_text())
    text = {"model_type": "qwen3_5", "text_config": raw, "tie_word_embeddings": True}
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    renamed = {k.replace("model.", "model.language_model.", 1): v for k, v in tensors.items()}
    vision = {"model.visual.patch": np.arange(6, dtype=np.float32)}
    save_file(renamed | vision, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(text))
    model = from_pretrained(folder, "float32")
    save_pretrained(model, model.params, tmp_path / "again")
    with safetensors.safe_open(tmp_path / "again" / "model.safetensors", "numpy") as stored:
        assert set(stored.keys()) == set(renamed | vision)
        np.testing.assert_array_equal(stored.get_tensor("model.visual.patch"), np.arange(6))
    convert(folder, tmp_path / "orbax", "orbax", "float32")
    convert(tmp_path / "orbax", tmp_path / "text", "hf", "float32")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["architectures"] == [
        "Qwen3_5ForCausalLM"
    ]
    same(from_pretrained(tmp_path / "text", "float32").params, model.params)


def test_a_damaged_orbax_folder_is_told(tmp_path):
    convert(save(QWEN, tmp_path / "hf"), tmp_path / "orbax", "orbax", "float32")
    for file in (tmp_path / "orbax" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 100:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match="params is damaged"):
        from_pretrained(tmp_path / "orbax")


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    folder = save(dataclasses.replace(QWEN, vocab_size=12), tmp_path / "hf")
    done = run("generate", folder, "1+2=")
    assert done.returncode == 2 and "vocab_size=12" in done.stderr


def test_a_folder_without_a_tokenizer_loads_and_cannot_be_prompted(tmp_path):
    save_pretrained(build(QWEN), build(QWEN).init(jax.random.key(0)), tmp_path / "hf")
    assert load_policy(tmp_path / "hf").tokenizer is None
    done = run("generate", tmp_path / "hf", "1+2=")
    assert done.returncode == 2 and "tokenizer" in done.stderr
