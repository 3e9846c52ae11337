"""Adapters: against autodiff of the merged kernels, frozen bases, export, and a run with them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import ais_jax
from ais_jax import config as config_lib
from ais_jax import lora, settings
from ais_jax.convert import convert
from ais_jax.errors import UserError
from ais_jax.linear import LoraArray, linear
from ais_jax.lora import LoraConfig
from ais_jax.mesh import MeshConfig, make_mesh
from ais_jax.models import LladaConfig, Qwen3Config, build, from_pretrained, save_pretrained
from ais_jax.peft import save_adapter
from ais_jax.policies import open_run
from ais_jax.quantize import QuantArray, quantize
from ais_jax.sampling import Policy, SamplingConfig
from ais_jax.train.setup import initial_params
from ais_jax.train.state import state_shardings

SIZES = Qwen3Config(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
MODEL = build(SIZES, "float32")
CONFIG = LoraConfig(rank=3, alpha=6.0)
IDS = jnp.arange(14).reshape(2, 7)


def parts(config=CONFIG, seed=0):
    """(base, adapters that change something)."""
    base = MODEL.init(jax.random.key(seed))
    adapters = lora.init(config, MODEL, jax.random.key(seed + 1))
    noise = np.random.default_rng(seed)
    adapters = jax.tree.map(
        lambda x: x + jnp.asarray(noise.normal(size=x.shape) * 0.1, jnp.float32), adapters
    )
    return base, adapters


@pytest.mark.smoke
def test_new_adapters_change_nothing():
    base = MODEL.init(jax.random.key(0))
    adapters = lora.init(CONFIG, MODEL, jax.random.key(1))
    joined = lora.join(adapters, base, CONFIG.scale)
    np.testing.assert_allclose(
        MODEL.logits(joined, IDS), MODEL.logits(base, IDS), rtol=0, atol=1e-6
    )
    a = np.asarray(adapters["layers"]["down_proj"]["a"])
    assert a.shape == (2, 32, 3) and np.abs(a).max() <= 32**-0.5 and a.std() > 0.4 * 32**-0.5
    assert not np.array_equal(a[0], a[1])


def test_logits_and_gradients_are_those_of_the_merged_kernels():
    base, adapters = parts()

    def loss(adapters):
        joined = lora.join(adapters, base, CONFIG.scale)
        return jnp.sum(jnp.sin(MODEL.logits(joined, IDS)))

    def merged_loss(adapters):
        """Kernels written out, W + 2 a b, with jax's own derivative."""
        blocks = dict(base["layers"])
        for name, pair in adapters["layers"].items():
            blocks[name] = blocks[name] + 2.0 * jnp.einsum("lir,lro->lio", pair["a"], pair["b"])
        return jnp.sum(jnp.sin(MODEL.logits({**base, "layers": blocks}, IDS)))

    (value, grads), (expected, expected_grads) = (
        jax.jit(jax.value_and_grad(f))(adapters) for f in (loss, merged_loss)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), grads, expected_grads
    )
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads)) > 1e-4


@pytest.mark.parametrize("recipe", ["fp8_weight_only", "int8_weight_only"])
def test_a_quantized_base_has_the_gradient_of_its_numbers(recipe):
    rng = np.random.default_rng(0)
    w, a, b, x = (
        jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((6, 5), (6, 2), (2, 5), (4, 6))
    )
    held = quantize({"q_proj": w}, recipe, jnp.float32)["q_proj"]
    assert isinstance(held, QuantArray) and held.activation is None
    numbers = np.asarray(held.dequantize(), np.float64)

    def f(x, a, b):
        return jnp.sum(jnp.cos(linear(x, LoraArray(held, a, b, 0.5))))

    gx, ga, gb = jax.grad(f, (0, 1, 2))(x, a, b)
    x, a, b = (np.asarray(v, np.float64) for v in (x, a, b))
    g = -np.sin(x @ numbers + 0.5 * x @ a @ b)
    np.testing.assert_allclose(gx, g @ (numbers + 0.5 * a @ b).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ga, 0.5 * x.T @ g @ b.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gb, 0.5 * (x @ a).T @ g, rtol=1e-4, atol=1e-5)


def test_the_sampling_copy_is_the_quantized_merged_kernel():
    base, adapters = parts()
    joined = lora.join(adapters, base, CONFIG.scale)
    copy = quantize(lora.merge(joined), "int8", jnp.float32)
    kernels = np.asarray(base["layers"]["q_proj"], np.float64)
    pair = adapters["layers"]["q_proj"]
    kernels = kernels + 2.0 * np.asarray(pair["a"], np.float64) @ np.asarray(pair["b"], np.float64)
    held = copy["layers"]["q_proj"]
    error = np.abs(np.asarray(held.dequantize()) - kernels)
    assert (error <= 0.5001 * np.asarray(held.scale)).all()
    assert error.max() > 0


