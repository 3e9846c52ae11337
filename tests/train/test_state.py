import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ais_jax import AISConfig
from ais_jax.train.state import Calibration, calibrate, severity_scale

AUTO = AISConfig(severity_scale="auto", severity_factor=1.0)
EMPTY = Calibration(jnp.float32(0), jnp.int32(0))


def after(severities, config=AUTO):
    state = EMPTY
    for severity in severities:
        state = jax.jit(calibrate)(state, jnp.float32(severity))
    return float(severity_scale(state, config))


def test_scale_is_the_running_mean_of_the_first_five():
    assert after([0.01]) == pytest.approx(0.01)
    assert after([0.01, 0.03]) == pytest.approx(0.02)
    five = [0.01, 0.03, 0.02, 0.02, 0.02]
    assert after(five) == pytest.approx(0.02)
    assert after([*five, 5.0, 5.0]) == pytest.approx(0.02)
    for factor in (0.5, 2.0):
        config = AISConfig(severity_scale="auto", severity_factor=factor)
        assert after(five, config) == pytest.approx(0.02 * factor)


def test_scale_is_limited_and_ignores_what_is_not_finite():
    assert after([1e-6]) == pytest.approx(0.005)
    assert after([3.0]) == pytest.approx(0.1)
    assert after([np.nan, 0.02, np.inf]) == pytest.approx(0.02)


def test_a_number_is_taken_as_it_is():
    assert float(severity_scale(EMPTY, AISConfig(severity_scale=0.3))) == pytest.approx(0.3)
