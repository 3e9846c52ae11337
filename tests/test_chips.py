"""Which chip a device is, and the least time of work on it."""

import pytest

from ais_jax.chips import GIB, find_chip, times


@pytest.mark.parametrize(
    ("kind", "name", "bf16", "gib"),
    [
        ("TPU v4", "TPU v4", 275e12, 32),
        ("TPU v5 lite", "TPU v5e", 197e12, 16),
        ("TPU v5e", "TPU v5e", 197e12, 16),
        ("TPU v5", "TPU v5p", 459e12, 96),
        ("TPU v5p", "TPU v5p", 459e12, 96),
        ("TPU v6 lite", "TPU v6e", 918e12, 32),
        ("TPU7x", "TPU7x", 2307e12, 192),
        ("NVIDIA H100 80GB HBM3", "H100 80GB", 989e12, 80),
    ],
)
def test_device_kinds(kind, name, bf16, gib):
    chip = find_chip(kind)
    assert (chip.name, chip.bf16) == (name, bf16)
    # What programs may take is a little less than what is built in.
    assert 0.93 * gib * GIB < chip.memory <= gib * GIB


def test_unknown_kinds_have_no_figures():
    assert find_chip("cpu") is None
    assert find_chip("TPU v9000") is None


def test_the_slowest_resource_is_the_time():
    chip = find_chip("TPU v5 lite")
    one_of_each = times(chip, {"bf16": 197e12, "int8": 393e12}, 819e9, 100e9)
    assert one_of_each.compute == pytest.approx(2)
    assert (one_of_each.memory, one_of_each.network) == (pytest.approx(1), pytest.approx(1))
    assert (one_of_each.seconds, one_of_each.bound) == (pytest.approx(2), "compute")
    assert times(chip, {}, 3 * 819e9, 0).bound == "memory"
    assert times(chip, {"f32_highest": 197e12}, 0, 1e12).bound == "network"
    assert times(chip, {"f32_highest": 197e12}, 0, 0).seconds == pytest.approx(6)


def test_a_chip_of_two_devices_is_shared():
    half = find_chip("TPU7x").split(2)
    assert half.name == "TPU7x"
    assert half.memory == find_chip("TPU7x").memory / 2
    assert times(half, {"fp8": 2307e12}, 3690e9, 0)[:2] == (pytest.approx(1), pytest.approx(1))
