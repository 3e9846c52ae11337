"""Right answers in every documented form are accepted, and none for a problem that differs."""

import functools
import random
from fractions import Fraction

import expression_oracle
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ais_jax.tasks import arithmetic, countdown, gsm8k, math, sudoku

SEEDS = st.integers(0, 10**6)
FORMS = st.sampled_from([
    "{}", " {}\n", "<answer>{}</answer>", "<answer>\n{}\n</answer> that is all", "<answer>{}",
    "\\boxed{{{}}}", "so \\boxed{{{}}}.", "<answer>\\boxed{{{}}}</answer>", "So it is.\n#### {}",
    "<answer>1</answer> no: <answer>{}</answer>", "\\boxed{{1}}, or \\boxed{{{}}}",
])  # fmt: skip
OPTIONS = st.sampled_from([
    countdown.Options(),
    countdown.Options(4, max_number=100, max_target=100, operators="+-*/", parentheses=True),
    countdown.Options(max_number=1000, max_target=1000, operators="+-", listed_in_order=True),
])  # fmt: skip


def check_countdown(completion: str, example: dict, other: int) -> None:
    """The completion solves the problem, and neither with another target nor another number."""
    numbers, target = example["numbers"], example["target"]
    assert countdown.score([completion], [example]) == 1
    wrong = [{"numbers": numbers, "target": target + change} for change in (-other, other)]
    for i in range(len(numbers)):
        changed = [*numbers[:i], numbers[i] + other, *numbers[i + 1 :]]
        wrong.append({"numbers": changed, "target": target})
    wrong.append({"numbers": [*numbers, other], "target": target})
    wrong.append({"numbers": numbers[1:], "target": target})
    assert not countdown.score([completion] * len(wrong), wrong).any()


@given(SEEDS, OPTIONS, FORMS, st.integers(1, 99))
@settings(max_examples=200)
def test_generated_solutions_of_countdown(seed, options, form, other):
    (example,) = countdown.generate(1, seed, options=options)
    check_countdown(form.format(example["solution"]), example, other)
    check_countdown(form.format(f"{example['solution']} = {example['target']}"), example, other)


@given(st.lists(st.integers(1, 99), min_size=2, max_size=5), st.randoms(), FORMS, SEEDS)
@settings(max_examples=200)
def test_any_expression_of_countdown(numbers, rng, form, other):
    text, value = expression(numbers, rng)
    assume(value is not None and value.denominator == 1)
    given_numbers = rng.sample(numbers, len(numbers))
    check_countdown(form.format(text), {"numbers": given_numbers, "target": int(value)}, other + 1)


def expression(numbers: list[int], rng: random.Random) -> tuple[str, Fraction | None]:
    """A random expression as LaTeX, Unicode or ASCII has it, and its value, None if it has none."""
    terms = [(str(n), str(n)) for n in numbers]
    signs = {"+": "+", "-": "-−", "*": ("*", "×", "·", "\\times ", "\\cdot "), "/": "/÷"}
    while len(terms) > 1:
        i = rng.randrange(len(terms) - 1)
        (a, plain_a), (b, plain_b) = terms[i : i + 2]
        op = rng.choice("+-*/")
        space = rng.choice(["", " "])
        joined = f"({a}{space}{rng.choice(signs[op])}{space}{b})"
        terms[i : i + 2] = [(joined, f"({plain_a}{op}{plain_b})")]
    try:
        return terms[0][0], expression_oracle.evaluate(terms[0][1])[0]
    except ValueError:
        return terms[0][0], None


@functools.cache
def puzzles(blanks: int) -> list[dict]:
    return sudoku.generate(50, 0, options=sudoku.Options(blanks, blanks))


def in_rows(grid: str) -> str:
    return "\n".join(grid[i : i + 4] for i in range(0, 16, 4))


@given(
    st.integers(0, 49),
    st.sampled_from([1, 5, 8, 12]),
    FORMS,
    st.sampled_from([str, " ".join, in_rows]),
)
@settings(max_examples=200)
def test_solutions_of_sudoku(which, blanks, form, shape):
    example = puzzles(blanks)[which]
    grid = sudoku.solve(example["puzzle"])
    assume(shape is not in_rows or "####" not in form)  # which marks a line
    assert sudoku.score([form.format(shape(grid))], [example]) == 1
    for i in [i for i, cell in enumerate(example["puzzle"]) if cell == "0"]:
        for other in set("1234") - {grid[i]}:
            wrong = form.format(shape(grid[:i] + other + grid[i + 1 :]))
            assert sudoku.score([wrong], [example]) == 0
            assert sudoku.reward([wrong], [example]) == np.float32((blanks - 1) / blanks)


INTEGERS = st.one_of(
    st.integers(-99, 99), st.integers(-(10**9), 10**9), st.sampled_from([10**18 - 1, 1 - 10**18])
)


@given(INTEGERS, st.integers(1, 10**9), FORMS)
def test_integers_of_arithmetic(value, other, form):
    for text in (f"{value}", f"{value:,}", f"{value}.0", f"7 * 8 = {value}"):
        right, wrong = {"answer": value}, [{"answer": value + other}, {"answer": value - other}]
        assert arithmetic.score([form.format(text)], [right]) == 1
        assert not arithmetic.score([form.format(text)] * 2, wrong).any()


NUMBERS = st.one_of(
    st.integers(-999, 10**6).map(Fraction),
    st.fractions(-99, 99, max_denominator=99),
    st.decimals(-999, 999, places=2).map(Fraction),
)


def written(value: Fraction) -> list[str]:
    """A number in each form that is documented."""
    top, bottom = value.numerator, value.denominator
    sign = "-" if top < 0 else ""
    texts = [
        f"{top}/{bottom}",
        f"{2 * top}/{2 * bottom}",
        f"{sign}\\frac{{{abs(top)}}}{{{bottom}}}",
    ]
    texts.append(texts[-1].replace("frac", "dfrac"))
    if 100 % bottom == 0:
        hundredths = f"{abs(top) * 100 // bottom:03}"
        texts += [f"{sign}{hundredths[:-2]}.{hundredths[-2:]}", f"{sign}{float(abs(value)):,.3f}"]
    if bottom == 1:
        texts += [f"{top}", f"{top:,}", f"{top}.0", f"{top:,}.00"]
    return texts


@pytest.mark.parametrize("task", [gsm8k, math])
@given(NUMBERS, NUMBERS, FORMS)
@settings(max_examples=60)
def test_numbers_of_gsm8k_and_math(task, value, other, form):
    assume(value != other)
    for text in written(value):
        for dressed in (text, f"${text}$", f"{text} \\text{{ cm}}", f"{text}."):
            completion = form.format(dressed)
            assert task.score([completion], [problem(task, str(value))]) == 1, completion
            assert task.score([completion], [problem(task, str(other))]) == 0, completion
    for text in written(value):  # the right answer is written in any of these forms too
        assert task.score([form.format(value)], [problem(task, text)]) == 1, text


def problem(task, answer: str) -> dict:
    if task is math:
        return {"problem": "?", "answer": answer}
    return {"question": "?", "answer": f"It is so.\n#### {answer}"}
