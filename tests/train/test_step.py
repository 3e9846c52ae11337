"""The update: against a plain reimplementation, over devices, micro-batches and minibatches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ais_jax import AISConfig, ais_loss
from ais_jax import mesh as mesh_lib
from ais_jax.models import Qwen3Config, build
from ais_jax.sampling import Policy, Rollout, SamplingConfig
from ais_jax.train import step as step_lib
from ais_jax.train.optimizer import adamw
from ais_jax.train.state import TrainState, init_state, state_shardings

ROWS, PROMPT, LENGTH, VOCAB = 16, 4, 6, 16
POLICY = Policy(
    build(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        ),
        "float32",
    ),
    SamplingConfig(LENGTH, 1.0, pad_id=0, eos_ids=(1,), token_count=VOCAB),
)
# Updates that are multiples of the gradient, large beside the parameters' last bits, make
# gradients visible in the parameters.
RATE = 1000.0
SGD = optax.sgd(RATE)
SCORE = jax.jit(POLICY.score)
UPDATE = jax.jit(
    step_lib.update, static_argnames=("policy", "optimizer", "config", "kl_coef", "micro_batches")
)


def make_batch(params, seed=0, kl=False) -> step_lib.TrainBatch:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, LENGTH + 1, ROWS)
    lengths[0], lengths[1] = LENGTH, 0
    mask = jnp.asarray(np.arange(LENGTH)[None] < lengths[:, None])
    rollout = Rollout(
        prompts=jnp.asarray(rng.integers(2, VOCAB, (ROWS, PROMPT)), jnp.int32),
        prompt_mask=jnp.ones((ROWS, PROMPT), bool),
        tokens=jnp.asarray(rng.integers(1, VOCAB, (ROWS, LENGTH)), jnp.int32),
        mask=mask,
        logps=jnp.zeros((ROWS, LENGTH)),
        truncated=jnp.zeros(ROWS, bool),
    )
    logps, _ = SCORE(params, rollout)
    noise = 0.3 * jax.random.normal(jax.random.key(seed), logps.shape)
    drift = 0.1 * jax.random.normal(jax.random.key(seed + 1), logps.shape)
    return step_lib.TrainBatch(
        rollout=rollout._replace(logps=logps + drift + noise),
        mask=mask,
        advantages=jnp.asarray(rng.normal(size=ROWS), jnp.float32),
        old_logps=logps + drift,
        ref_logps=logps + 0.2 if kl else None,
    )


def start() -> TrainState:
    return jax.jit(lambda key: init_state(POLICY.model.init(key), SGD))(jax.random.key(0))


def run_update(state, batch, coefficient, config=AISConfig(), micro_batches=1, kl_coef=0.0):
    return UPDATE(
        state,
        None,
        batch,
        coefficient,
        policy=POLICY,
        optimizer=SGD,
        config=config,
        kl_coef=kl_coef,
        micro_batches=micro_batches,
    )


def assert_close(a, b, rtol=1e-5):
    def one(x, y):
        scale = np.abs(np.asarray(y)).max()
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * max(scale, 1e-12))

    jax.tree.map(one, a, b)


@pytest.mark.smoke
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_update_is_the_gradient_of_the_documented_loss(kl_coef):
    state = start()
    batch = make_batch(state.params, kl=kl_coef > 0)

    def plain(params):
        logps, _ = POLICY.score(params, batch.rollout)
        result = ais_loss(
            logps, batch.rollout.logps, batch.advantages, batch.mask, batch.old_logps,
            coefficient=0.4,
        )  # fmt: skip
        if not kl_coef:
            return result.loss
        d = batch.ref_logps - logps
        k3 = jnp.where(batch.mask, jnp.exp(d) - 1 - d, 0).sum() / batch.mask.sum()
        return result.loss + kl_coef * k3

    value, grads = jax.jit(jax.value_and_grad(plain))(state.params)
    new, metrics = run_update(state, batch, 0.4, kl_coef=kl_coef)
    assert_close(metrics["loss"], value)
    assert_close(metrics["grad_norm"], optax.tree.norm(grads))
    moved = jax.tree.map(lambda a, b: (a - b) / RATE, state.params, new.params)
    assert_close(moved, grads)
    assert (float(metrics["kl"]) > 0) == (kl_coef > 0)


@pytest.mark.parametrize(
    ("aggregation", "policy_ratio"),
    [("token_mean", "token"), ("sequence_mean", "token"), ("sequence_sum_norm", "sequence")],
)
def test_micro_batches_change_nothing(aggregation, policy_ratio):
    config = AISConfig(
        aggregation=aggregation, policy_ratio=policy_ratio, max_length=LENGTH, dual_clip=3.0
    )
    state = start()
    batch = make_batch(state.params, kl=True)
    whole, expected = run_update(state, batch, 0.6, config, 1, kl_coef=0.1)
    for parts in (4, 16):
        new, metrics = run_update(state, batch, 0.6, config, parts, kl_coef=0.1)
        assert_close(metrics, expected)
        assert_close(new.params, whole.params)


@pytest.mark.parametrize(("data", "fsdp", "tensor"), [(1, 1, 1), (2, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_devices_change_nothing(data, fsdp, tensor):
    state = start()
    batch = make_batch(state.params)
    measure = jax.jit(functools.partial(step_lib.measure, config=AISConfig(severity_scale="auto")))
    calibration, measured = measure(state.calibration, batch)
    expected, metrics = run_update(state, batch, measured.coefficient)
    assert 0.05 < float(measured.coefficient) < 1

    devices = jax.devices()[: data * fsdp * tensor]
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(data, fsdp, tensor), devices)
    shardings = state_shardings(POLICY, SGD, mesh)
    sharded = jax.device_put(state, shardings)
    rows = jax.device_put(batch, mesh_lib.batch_sharding(mesh))
    got_calibration, got = measure(sharded.calibration, rows)
    assert_close(got_calibration, calibration)
    assert_close(got, measured)
    update = jax.jit(
        functools.partial(run_update, micro_batches=2), out_shardings=(shardings, None)
    )
    new, got_metrics = update(sharded, rows, got.coefficient)
    assert_close(got_metrics, metrics)
    assert_close(new.params, expected.params)
    assert new.params["layers"]["q_proj"].sharding == shardings.params["layers"]["q_proj"]


def test_parameters_and_moments_are_split_and_scalars_are_not():
    mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(2, 2, 2))
    optimizer = adamw(optax.constant_schedule(1e-3), 0.9, 0.95, 0.1, 1.0)
    shardings = state_shardings(POLICY, optimizer, mesh)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)(
        POLICY.model.init(jax.random.key(0))
    )
    flat = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    moments = [x for path, x in flat if "q_proj" in jax.tree_util.keystr(path)]
    assert len(moments) == 2
    for leaf in [*moments, state.params["layers"]["q_proj"]]:
        assert leaf.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert state.calibration.batches.sharding.is_fully_replicated


def test_an_update_that_is_not_finite_is_skipped_and_counted():
    state = start()
    batch = make_batch(state.params)
    broken = batch._replace(advantages=batch.advantages.at[0].set(jnp.nan))
    new, metrics = run_update(state, broken, 0.5)
    assert not np.isfinite(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, new.params, state.params)
    again, _ = run_update(new, broken, 0.5)
    assert int(again.skipped) == 2
    fine, _ = run_update(again, batch, 0.5)
    assert int(fine.skipped) == 0
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), fine.params, state.params)
    assert all(jax.tree.leaves(moved))


def test_coefficient_is_measured_on_tokens_in_the_loss():
    state = start()
    batch = make_batch(state.params)
    half = batch._replace(mask=batch.mask & (jnp.arange(ROWS) < 8)[:, None])
    cut = jax.tree.map(lambda x: x[:8], batch)
    for config in (AISConfig(), AISConfig(level="sequence_product")):
        _, a = step_lib.measure(state.calibration, half, config=config)
        _, b = step_lib.measure(state.calibration, cut, config=config)
        assert_close(a.coefficient, b.coefficient)


def test_refit_follows_an_update():
    params = start().params
    refit = jax.jit(
        functools.partial(step_lib.refit, model=POLICY.model, recipe="fp8", platform="cpu")
    )
    copy, changed = refit(params, None)
    assert np.isnan(float(changed))
    _, changed = refit(params, copy)
    assert float(changed) == 0
    moved = jax.tree.map(lambda x: x * 1.3 + 0.01, params)
    _, changed = refit(moved, copy)
    assert 0.1 < float(changed) <= 1


def test_first_moments_may_be_bfloat16():
    """Which takes their memory to a half, and moves parameters nearly the same way."""
    params = start().params
    gradients = jax.tree.map(lambda x: 3 * x + 0.01, params)

    def after_three_updates(mu_dtype):
        schedule = optax.constant_schedule(1e-2)
        optimizer = adamw(schedule, 0.9, 0.95, 0.0, 1.0, mu_dtype)
        new, state = params, optimizer.init(params)
        for factor in (1.0, -0.5, 0.7):
            scaled = jax.tree.map(lambda g, factor=factor: factor * g, gradients)
            updates, state = optimizer.update(scaled, state, new)
            new = optax.apply_updates(new, updates)
        return new, state

    new, state = after_three_updates("bfloat16")
    types = [x.dtype for x in jax.tree.leaves(state) if x.ndim]
    assert types.count(jnp.bfloat16) == types.count(jnp.float32) == len(jax.tree.leaves(params))
    right, _ = after_three_updates("float32")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4), new, right)


def test_decay_spares_norms():
    optimizer = adamw(optax.constant_schedule(1.0), 0.9, 0.95, weight_decay=0.5, max_grad_norm=1.0)
    params = start().params
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    flat = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_flatten_with_path(updates)[0]}
    for name, value in flat.items():
        assert (np.abs(np.asarray(value)).max() > 0) == ("norm" not in name), name
