"""One coefficient for any number of devices and any split into micro-batches."""

import functools

import jax
import numpy as np
import pytest
from ais_oracle import (
    LEVELS,
    Batch,
    close,
    entries,
    ess_ratio,
    expected,
    library,
    random_batch,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ais_jax import AISConfig, ais_loss

by_level = pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)


def part(batch: Batch, rows) -> Batch:
    return Batch(*(x[list(rows)] for x in batch))


@functools.partial(jax.jit, static_argnames="config")
def loss_and_grad(batch, config):
    def loss(logps):
        rest = (batch.rollout_logps, batch.advantages, batch.mask, batch.old_logps)
        result = ais_loss(logps, *rest, config=config)
        return result.loss, (result.coefficient, result.diagnostics)

    return jax.value_and_grad(loss, has_aux=True)(batch.logps)


@pytest.mark.smoke
@by_level
def test_any_number_of_devices_gives_the_same(config):
    batch = random_batch(0, rows=16, length=6)
    want = expected(batch, config)
    assert 0.1 < want.coefficient < 0.95
    for devices in (1, 2, 8):
        mesh = jax.make_mesh(
            (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
        )
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        assert len({s.device for s in sharded.logps.addressable_shards}) == devices
        (loss, (alpha, diagnostics)), grad = loss_and_grad(sharded, config)
        assert len(grad.sharding.device_set) == devices
        close(alpha, want.coefficient, 1e-6)
        close(loss, want.loss, 1e-6)
        close(grad, want.grad, 1e-6)
        for name, value in want.diagnostics.items():
            close(getattr(diagnostics, name), value, 1e-5, name)


SPLITS = [(4, 4), (1, 3, 4), (1, 3, 1, 3), (4, 1, 3), (1,) * 8]


@by_level
@settings(max_examples=10, deadline=None, derandomize=True)
@given(order=st.permutations(range(8)), sizes=st.sampled_from(SPLITS), seed=st.integers(0, 99))
def test_any_micro_batch_split_adds_up(config, order, sizes, seed):
    batch = random_batch(seed, rows=8)
    whole = expected(batch, config)
    per_row = config.aggregation != "token_mean"
    divisor = 8 * (config.max_length or 1) if per_row else batch.mask.sum()
    total, grad, start = 0.0, np.zeros(batch.mask.shape), 0
    for size in sizes:
        rows = list(order[start : start + size])
        start += size
        result, part_grad = library(
            part(batch, rows),
            config,
            np.float64,
            coefficient=whole.coefficient,
            denominator=divisor,
        )
        assert result.coefficient == whole.coefficient
        close(result.weights[batch.mask[rows]], whole.weights[rows][batch.mask[rows]], 1e-12)
        total += result.loss
        grad[rows] = part_grad
    close(total, whole.loss, 1e-12)
    close(grad, whole.grad, 1e-12)


def test_the_mean_of_per_shard_ess_is_another_number():
    """Eight shards of two rows: each sees too few weights and reports too high a reliability."""
    over_reported, alpha_errors = [], []
    for seed in range(12):
        batch = random_batch(seed, rows=16, spread=0.6)
        whole, _ = library(batch)
        weights = [entry.weight for entry in entries(batch, AISConfig())]
        close(whole.diagnostics.reliability, ess_ratio(weights), 1e-6)
        shards = [library(part(batch, (2 * i, 2 * i + 1)))[0] for i in range(8)]
        mean = np.mean([shard.diagnostics.reliability for shard in shards])
        over_reported.append(mean - whole.diagnostics.reliability)
        alpha_errors.append(np.mean([shard.coefficient for shard in shards]) - whole.coefficient)
    assert np.mean(over_reported) > 0.015
    assert np.max(np.abs(alpha_errors)) > 0.03


def test_a_micro_batch_left_to_itself_takes_another_alpha():
    """Why the coefficient and the divisor of the whole batch are passed in."""
    batch = random_batch(5, rows=8)
    alone = [library(part(batch, rows), dtype=np.float64) for rows in (range(4), range(4, 8))]
    whole, _ = library(batch, dtype=np.float64)
    alphas = [float(result.coefficient) for result, _ in alone]
    assert max(abs(a - whole.coefficient) for a in alphas) > 0.01
    assert abs(np.mean([result.loss for result, _ in alone]) - whole.loss) > 1e-3
