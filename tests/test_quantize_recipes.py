"""Recipes: what they say, which one a device gets, and what is refused."""

import pathlib

import jax.numpy as jnp
import pytest

from ais_jax.errors import UserError
from ais_jax.quantize import quantize
from ais_jax.recipes import RECIPES, Recipe, choose_recipe

FP8, INT8 = "fp8", "int8"
DEVICES = {
    ("cpu", "cpu"): "int8_head",
    **dict.fromkeys(
        [
            ("gpu", "NVIDIA H100 80GB HBM3"),
            ("gpu", "NVIDIA H100 PCIe"),
            ("gpu", "NVIDIA H200"),
            ("gpu", "NVIDIA GH200 480GB"),
            ("gpu", "NVIDIA B200"),
            ("gpu", "NVIDIA GB200"),
            ("gpu", "NVIDIA L4"),
            ("gpu", "NVIDIA L40S"),
            ("gpu", "NVIDIA RTX 6000 Ada Generation"),
            ("gpu", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
            ("gpu", "NVIDIA GeForce RTX 4090"),
            ("gpu", "NVIDIA GeForce RTX 5080"),
        ],
        FP8,
    ),
    **dict.fromkeys(
        [
            ("gpu", "NVIDIA A100-SXM4-80GB"),
            ("gpu", "NVIDIA A10G"),
            ("gpu", "Tesla T4"),
            ("gpu", "NVIDIA RTX A6000"),
            ("gpu", "NVIDIA GeForce RTX 3090"),
            ("tpu", "TPU v5 lite"),
            ("tpu", "TPU v5e"),
            ("tpu", "TPU v5p"),
            ("tpu", "TPU v5"),
            ("tpu", "TPU v6 lite"),
            ("tpu", "TPU v6e"),
        ],
        INT8,
    ),
    **dict.fromkeys(
        [
            ("gpu", "Tesla V100-SXM2-16GB"),
            ("gpu", "Quadro RTX 4000"),
            ("gpu", "AMD Instinct MI300X"),
            ("gpu", "NVIDIA H1000"),
            ("tpu", "TPU7x"),
            ("tpu", "TPU v4"),
            ("tpu", "TPU v3"),
            ("METAL", "Apple M4"),
        ],
        "none",
    ),
}


@pytest.mark.parametrize(("device", "recipe"), DEVICES.items(), ids=str)
def test_every_device_gets_what_its_matrix_units_gain_from(device, recipe):
    name, reason = choose_recipe(*device)
    assert name == recipe and name in RECIPES
    assert choose_recipe(*device, rows=64) == (name, reason)
    assert choose_recipe(*device, rows=33)[0] == name


def test_few_rows_leave_activations_alone_on_a_gpu_with_fp8():
    small = {device: choose_recipe(*device, rows=32) for device in DEVICES}
    for device, (name, reason) in small.items():
        if device[0] == "gpu" and DEVICES[device] == FP8:
            assert name == "fp8_weight_only" and "32 rows" in reason
        else:
            assert (name, reason) == choose_recipe(*device)


def test_every_choice_says_why():
    reasons = {choose_recipe(*device)[1] for device in DEVICES}
    assert len(reasons) == 5 and all(len(reason) > 20 for reason in reasons)


def test_documented_recipes():
    page = pathlib.Path(__file__).parents[1] / "docs" / "quantization.md"
    rows = [line.split("|") for line in page.read_text(encoding="utf-8").splitlines()]
    found = {row[1].strip(" `"): [c.strip() for c in row[2:5]] for row in rows if len(row) == 7}
    for name, rule in RECIPES.items():
        head = (rule.weights if rule.head else None) or "compute dtype"
        formats = [x or "compute dtype" for x in (rule.weights, rule.activations)]
        assert found[name] == [*formats, head]


def test_bad_input():
    w = {"q_proj": jnp.ones((4, 4))}
    with pytest.raises(UserError, match=r"'fp88' is unknown; did you mean 'fp8'\?.*int4"):
        quantize(w, "fp88")
    with pytest.raises(UserError, match=r"recipe 'auto' depends on the device; .*choose_recipe"):
        quantize(w, "auto")
    with pytest.raises(UserError, match=r"neither lm_head nor embed_tokens.*without _head"):
        quantize(w, "int8_head")
    with pytest.raises(ValueError, match="weights='fp8' is unknown; choose one of"):
        Recipe("fp8")
    with pytest.raises(ValueError, match="activations='int4' must be None or"):
        Recipe("int8", "int4")
    with pytest.raises(ValueError, match="head=True needs a format"):
        Recipe(head=True)
