import math

import numpy as np
import pytest

from ais_jax.study.statistics import Difference, has_collapsed, holm, mean, paired, verdict


def test_paired_difference_is_that_of_students_t():
    """Student's own table (Biometrika 6, 1908): hours of sleep gained by ten patients."""
    gained = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
    found = paired(gained)
    assert found.value == pytest.approx(1.58)
    assert (found.value - found.half_width, found.value + found.half_width) == pytest.approx(
        (0.7001, 2.4599), abs=1e-4
    )
    assert found.seeds == 10
    assert found.p == pytest.approx(0.002833, abs=1e-6)
    assert paired([0.5, 0.5]).p == 0 and paired([0.0, 0.0]).p == 1 and math.isnan(paired([1.0]).p)


def test_adjusted_p_values_are_those_of_holm():
    """Worked out on paper; the largest so far is kept, so that their order is that of the p."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1, 1] and holm([]) == []
    assert holm([math.nan, 0.02])[1] == 0.02 and math.isnan(holm([math.nan, 0.02])[0])


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [paired(list(rng.normal(0.3, 1.0, size=5))) for _ in range(2000)]
    covered = np.mean([abs(d.value - 0.3) <= d.half_width for d in found])
    assert covered == pytest.approx(0.95, abs=0.02)


def test_one_seed_has_no_interval_and_none_no_mean():
    assert paired([0.5])[0] == 0.5 and math.isnan(paired([0.5]).half_width)
    assert math.isnan(paired([]).value) and paired([]).seeds == 0
    assert math.isnan(mean([]).value) and math.isnan(mean([0.5]).error)
    assert mean([0.4, 0.6]) == pytest.approx((0.5, 0.1, 2))


@pytest.mark.parametrize(
    ("value", "half", "said"),
    [
        (0.03, 0.01, "better"),
        (-0.03, 0.01, "worse"),
        (0.005, 0.01, "no difference seen"),
        (0.01, 0.03, "undecided"),
        (0.3, 0.03, "undecided, interval above 0"),
        (-0.3, 0.03, "undecided, interval below 0"),
        (0.3, math.nan, "undecided"),
    ],
)
def test_verdicts(value, half, said):
    assert verdict(Difference(value, half, 5), 0.02) == said
    assert verdict(Difference(value, half, 2), 0.02) == "undecided"


def test_collapse_is_half_of_what_had_been_reached():
    rise = list(np.linspace(0, 1, 100))
    assert not has_collapsed(rise)
    assert has_collapsed([*rise, *[0.4] * 10])
    assert not has_collapsed([*rise, *[0.6] * 10])
    assert not has_collapsed([0.0] * 20)  # it never was anywhere
    assert has_collapsed([1.0] * 10 + [None] * 10)
    assert not has_collapsed([1.0] * 5 + [0.0] * 3)  # too short to tell


def test_a_long_run_that_ends_at_nothing_has_collapsed():
    """Whatever came before: also where it is the last twentieth alone."""
    for dead in (20, 100, 300):
        assert has_collapsed([0.65] * (400 - dead) + [0.0] * dead)
    assert not has_collapsed([0.65] * 390 + [0.0] * 10)
