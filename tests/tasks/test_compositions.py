"""Rewards by name: what each term gives, how they add up, and what is refused."""

import sys

import numpy as np
import pytest

from ais_jax.tasks import countdown, sudoku
from ais_jax.tasks.rewards import Composition, Malformed, of_mapping, resolve

EXAMPLES = [{"numbers": [3, 7, 5], "target": 16}] * 4
TEXTS = ["<answer>3*7-5</answer>", "<answer>3+7+5</answer>", "3*7-5", "I do not know"]


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module with functions of a user."""
    (tmp_path / "users_rewards.py").write_text(
        "def length(completions, examples):\n    return [len(c) for c in completions]\n"
        "def short(completions, examples):\n    return [1.0]\n"
        "def words(completions, examples):\n    return completions\n"
        "number = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "users_rewards"
    sys.modules.pop("users_rewards", None)
    resolve.cache_clear()


def test_terms_are_weighed_and_added_up(module):
    weights = {"correct": 1.0, "format": 0.5, f"{module}:length": -0.01, f"{module}.length": 0}
    composition = of_mapping("countdown", weights, False)
    columns = composition.columns(TEXTS, EXAMPLES)
    lengths = list(map(len, TEXTS))
    expected = np.array([[1, 0, 1, 0], [1, 1, 0, 0], lengths, lengths, [1, 0, 1, 0]]).T
    np.testing.assert_array_equal(columns, expected)
    judged = composition.judged(columns)
    np.testing.assert_allclose(
        judged.rewards, np.array([1.5, 0.5, 1, 0]) - 0.01 * np.array(lengths), rtol=1e-6
    )
    np.testing.assert_array_equal(judged.scores, [1, 0, 1, 0])
    assert list(judged.terms) == list(weights)
    assert judged.rewards.dtype == judged.scores.dtype == np.float32


def test_a_tasks_own_reward_may_be_partial():
    example = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    text = "3142243142131320".replace("0", "1")  # one of the blanks is wrong
    assert text != example["solution"]
    found = Composition("sudoku").columns([text], [example])
    np.testing.assert_array_equal(found[:, 0], sudoku.reward([text], [example]))
    assert 0 < found[0, 0] < 1
    assert found[0, 1] == 0


def test_the_rewards_of_d1_are_terms_of_their_own():
    composition = of_mapping("countdown", {"d1": 2.0, "correct": 1.0}, False)
    names = [name for name, _ in composition.terms]
    assert names[-1] == "correct"
    assert len(names) > 1 and all(name.startswith("d1/") for name in names[:-1])
    assert {weight for name, weight in composition.terms if name != "correct"} == {2.0}
    judged = composition.judged(composition.columns(TEXTS, EXAMPLES))
    assert judged.rewards[0] == 3.0
    assert judged.rewards[3] == 0.0


def test_boxed_reads_the_box_alone():
    examples = [{"problem": "?", "answer": "\\frac{1}{2}"}] * 4
    texts = ["\\boxed{0.5}", "so \\boxed{\\frac{2}{4}}", "0.5", "\\boxed{0.6}"]
    columns = of_mapping("math", {"boxed": 1.0}, False).columns(texts, examples)
    np.testing.assert_array_equal(columns[:, 0], [1, 1, 0, 0])


@pytest.mark.parametrize(
    ("text", "marked"),
    [
        ("\\boxed{3}", 1),
        ("so <answer>3</answer>.", 1),
        ("<answer>\\boxed{3}</answer>", 1),
        ("\\boxed{\\frac{1}{2}}", 1),
        ("3", 0),
        ("\\boxed{3} \\boxed{3}", 0),
        ("\\boxed{3", 0),
        ("<answer>3", 0),
        ("</answer>3<answer>", 0),
        ("<answer>3</answer><answer>3</answer>", 0),
        ("\\boxed{3} <answer>3</answer>", 0),
        ("<answer>\\boxed{3</answer>", 0),
        (None, 0),
    ],
)
def test_an_answer_is_marked_once(text, marked):
    columns = of_mapping("countdown", {"format": 1.0}, False).columns([text], EXAMPLES[:1])
    assert columns[0, 0] == marked


@pytest.mark.parametrize(
    ("task", "weights", "message"),
    [
        ("countdown", {"corect": 1.0}, "'corect' is no reward"),
        ("countdown", {"correct": "1"}, "correct='1' must be a number"),
        ("countdown", {"correct": True}, "correct=True must be a number"),
        ("countdown", {"correct": float("inf")}, "correct=inf must be finite"),
        ("countdown", {}, "no reward has a weight"),
        ("countdown", {"correct": 0}, "no reward has a weight"),
        ("countdown", {"boxed": 1.0}, "countdown has none"),
        ("arithmetic", {"d1": 1.0}, "d1 has no rewards for arithmetic"),
        ("countdown", {"os; import x": 1.0}, "is no reward"),
    ],
)
def test_what_is_no_reward_is_refused(task, weights, message):
    with pytest.raises(ValueError, match=message):
        of_mapping(task, weights, False)


@pytest.mark.parametrize("name", ["short", "words"])
def test_a_function_must_return_a_number_for_each(module, name):
    composition = of_mapping("countdown", {f"{module}:{name}": 1.0}, False)
    with pytest.raises(Malformed, match=f"{module}:{name} must return 4 numbers"):
        composition.columns(TEXTS, EXAMPLES)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("users_rewards:absent", AttributeError),
        ("users_rewards:number", TypeError),
        ("absent_module:f", ModuleNotFoundError),
    ],
)
def test_a_function_that_is_not_there_is_told(module, name, error):
    with pytest.raises(error):
        _ = of_mapping("countdown", {name: 1.0}, False).functions


def test_no_rewards_of_no_completions():
    columns = Composition("countdown").columns([], [])
    assert columns.shape == (0, 2)
    assert countdown.reward([], []).shape == (0,)