def test_targets_are_published_names():
    def adapted(model, *targets):
        tree = lora.init(dataclasses.replace(CONFIG, targets=targets), model, jax.random.key(0))
        return set(tree["layers"])

    assert adapted(MODEL, "q_proj", "v_proj") == {"q_proj", "v_proj"}
    assert len(adapted(MODEL)) == 7
    llada = build(
        LladaConfig(vocab_size=9, d_model=8, mlp_hidden_size=8, n_layers=1, n_heads=1, n_kv_heads=1)
    )
    assert adapted(llada, "attn_out", "ff_out", "ff_proj") == {"o_proj", "down_proj", "gate_proj"}
    with pytest.raises(UserError, match=r"'o_proj' is no linear .* did you mean 'v_proj'"):
        adapted(llada, "o_proj")


def test_adapters_lie_like_their_kernels():
    policy = Policy(MODEL, SamplingConfig(4, 1.0, 0, (1,), 24), CONFIG)
    import optax

    mesh = make_mesh(MeshConfig(1, 4, 2))
    shardings = state_shardings(policy, optax.adamw(1e-3), mesh)
    spec = jax.sharding.PartitionSpec
    pair = shardings.params["layers"]["down_proj"]
    assert pair["a"].spec == spec(None, "tensor", None)
    assert pair["b"].spec == spec(None, None, "fsdp")


def test_an_adapter_folder_has_what_peft_expects(tmp_path):
    _, adapters = parts()
    save_adapter(MODEL, adapters, CONFIG, "some/model", tmp_path / "adapter")
    description = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (description["r"], description["lora_alpha"]) == (3, 6.0)
    assert "self_attn.q_proj" in description["target_modules"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    pair = adapters["layers"]["down_proj"]
    np.testing.assert_array_equal(tensors[name.format("A")], pair["a"][1].T)
    np.testing.assert_array_equal(tensors[name.format("B")], pair["b"][1].T)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that trained adapters: (its folder, config, rewards by step)."""
    folder = tmp_path_factory.mktemp("lora")
    config = settings.build(
        config_lib.Config,
        {
            "model": {
                "qwen3": dataclasses.asdict(dataclasses.replace(SIZES, vocab_size=0)),
                "lora": {"rank": 4, "base_recipe": "int8_weight_only"},
            },
            "task": {"name": "arithmetic", "train_examples": 200, "heldout_examples": 32},
            "rollout": {"recipe": "int8", "max_prompt_tokens": 6, "max_new_tokens": 4},
            "warmup": {"steps": 3, "batch_size": 32, "cache": False},
            "grpo": {"batch_size": 32, "group_size": 4, "kl_coef": 0.01},
            "optimizer": {"learning_rate": 1e-2},
            "train": {"steps": 4, "eval_batch_size": 32, "dtype": "float32"},
            "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
            "output_dir": str(folder / "run"),
        },
    )
    summary = ais_jax.train(config, lambda texts, _: [len(set(t)) for t in texts])
    return folder, config, summary


def test_a_run_trains_adapters_and_nothing_else(trained):
    folder, _, summary = trained
    count = sum(
        x.size for x in jax.tree.leaves(lora.init(LoraConfig(rank=4), MODEL, jax.random.key(0)))
    )
    assert summary["trained_parameters"] == count < summary["parameters"]
    rows = [json.loads(x) for x in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[-1]["codes_changed"] > 0
    again = ais_jax.train(trained[1])  # nothing is left to do; what was saved is found
    assert again["after"] == summary["after"]


def test_a_run_is_converted_with_its_adapters_merged(trained):
    folder, _, _ = trained
    convert(folder / "run", folder / "merged", "hf", "float32")
    model = from_pretrained(folder / "merged", "float32")
    run, adapters, structure = open_run(folder / "run")
    _, frozen = initial_params(run)
    joined = run.policy.join(adapters, frozen)
    expected = structure.logits(joined, IDS % structure.config.vocab_size)
    got = model.logits(model.params, IDS % model.config.vocab_size)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    convert(folder / "run", folder / "adapter", "adapter", "float32")
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    pair = adapters["layers"]["k_proj"]
    np.testing.assert_array_equal(
        tensors["base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"], pair["b"][0].T
    )
    assert np.abs(pair["b"]).max() > 0


def test_adapters_over_a_checkpoint(tmp_path):
    base = MODEL.init(jax.random.key(3))
    save_pretrained(MODEL, base, tmp_path / "base")
    adapters = jax.tree.map(jnp.ones_like, lora.init(CONFIG, MODEL, jax.random.key(0)))
    model = from_pretrained(tmp_path / "base", "float32")
    merged = lora.merge(lora.join(adapters, model.params, CONFIG.scale))
    save_pretrained(model, merged, tmp_path / "merged")
    again = from_pretrained(tmp_path / "merged", "float32")
    joined = lora.join(adapters, model.params, CONFIG.scale)
    np.testing.assert_allclose(
        again.logits(again.params, IDS), model.logits(joined, IDS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 0}, "rank=0"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"base_recipe": "fp8"}, "base_recipe"),
    ],
)
def test_impossible_settings_are_named(changes, words):
    with pytest.raises(UserError, match=words):
        settings.build(LoraConfig, changes)


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    save_pretrained(MODEL, MODEL.init(jax.random.key(0)), tmp_path / "base")
    with pytest.raises(UserError, match="no adapters"):
        convert(tmp_path / "base", tmp_path / "adapter", "adapter", "float32")
    assert not (tmp_path / "adapter").exists()
