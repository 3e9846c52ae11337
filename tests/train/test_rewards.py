"""Reward functions that raise, hang, die or lie, here and in a process of their own."""

import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import reward_functions
from processes import alive, gone

from ais_jax.errors import UserError
from ais_jax.tasks import countdown
from ais_jax.tasks.rewards import Composition
from ais_jax.train.grpo import group_advantages
from ais_jax.train.phases import Phases
from ais_jax.train.rewards import Rewarder, fill

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def rewarder():
    """Makes rewarders that are closed in the end; `.said` is what they warned of."""
    made, said = [], []

    def make(function, timeout=30.0, group_size=2):
        made.append(Rewarder(function, group_size, timeout, Phases(), said.append))
        return made[-1].__enter__()

    make.said = said
    yield make
    for one in made:
        one.__exit__(None, None, None)


def both(name):
    """A function of `reward_functions`, as itself and by name."""
    return [getattr(reward_functions, name), f"reward_functions:{name}"]


@pytest.mark.parametrize("kind", ["std", "mean", "leave_one_out"])
def test_a_failed_row_has_no_advantage_and_leaves_the_mean_alone(kind):
    rewards = np.array([0.1, 7, 0.1, 0.1, 1, 2, 9, 9], np.float32)
    failed = np.array([0, 1, 0, 0, 0, 0, 1, 1], bool)
    filled = fill(rewards, failed, 4)
    np.testing.assert_array_equal(filled[~failed], rewards[~failed])
    np.testing.assert_allclose(filled[failed], [0.1, 1.5, 1.5], rtol=1e-6)
    advantages = np.asarray(group_advantages(filled, 4, kind))
    np.testing.assert_array_equal(advantages[:4], 0)  # all that is known of them is equal
    np.testing.assert_allclose(advantages[6:], 0, atol=1e-6)
    assert advantages[4] < 0 < advantages[5]
    np.testing.assert_array_equal(fill(rewards, np.ones(8, bool), 4), np.zeros(8))


def test_a_tasks_reward_is_the_same_in_a_process_of_its_own(rewarder):
    examples = countdown.generate(6, 0)
    texts = [countdown.demonstration(example) for example in examples]
    texts[1], texts[2], texts[3] = "", "\udc80\u2028\n", "1+"
    found = rewarder("ais_jax.tasks.countdown:reward")(texts, examples)
    np.testing.assert_array_equal(found, countdown.reward(texts, examples))
    assert 0 < found.mean() < 1
    assert found.dtype == np.float32


def test_the_process_has_no_jax_and_may_print(rewarder):
    assert rewarder("reward_functions:has_jax")(["a"], [{}]) == [0]
    assert "jax" in sys.modules
    np.testing.assert_array_equal(
        rewarder("reward_functions:length")(["a", "bcd"], [{}, {}]), [1, 3]
    )


@pytest.mark.parametrize("function", both("bad"))
def test_what_raises_costs_its_row(rewarder, function):
    made = rewarder(function)
    found = made(["a", "b", "raise", "c"], [{}] * 4)
    np.testing.assert_array_equal(found, [2, 2, 2, 2])
    assert made.take_failed() == 1
    assert made.take_failed() == 0
    (text,) = rewarder.said
    assert "failed for 1 of 4 completions, for completion 2 by RuntimeError: no answer" in text
    np.testing.assert_array_equal(made(["raise", "raise", "a", "b"], [{}] * 4), [0, 0, 2, 2])
    assert made.take_failed() == 2


@pytest.mark.parametrize("function", both("bad"))
def test_what_hangs_costs_its_row(rewarder, function):
    made = rewarder(function, timeout=0.5)
    np.testing.assert_array_equal(made(["a", "hang", "b", "c"], [{}] * 4), [2, 2, 2, 2])
    assert made.take_failed() == 1
    assert "for completion 1 by taking longer than 0.5 s" in rewarder.said[0]
    np.testing.assert_array_equal(made(["a", "b"], [{}] * 2), [2, 2])


