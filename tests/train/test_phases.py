"""The watchdog, and what SIGTERM does when."""

import queue
import signal
import threading

import pytest

from ais_jax.train.phases import Phases, Preempted


def test_a_phase_that_hangs_is_named_with_its_place_and_again():
    now, said = [0.0], queue.Queue()
    phases = Phases(clock=lambda: now[0])

    def heard(start):
        while not (text := said.get(timeout=60)).startswith(start):
            pass
        return text

    with phases.watched(1, said.put), phases.phase("step 7: rollout"):
        with phases.phase("reward"):
            now[0] = 5
            text = heard("reward has not ended for 5 s; it is at ")
        # The innermost line is that of this test's waiting.
        assert "queue.py" in text or "threading.py" in text
        now[0] = 100
        heard("step 7: rollout has not ended for 100 s")
        now[0] = 200
        heard("step 7: rollout has not ended for 200 s")
    assert said.empty()
    assert "watchdog" not in [thread.name for thread in threading.enumerate()]


def test_phases_that_end_and_no_watchdog_are_silent():
    now, said = [0.0], []
    phases = Phases(clock=lambda: now[0])
    looks = threading.Event()
    with phases.watched(0.004, said.append):
        for _ in range(20):
            with phases.phase("update"):
                now[0] += 0.003
                looks.wait(0.002)  # the watchdog looks every millisecond
    with phases.watched(0, said.append), phases.phase("update"):
        now[0] += 1000
        assert "watchdog" not in [thread.name for thread in threading.enumerate()]
    assert said == []


def test_sigterm_ends_what_is_interruptible_at_once():
    phases, before = Phases(), signal.getsignal(signal.SIGTERM)
    done = []
    with phases.listening(), pytest.raises(Preempted) as caught:
        phases.leave_if_told()
        with phases.interruptible():
            done.append("before")
            signal.raise_signal(signal.SIGTERM)
            done.append("after")
    assert caught.value.code == 143
    assert done == ["before"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_sigterm_waits_for_what_is_not():
    phases, done = Phases(), []
    with phases.listening():
        with phases.interruptible():
            pass
        signal.raise_signal(signal.SIGTERM)  # as in an update
        signal.raise_signal(signal.SIGTERM)
        done.append("update")
        with pytest.raises(Preempted):
            phases.leave_if_told()
        with pytest.raises(Preempted), phases.interruptible():
            done.append("rollout")
    assert done == ["update"]


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def other():
        with Phases().listening():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen == [before]
