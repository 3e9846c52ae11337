import json

from ais_jax.train.guards import Watch, watch

FINE = {"step": 1, "ratio_mean": 1.001, "ratio_sem": 0.001, "codes_changed": 0.1, "grad_norm": 1.0}


def run(rows, calibrating=False, selected=False):
    state, said = Watch(), []
    for step, row in enumerate(rows, 1):
        state, messages = watch(
            state, {**FINE, **row, "step": step}, calibrating=calibrating, selected=selected
        )
        said += messages
    return said


def test_a_healthy_run_is_silent():
    assert run([{}] * 20, calibrating=False) == []


def test_a_ratio_away_from_one_is_told_once_and_only_if_it_stays():
    off = {"ratio_mean": 1.1}
    assert run([off, off, {}, off, off]) == []
    said = run([off] * 9)
    assert len(said) == 1
    assert "1.1000" in said[0]
    assert run([off] * 9, selected=True) == []


def test_a_restart_remembers_what_was_seen_and_said():
    off = {"ratio_mean": 1.1, "codes_changed": 0.0}
    state = Watch()
    for step in range(1, 6):
        state, messages = watch(
            state, {**FINE, **off, "step": step}, calibrating=False, selected=False
        )
        assert len(messages) == (2 if step == 3 else 0)
        state = Watch.of_json(json.loads(json.dumps(state.to_json())))
    assert state == Watch(5, 5, frozenset({"ratio", "deaf"}))


def test_a_deaf_copy_is_told():
    said = run([{"codes_changed": 0.0}] * 9)
    assert len(said) == 1
    assert "no code" in said[0]
    assert run([{"codes_changed": float("nan")}] * 9) == []
    assert run([{"codes_changed": 0.0, "grad_norm": 0.0}] * 9) == []


def test_calibration_at_its_upper_limit_is_told():
    assert not run([{"severity_scale": 0.005}] * 9, calibrating=True)
    assert "upper limit" in run([{"severity_scale": 0.1}] * 9, calibrating=True)[0]
    assert run([{"severity_scale": 0.03}] * 9, calibrating=True) == []
    assert run([{"severity_scale": 0.1}] * 9, calibrating=False) == []