def test_what_hangs_in_a_process_of_its_own_costs_its_row(rewarder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = rewarder("reward_functions:bad", timeout=0.5)
    began = time.monotonic()
    np.testing.assert_array_equal(made(["a", "fork", "b", "c"], [{}] * 4), [2, 2, 2, 2])
    assert time.monotonic() - began < 60
    assert made.take_failed() == 1
    gone(int((tmp_path / "pid").read_text()))


def test_a_reward_may_end_what_it_has_started(rewarder):
    made = rewarder("reward_functions:bad", timeout=30)
    np.testing.assert_array_equal(made(["a", "end"], [{}] * 2), [2, 2])
    assert made.take_failed() == 0


def test_what_dies_costs_its_row(rewarder):
    made = rewarder("reward_functions:bad")
    np.testing.assert_array_equal(made(["a", "die", "exit", "b"], [{}] * 4), [2, 2, 2, 2])
    assert made.take_failed() == 2
    assert "for completion 1 by the end of its process with code 3" in rewarder.said[0]


def test_a_batch_that_fails_although_its_rows_do_not(rewarder):
    def alone(completions, examples):
        if len(completions) > 1:
            raise MemoryError
        return [1.0]

    made = rewarder(alone)
    np.testing.assert_array_equal(made(["a", "b"], [{}] * 2), [1, 1])
    assert made.take_failed() == 0
    assert "failed for a batch, not for its rows: MemoryError" in rewarder.said[0]


def test_a_person_is_not_told_at_every_step(rewarder):
    made = rewarder(reward_functions.bad)
    for _ in range(20):
        made(["a", "raise"], [{}] * 2)
    assert len(rewarder.said) == 5
    assert made.take_failed() == 20


@pytest.mark.parametrize(
    ("function", "texts", "message"),
    [
        *[(f, ["raise"] * 4, "failed for all 4 .*completion 0 by Runtime") for f in both("bad")],
        *[(f, ["hang"] * 9 + ["a"], "hangs: 8 completions") for f in both("bad")],
        *[(f, ["a", "b"], "must return .*numbers") for f in both("words")],
        *[(f, ["a", "b"], "2 numbers.*shape") for f in both("one")],
    ],
)
def test_a_function_that_is_of_no_use_stops_the_run(rewarder, function, texts, message):
    made = rewarder(function, timeout=0.2 if "hang" in texts else 30)
    with pytest.raises(UserError, match=message):
        made(texts, [{}] * len(texts))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward_functions:absent", "AttributeError.*absent"),
        ("no_such_module:reward", "ModuleNotFoundError.*no_such_module"),
        ("reward_functions:NOT_A_FUNCTION", "cannot be called"),
        ("reward_functions", "no reward function reward_functions"),
    ],
)
def test_a_function_that_is_not_there_is_told_before_anything_is_trained(rewarder, name, message):
    with pytest.raises(UserError, match=message):
        rewarder(name)


def test_the_process_ends_with_its_parent_even_in_a_hang(tmp_path):
    """The parent is gone without a word; its worker has a request that never ends."""
    parent = """
import os, subprocess, sys
command = [sys.executable, "-m", "ais_jax.reward_worker", str(os.getpid())]
worker = subprocess.Popen(command, stdin=subprocess.PIPE)
worker.stdin.write(b'{"function": "reward_functions:bad", "completions": ["hang"],'
                   b' "examples": [{}]}\\n')
worker.stdin.flush()
print(worker.pid, flush=True)
os.read(0, 1)
os._exit(0)
"""
    paths = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    with process:
        worker = int(process.stdout.readline())
        assert alive(worker)
        process.stdin.write(b"x")
    gone(worker)


def test_a_composition_is_computed_in_a_process_of_its_own(rewarder):
    examples = countdown.generate(4, 0)
    texts = [countdown.demonstration(example) for example in examples]
    texts[1] = "1+1"
    weights = (("correct", 1.0), ("format", 0.5), ("reward_functions:length", 0.25))
    judged = rewarder(Composition("countdown", weights)).judge(texts, examples, None)
    np.testing.assert_array_equal(judged.scores, [1, 0, 1, 1])
    np.testing.assert_array_equal(judged.terms["format"], np.zeros(4))  # nothing is marked
    np.testing.assert_array_equal(judged.terms["reward_functions:length"], list(map(len, texts)))
    np.testing.assert_allclose(
        judged.rewards, judged.scores + 0.25 * np.array(list(map(len, texts)), np.float32)
    )


def test_a_function_has_no_terms_but_scores(rewarder):
    judged = rewarder(reward_functions.length).judge(["1", "22"], [{}] * 2, lambda c, e: [0.0, 1.0])
    np.testing.assert_array_equal(judged.rewards, [1, 2])
    np.testing.assert_array_equal(judged.scores, [0, 1])
    assert judged.terms == {}


def test_a_term_that_raises_costs_its_row_of_all_columns(rewarder):
    weights = (("correct", 1.0), ("reward_functions:bad", 0.5))
    made = rewarder(Composition("countdown", weights))
    examples = [{"numbers": [1, 2, 3], "target": 6}] * 4
    judged = made.judge(["1+2+3", "a", "raise", "1+2+3"], examples, None)
    np.testing.assert_array_equal(judged.scores, [1, 0, np.nan, 1])
    np.testing.assert_array_equal(judged.rewards, [2, 1, 2, 2])
    assert made.take_failed() == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("reward_functions:absent", "no reward function correct, reward_functions:absent"),
        ("reward_functions:one", "reward_functions:one must return 2 numbers"),
        ("reward_functions:nan", "reward_functions:nan returned nan for completion 1"),
    ],
)
def test_a_malformed_term_ends_the_run_with_its_name(rewarder, name, message):
    with pytest.raises(UserError, match=message):
        made = rewarder(Composition("countdown", (("correct", 1.0), (name, 1.0))))
        made.judge(["1", "2"], [{"numbers": [1, 2, 3], "target": 6}] * 2, None)
