"""Whole runs of a very small diffusion policy: what is compared with what, resume, bad input."""

import pathlib

import jax
import numpy as np
import pytest

import ais_jax
from ais_jax import config as config_lib
from ais_jax import settings
from ais_jax.errors import UserError
from ais_jax.train import checkpoint
from ais_jax.train.metrics import read_metrics

ESTIMATORS = {
    "trajectory": {"segments": 0},
    "selection": {"segments": 0, "selection": True},
    "segments": {"segments": 2, "canvases": 1, "draws": 2},
    "one_step": {"estimator": "one_step", "prompt_masking": 0.5, "draws": 3},
    "ar_order": {"estimator": "ar_order", "canvases": 5, "draws": 2},
    "elbo": {"estimator": "elbo", "elbo_samples": 2, "draws": 2},
}


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A function that makes the config of a job of a few seconds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AIS_SHARED", str(tmp_path))

    def make(name="run", diffusion=None, **changes):
        sizes = {"d_model": 32, "mlp_hidden_size": 64, "n_layers": 1, "n_heads": 4, "n_kv_heads": 4}
        config = settings.build(
            config_lib.Config,
            {
                "model": {"family": "llada", "llada": sizes},
                "task": {
                    "name": "sudoku",
                    "train_examples": 256,
                    "heldout_examples": 32,
                    "sudoku": {"min_blanks": 2, "max_blanks": 4},
                },
                "rollout": {
                    "max_prompt_tokens": 17,
                    "max_new_tokens": 18,
                    "temperature": 0.8,
                    "diffusion": {"block_length": 9, "steps": 6, **(diffusion or {})},
                },
                "grpo": {"batch_size": 16, "group_size": 4, "micro_batch_size": 4},
                "train": {"steps": 2, "eval_batch_size": 32, "dtype": "float32"},
                "mesh": {"data": 2, "tensor": 4},
                "output_dir": str(tmp_path / name),
            },
        )
        return settings.replace(config, changes)

    return make


def varied(completions, examples):
    """A reward that differs within most groups of an untrained policy."""
    return [len(set(text)) for text in completions]


def metrics_of(config):
    return read_metrics(f"{config.output_dir}/metrics.jsonl")


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_policy_that_does_not_change_agrees_with_itself(job, name):
    """Through inner epochs, minibatches, micro-batches and devices: the same canvases for sampling
    copy, old, new and reference policy, or they would differ."""
    config = job(
        diffusion=ESTIMATORS[name],
        **{
            "rollout.recipe": "none",
            "optimizer.learning_rate": 0.0,
            "grpo.kl_coef": 0.1,
            "grpo.inner_epochs": 4,
            "grpo.minibatches": 2,
            "train.steps": 1,
        },
    )
    ais_jax.train(config, varied)
    (row,) = metrics_of(config)
    if name == "selection":
        # Its factor jumps where two confidences differ by rounding, which is up to the machine: of
        # a few tokens. Canvases of another row are a severity of 1.5.
        assert row["severity"] < 0.02
    else:
        assert row["severity"] < 2e-5
        assert row["ratio_max"] == pytest.approx(1, abs=1e-3)
        assert abs(row["kl"]) < 1e-7
        assert row["clip_fraction"] == 0
    assert row["grad_norm"] > 1e-4
    assert row["forwards"] == 6


@pytest.mark.smoke
def test_the_quantized_copy_is_scored_at_the_same_canvases(job):
    """Else the difference between a merged canvas and a step's own would be taken for mismatch."""
    severity = {}
    for name in ("trajectory", "segments", "one_step"):
        config = job(name, diffusion=ESTIMATORS[name], **{"rollout.recipe": "fp8"})
        ais_jax.train(config, varied)
        severity[name] = metrics_of(config)[0]["severity"]
    assert all(1e-4 < value < 0.1 for value in severity.values()), severity


def test_interrupted_and_resumed_equals_uninterrupted(job):
    draws = {"diffusion": ESTIMATORS["one_step"], "grpo.inner_epochs": 3, "warmup.steps": 3}
    whole, parts = job("whole", **draws), job("parts", **draws)
    ais_jax.train(whole, varied)
    ais_jax.train(settings.replace(parts, {"train.steps": 1}), varied)
    ais_jax.train(parts, varied)
    states = []
    for config in (whole, parts):
        with checkpoint.manager(pathlib.Path(config.output_dir) / "checkpoints") as manager:
            states.append(manager.restore(2).state)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_warm_up_lowers_the_bound(job, capsys):
    config = job(**{"warmup.steps": 60, "warmup.batch_size": 64, "train.steps": 1})
    ais_jax.train(config, varied)
    lines = [line for line in capsys.readouterr().out.splitlines() if "warm-up" in line]
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines]
    assert losses[-1] < losses[0] - 0.3


def test_evaluation_at_another_length_keeps_the_tokens_a_step(job):
    config = job(**{"train.eval_max_new_tokens": 27, "train.steps": 1})
    assert "heldout_cell_accuracy" in ais_jax.train(config, varied)["after"]
    with pytest.raises(
        UserError, match=r"steps=6 for 18 tokens is no whole number of steps for 20"
    ):
        ais_jax.train(job("other", **{"train.eval_max_new_tokens": 20}))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rollout.max_new_tokens": 20}, "block_length=9 does not divide the 20 tokens"),
        ({"rollout.diffusion.steps": 20}, "steps=20 is above the 18 tokens"),
        ({"rollout.diffusion.steps": 7}, "steps=7 is not a multiple of the 2 blocks"),
        ({"model.llada.vocab_size": 9}, "mask_token_id=126336 is no id of a vocabulary of 9"),
        (
            {"model.llada.vocab_size": 16, "model.llada.mask_token_id": 3},
            "mask_token_id=3 is one of the tokenizer's 8 ids",
        ),
        ({"rollout.max_prompt_tokens": 5}, "max_prompt_tokens=5, the shortest has 17 tokens"),
    ],
)
def test_bad_input_is_told_before_anything_is_written(job, changes, message):
    config = job(**changes)
    with pytest.raises(UserError, match=message):
        ais_jax.train(config)


def test_long_prompts_are_left_out(job, capsys):
    config = job(
        **{
            "task.name": "countdown",
            "task.countdown.max_number": 100,
            "rollout.max_prompt_tokens": 11,
            "train.steps": 1,
        }
    )
    ais_jax.train(config, varied)
    assert "further problems are left out" in capsys.readouterr().out
