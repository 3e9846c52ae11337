"""The right answers of every published test file are accepted in every form, wrong ones are not."""

import itertools
import re
from fractions import Fraction

import numpy as np
import pytest

from ais_jax.tasks import aime25, amc, common, countdown, gsm8k, math, sudoku
from ais_jax.tasks.expression import ExpressionError, parse

FILES = {
    "gsm8k/test.jsonl": (gsm8k, 1319),
    "math/math500_test.jsonl": (math, 500),
    "amc/amc23_test.jsonl": (amc, 40),
    "amc/amc83_understand_r1_zero.jsonl": (amc, 83),
    "aime/aime25_test.jsonl": (aime25, 30),
    "aime/aime24_test.jsonl": (aime25, 30),
}
MARKED = (
    "so \\boxed{{{}}}.",
    "So it is.\n#### {}",
    "<answer>{}</answer>",
    "<answer>\n\\boxed{{{}}}\n</answer>",
)
PROSE = ("The final answer is {}.", "Hence x = {}", "I think it is ${}$, which is 100 % sure: {}")


@pytest.fixture(params=FILES)
def problems(request, shared_file):
    """(task, examples, right answers) of a published file."""
    task, count = FILES[request.param]
    examples = task.load(shared_file(f"data/{request.param}"))
    assert len(examples) == count
    return task, examples, [task.gold(example) for example in examples]


@pytest.mark.parametrize("form", MARKED)
def test_right_answers_are_accepted_where_they_are_marked(problems, form):
    task, examples, golds = problems
    # A line of text ends what #### says.
    texts = [form.format(" ".join(gold.split()) if "####" in form else gold) for gold in golds]
    missed = [gold for gold, ok in zip(golds, task.score(texts, examples), strict=True) if not ok]
    assert missed == []


@pytest.mark.parametrize("form", PROSE)
def test_right_numbers_are_accepted_in_prose(problems, form):
    task, examples, golds = problems
    numbers = [(e, g) for e, g in zip(examples, golds, strict=True) if common.number(g) is not None]
    assert len(numbers) >= (360 if task is math else len(examples))
    texts = [form.format(*[gold] * form.count("{}")) for _, gold in numbers]
    found = task.score(texts, [example for example, _ in numbers])
    assert [gold for (_, gold), ok in zip(numbers, found, strict=True) if not ok] == []


def test_wrong_answers_are_rejected(problems):
    task, examples, golds = problems
    following = golds[1:] + golds[:1]
    differs = np.array([_plain(a) != _plain(b) for a, b in zip(golds, following, strict=True)])
    for form in MARKED:
        found = task.score([form.format(" ".join(gold.split())) for gold in following], examples)
        assert [g for g, ok in zip(golds, found * differs, strict=True) if ok] == []
    for text in ("", "I do not know.", "\\boxed{}", "<answer></answer>", "####", "\\boxed{?}"):
        assert not task.score([text] * len(examples), examples).any()


def _plain(gold: str) -> object:
    """What is the same for math-verify, too, of the answers that follow each other here."""
    text = re.sub(r"^[a-z]=|\^\\circ|\\text\{[^}]*\}|\s", "", gold)
    return common.number(text) if common.number(text) is not None else text


def test_wrong_numbers_are_rejected(problems):
    task, examples, golds = problems
    numbers = [(e, common.number(g)) for e, g in zip(examples, golds, strict=True)]
    numbers = [(example, value) for example, value in numbers if value is not None]
    for change in (
        lambda x: x + 1,
        lambda x: x + Fraction(1, 7),
        lambda x: -x - 1,
        lambda x: 10 * x + 1,
    ):
        wrong = [str(change(value)) for _, value in numbers]
        for form in (*MARKED, PROSE[0]):
            texts = [form.format(text) for text in wrong]
            assert not task.score(texts, [example for example, _ in numbers]).any()


FORMS = (*MARKED, "The final answer is {}.", "I have tried it, and so: {}")


def solved(example: dict) -> str:
    """An expression of three numbers for their target, by trying all."""
    for a, b, c in itertools.permutations(example["numbers"]):
        for first, second in itertools.product("+-*/", repeat=2):
            for text in (f"({a}{first}{b}){second}{c}", f"{a}{first}({b}{second}{c})"):
                try:
                    if parse(text).value == example["target"]:
                        return text
                except ExpressionError:  # a division by zero
                    pass
    raise AssertionError(example)


@pytest.mark.parametrize("form", FORMS)
def test_solutions_of_countdown_are_accepted(shared_file, form):
    examples = countdown.load(shared_file("data/countdown/countdown_cd3_test.jsonl"))
    texts = [form.format(solved(example)) for example in examples]
    assert len(texts) == 256
    assert countdown.score(texts, examples).all()
    missed = [{**example, "target": example["target"] + 1} for example in examples]
    assert not countdown.score(texts, missed).any()
    others = [{**e, "numbers": [e["numbers"][0] + 1, *e["numbers"][1:]]} for e in examples]
    assert not countdown.score(texts, others).any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("name", "count"), [("4x4_test_sudoku.csv", 500), ("spg_test_sudoku_split_new.csv", 256)]
)
def test_solutions_of_sudoku_are_accepted(shared_file, name, count, form):
    examples = sudoku.load(shared_file(f"data/sudoku/{name}"))
    assert len(examples) == count
    golds = [example["solution"] for example in examples]
    assert sudoku.score([form.format(gold) for gold in golds], examples).all()
    wrong = []
    for example, gold in zip(examples, golds, strict=True):
        blank = example["puzzle"].index("0")
        wrong.append(f"{gold[:blank]}{int(gold[blank]) % 4 + 1}{gold[blank + 1 :]}")
    assert not sudoku.score([form.format(text) for text in wrong], examples).any()


@pytest.mark.parametrize("task", [math, amc, aime25])
@pytest.mark.parametrize(
    "written", ["1/2", "0.5", ".5", "0.50", "\\frac12", "\\dfrac{1}{2}", "\\frac{2}{4}", "50\\%"]
)
def test_forms_of_one_half(task, written):
    for gold in ("1/2", "0.5", "\\frac{1}{2}"):
        example = {"problem": "?", "answer": gold}
        assert task.score([f"\\boxed{{{written}}}"], [example]) == 1
        assert task.score([f"<answer>{written}</answer>"], [example]) == 1
    assert task.score([f"\\boxed{{{written}}}"], [{"problem": "?", "answer": "0.51"}]) == 0


@pytest.mark.parametrize("task", [gsm8k, math, amc, aime25])
def test_one_answer_votes_as_one(task):
    texts = [
        "\\boxed{18}",
        "#### 18.0",
        "<answer>36/2</answer>",
        "It is 18.",
        "\\boxed{\\frac{36}{2}}",
    ]
    assert {task.extract(text) for text in texts} == {"18"}
    for text in ("", "none", "\\boxed{}", None):
        assert task.extract(text) is None
    assert task.extract("\\boxed{19}") == "19"


def test_formulas_vote_in_one_form():
    assert math.extract("\\boxed{\\dfrac{x}{2}}") == math.extract("<answer>\\frac x2</answer>")
    assert math.extract("\\boxed{x}") != math.extract("\\boxed{y}")
