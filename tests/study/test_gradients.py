"""Gradients of every arm: against the trainer's own loss, and without any mismatch."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_study
from jax.flatten_util import ravel_pytree
from train.test_step import POLICY, make_batch, start

from ais_jax import AISConfig, ais
from ais_jax.ais_config import PRESETS
from ais_jax.models import Qwen3Config, build
from ais_jax.sampling import Policy, Rollout, SamplingConfig
from ais_jax.study import config as config_lib
from ais_jax.study import gradients
from ais_jax.train import state as state_lib
from ais_jax.train import step as step_lib
from ais_jax.train.metrics import read_metrics
from ais_jax.train.phases import Phases
from ais_jax.train.rewards import Rewarder
from ais_jax.train.run import train
from ais_jax.train.setup import build_examples, build_run, drop_long

ARMS = {
    "none": PRESETS["none"],
    "tis": PRESETS["tis"],
    "sequence": PRESETS["tis_sequence"],
    "icepop": PRESETS["icepop"],
    "ais": AISConfig(severity_scale=0.1),
    "ais_kl": AISConfig(severity_scale=0.2, reliability_power=0.0),
}


def of_loss(params, batch, coefficient, config, policy=POLICY):
    """[P] by the function that the trainer differentiates."""
    denominator = ais.loss_denominator(batch.mask, config)
    grads = jax.jit(jax.grad(lambda p: step_lib.loss(
        p, None, batch, coefficient, denominator, policy=policy, config=config, kl_coef=0.0
    )[0]))(params)  # fmt: skip
    return np.asarray(ravel_pytree(grads)[0], np.float64)


def measured(batch, config):
    found = ais.diagnose(
        ais.importance_weights(batch.old_logps, batch.rollout.logps, batch.mask, config),
        batch.advantages,
    )
    return ais.mixing_coefficient(found, config)


def test_gradients_of_all_weightings_are_those_of_the_trainers_loss():
    params, batch = start().params, make_batch(start().params)
    configs = tuple(ARMS.values())
    found = np.asarray(
        jax.jit(functools.partial(gradients.batch_gradients, policy=POLICY, configs=configs))(
            params, None, batch
        )
    )
    wanted = [of_loss(params, batch, 0.0, configs[0])]
    wanted += [of_loss(params, batch, 1.0, config) for config in configs]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())
    assert np.abs(found[1] - found[0]).max() > 1e-3 * np.abs(found[0]).max()


def test_gradients_of_a_model_as_large_as_a_studys_are_those_of_the_trainers_loss():
    """Vmapped, the backward pass of these shapes is compiled to something else (XLA:CPU)."""
    sizes = Qwen3Config(
        vocab_size=21,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    rows, prompt, length = 128, 14, 9
    sampling = SamplingConfig(length, 1.0, pad_id=0, eos_ids=(1,), token_count=21)
    policy = Policy(build(sizes, "float32"), sampling)
    params = policy.model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    mask = jnp.asarray(np.arange(length)[None] < rng.integers(4, length + 1, rows)[:, None])
    rollout = Rollout(
        prompts=jnp.asarray(rng.integers(2, 21, (rows, prompt)), jnp.int32),
        prompt_mask=jnp.ones((rows, prompt), bool),
        tokens=jnp.asarray(rng.integers(1, 21, (rows, length)), jnp.int32),
        mask=mask,
        logps=jnp.zeros((rows, length)),
        truncated=jnp.zeros(rows, bool),
    )
    logps = jax.jit(policy.score)(params, rollout)[0]
    assert np.isfinite(logps).all()
    noise = jnp.asarray(0.3 * rng.standard_normal((rows, length)), jnp.float32)
    advantages = jnp.asarray(rng.standard_normal(rows), jnp.float32)
    batch = step_lib.TrainBatch(
        rollout._replace(logps=logps + noise), mask, advantages, logps, None
    )
    configs = (PRESETS["tis"], PRESETS["tis_sequence"], PRESETS["icepop"])
    program = functools.partial(gradients.batch_gradients, policy=policy, configs=configs)
    found = np.asarray(jax.jit(program)(params, None, batch))
    wanted = [of_loss(params, batch, 0.0, configs[0], policy)]
    wanted += [of_loss(params, batch, 1.0, config, policy) for config in configs]
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * np.abs(other).max())


def test_sums_are_those_of_each_arms_gradient_at_its_own_coefficient():
    params = start().params
    batches = [make_batch(params, seed) for seed in (0, 1, 2)]
    configs = tuple(ARMS.values())
    kinds = tuple(dict.fromkeys(map(gradients.weighting_of, configs)))
    of_arm = tuple(kinds.index(gradients.weighting_of(c)) for c in configs)
    assert len(kinds) == 3  # tokens, capped at 2; sequences; masked
    program = jax.jit(
        functools.partial(
            gradients.accumulate, policy=POLICY, configs=configs, weightings=kinds, of_arm=of_arm
        )
    )
    scales = jnp.array([c.severity_scale for c in configs], jnp.float32)
    sums = None
    for batch in batches:
        sums = program(sums, params, None, batch, scales)
    for i, config in enumerate(configs):
        alphas = [float(measured(batch, config)) for batch in batches]
        grads = [of_loss(params, b, a, config) for b, a in zip(batches, alphas, strict=True)]
        total = np.sum(grads, axis=0)
        np.testing.assert_allclose(sums.arms[i], total, rtol=0, atol=3e-5 * np.abs(total).max())
        squares = sum(g @ g for g in grads)
        np.testing.assert_allclose(sums.arm_squares[i], squares, rtol=1e-4)
        np.testing.assert_allclose(sums.alphas[i], np.sum(alphas), rtol=1e-5)
    plain, full = ([of_loss(params, b, alpha, configs[1]) for b in batches] for alpha in (0.0, 1.0))
    cross = [
        [a @ b for a, b in zip(x, y, strict=True)]
        for x, y in ((plain, plain), (plain, full), (full, full))
    ]
    np.testing.assert_allclose(sums.products[:, of_arm[1]], np.sum(cross, axis=1), rtol=1e-4)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    path = tiny_study.write(tmp_path_factory.mktemp("study"), gradients=tiny_study.GRADIENTS)
    return config_lib.load(path)


def test_states_of_a_run_are_measured_once(plan, tmp_path):
    said = []
    gradients.measure_along(plan, "int4", 0, tmp_path, lambda: None, said.append)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0.json", "step_2.json"]
    states = [json.loads((tmp_path / f"step_{i}.json").read_text()) for i in (0, 2)]
    for state in states:
        arms = state["arms"]
        assert list(arms) == list(plan.arms)
        exact = arms["exact"]
        assert exact["bias2"] in ([0, 0, 0], [None] * 3)  # E r may not be told from 0
        assert exact["efficiency"] in ([None] * 3, pytest.approx([1, 1, 1]))
        assert exact["severity"] < 1e-5 < 1e-3 < arms["int4"]["severity"]
        assert arms["int4"]["coefficient"] == 0 and arms["int4_tis"]["coefficient"] == 1
        assert 0 < arms["int4_auto"]["coefficient"] < 1
        pairs = {name: set(arm["against"]) for name, arm in arms.items()}
        assert pairs["exact"] == set() and pairs["int4_tis"] == {"exact", "int4", "int4_auto"}
        for x in ("mse", "variance", "efficiency"):
            ratio = arms["int4_tis"]["against"]["int4"][x][0]
            if ratio is not None:
                assert ratio == pytest.approx(arms["int4_tis"][x][0] / arms["int4"][x][0])
    # Calibrated once, at the start.
    assert (
        states[0]["arms"]["int4_auto"]["severity_scale"]
        == (states[1]["arms"]["int4_auto"]["severity_scale"])
    )
    (tmp_path / "step_2.json").unlink()
    before = (tmp_path / "step_0.json").stat().st_mtime_ns
    gradients.measure_along(plan, "int4", 0, tmp_path, lambda: None, said.append)
    assert json.loads((tmp_path / "step_2.json").read_text()) == states[1]
    assert (tmp_path / "step_0.json").stat().st_mtime_ns == before


def test_the_scale_is_what_the_trainer_finds_for_the_same_run(monkeypatch, tmp_path):
    monkeypatch.setattr(state_lib, "CALIBRATION_BATCHES", 1)  # after one step the states differ
    auto = "arms.int4_auto.settings={ais: {severity_scale: auto, severity_factor: 2.0}}"
    plan = config_lib.load(tiny_study.write(tmp_path, gradients=tiny_study.GRADIENTS), [auto])
    config = plan.config("int4_auto", 0)
    train(dataclasses.replace(config, output_dir=str(tmp_path / "run")))
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    run = build_run(config, tmp_path)
    examples = drop_long(build_examples(config), run.prompter).train
    with Rewarder(config.composition, config.grpo.group_size, 60, Phases(), print) as rewarder:
        judge = functools.partial(rewarder.judge, score=run.prompter.task.score)
        _, run, state = next(gradients._states(run, examples, judge, 0, lambda: None))
        group = next(g for g in gradients.group_arms(plan, 0) if "int4_auto" in g.arms)
        scales = gradients.calibrated(group, state, examples, judge)
    assert scales[group.arms.index("int4_auto")] == pytest.approx(first["severity_scale"], rel=1e-5)
    assert first["severity_scale"] == pytest.approx(2 * first["severity"], rel=1e-5)


def test_arms_that_differ_in_the_correction_alone_share_their_rollouts(plan):
    groups = gradients.group_arms(plan, 0)
    assert [group.arms for group in groups] == [("exact",), ("int4", "int4_tis", "int4_auto")]
    # All weigh tokens, capped alike: one backward pass serves the three.
    assert len(groups[1].weightings) == 1
    assert dataclasses.replace(groups[1].configs[1]) == plan.config("int4_tis", 0).ais
