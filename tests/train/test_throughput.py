"""Utilization against arithmetic done by hand, and against what XLA counts."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax.lora import LoraConfig
from ais_jax.models import Qwen3_5Config, Qwen3Config, build
from ais_jax.models.published import PUBLISHED
from ais_jax.sampling import DiffusionConfig, Policy, Rollout, SamplingConfig
from ais_jax.train import throughput
from ais_jax.train.throughput import Work

SAMPLING = SamplingConfig(8, 1.0, 0, (1,), 20)
TINY = Qwen3Config(
    vocab_size=24,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)
# Of one block: q and o, k and v, the three of the feed-forward.
BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48


def test_products_are_kernels_and_the_output_layer():
    policy = Policy(build(TINY, "float32"), SAMPLING)
    work = throughput.work_of(policy, scores=2, epochs=3)
    products = 3 * BLOCK + 24 * 32
    assert work == Work(products, products, False, 2, 3)
    # Qwen3-8B has 8.19 billion parameters, of which an untied embedding of 151,936 x 4,096.
    large = Policy(build(PUBLISHED["Qwen3-8B"]), SAMPLING)
    assert throughput.work_of(large, scores=1, epochs=1).model == pytest.approx(7.57e9, rel=2e-3)


def test_flops_are_those_that_xla_counts():
    """But for attention and norms, which are few. Of blocks that are scanned it counts one."""
    model = build(dataclasses.replace(TINY, num_hidden_layers=1), "float32")
    rows, length = 4, 4
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    mask = jnp.ones((rows, length), bool)
    forward = jax.jit(lambda params, tokens: model.logits(params, tokens, mask))
    counted = forward.lower(model.abstract_params(), tokens).compile().cost_analysis()["flops"]
    work = throughput.work_of(Policy(model, SAMPLING), scores=1, epochs=1)
    assert work.score(rows * length) == pytest.approx(counted, rel=0.15)


def test_adapters_are_trained_beside_a_base_that_only_passes_gradients_on():
    policy = Policy(build(TINY, "float32"), SAMPLING, LoraConfig(rank=2, targets=("q_proj",)))
    work = throughput.work_of(policy, scores=1, epochs=2)
    products, adapters = 3 * BLOCK + 24 * 32, 3 * 2 * (32 + 32)
    assert (work.model, work.trained, work.frozen) == (products, adapters, True)
    assert work.train(5) == 2 * 5 * (4 * products + 6 * adapters)


def test_passes_of_diffusion_models_are_not_counted():
    diffusion = SamplingConfig(
        8, 1.0, 0, (1,), 20, mask_id=22, diffusion=DiffusionConfig(block_length=8, steps=8)
    )
    assert throughput.work_of(Policy(build(TINY), diffusion), scores=1, epochs=1) is None


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "TPU v5p", "cpu"])
def test_a_step_by_hand(kind):
    mask = np.zeros((4, 6), bool)
    mask[:, :5] = True
    prompts = np.ones((4, 3), bool)
    rollout = Rollout(prompts, prompts, mask, mask, mask, mask[:, 0])
    device = types.SimpleNamespace(device_kind=kind)
    mesh = types.SimpleNamespace(size=2, devices=np.array([device, device]))
    clock = {"rollout_seconds": 2.0, "train_seconds": 4.0, "step_seconds": 10.0}
    work = Work(model=10**9, trained=10**9, frozen=False, scores=2, epochs=1)
    found = throughput.measure(work, rollout, 30, 2, clock, mesh)
    assert found["tokens_per_device_per_second"] == 30 / 2 / 2
    assert found["host_peak_gib"] > 0.01
    peak = {"NVIDIA H100 80GB HBM3": 989e12, "TPU v5p": 459e12}.get(kind)
    if peak is None:
        assert "mfu" not in found and "train_mfu" not in found
        return
    tokens = 4 * 3 + 20  # prompts and completions that are trained on
    sampled = 2 * 3 + 30  # each prompt once, also completions that were dropped
    assert found["train_mfu"] == pytest.approx(6e9 * tokens / (4 * 2 * peak))
    total = 6e9 * tokens + 2 * 2e9 * tokens + 2e9 * sampled
    assert found["mfu"] == pytest.approx(total / (10 * 2 * peak))


def test_the_first_kind_that_fits_counts():
    kinds = {"TPU v5 lite": 197e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA L40S": 362e12}
    for kind, peak in kinds.items():
        assert throughput.peak_flops(types.SimpleNamespace(device_kind=kind)) == peak


def test_linear_attention_counts_its_kernels():
    sizes = Qwen3_5Config(vocab_size=24)
    work = throughput.work_of(Policy(build(sizes), SAMPLING), scores=1, epochs=1)
    shapes = jax.tree.leaves(build(sizes).abstract_params())
    assert 0.9 * sum(x.size for x in shapes) < work.model <= sum(x.size for x in shapes)
