"""The parser against values known by construction and against Python's syntax trees."""

import random
from fractions import Fraction

import expression_oracle
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ais_jax.tasks import expression
from ais_jax.tasks.expression import ExpressionError, parse

HOSTILE = [
    "",
    "   ",
    "9**9**9",
    "2**3",
    "2^3",
    "7//2",
    "7%2",
    "1.5+1",
    "1e3",
    "0x10",
    "1_000",
    "+3",
    "3+",
    "*3",
    "3 4",
    "2(3)",
    "(2)(3)",
    "(1+2",
    "1+2)",
    ")(",
    "()",
    "3=3",
    "1,2",
    "1/0",
    "1/(2-2)",
    "0/0",
    "5/(1/(3-3))",
    "٣+٧",
    "²+1",
    "３+７",
    "1\x00+2",
    "\x00",
    "{0}+{1}",
    "%s%n",
    "{0.__class__}",
    "__import__('os')",
    "a+b",
    "lambda: 1",
    "3 × x",
    "3⋅7",
    "1\u00a0+2",
    "3\\timesx7",
    "3\\divide7",
    "\\frac{1}{2}",
    "3\\7",
    "(" * 10_000_000,
    "-" * 10_000_000 + "1",
    "1+" * 5_000_000 + "1",
    "9" * 10_000_000,
    "(" * 90 + "1" + ")" * 90,
]


class TreeWriter:
    """Random text of the grammar whose value is computed while it is written."""

    def __init__(self, seed: int, unicode: bool):
        self.random = random.Random(seed)
        self.literals: list[int] = []
        signs = {"+": "+", "-": "-−", "*": "*×·", "/": "/÷"}
        self.signs = signs if unicode else {op: op for op in signs}
        self.latex = {"*": ["\\times ", "\\cdot "], "/": ["\\div "]} if unicode else {}

    def sum(self, depth: int) -> tuple[str, Fraction]:
        text, value = self.product(depth)
        while self.random.random() < 0.4 and len(self.literals) < 10:
            op = self.random.choice("+-")
            more, other = self.product(depth)
            text, value = text + self.sign(op) + more, value + other if op == "+" else value - other
        return text, value

    def product(self, depth: int) -> tuple[str, Fraction]:
        text, value = self.unary(depth)
        while self.random.random() < 0.4 and len(self.literals) < 10:
            op = self.random.choice("*/")
            more, other = self.unary(depth)
            if op == "/" and other == 0:
                op = "*"
            text, value = text + self.sign(op) + more, value * other if op == "*" else value / other
        return text, value

    def unary(self, depth: int) -> tuple[str, Fraction]:
        if self.random.random() < 0.15:
            text, value = self.unary(depth)
            return self.sign("-") + text, -value
        if depth and self.random.random() < 0.35:
            text, value = self.sum(depth - 1)
            return f"({text})", value
        literal = self.random.choice([0, 1, 2, 7, 10, 99, self.random.randrange(10**9)])
        self.literals.append(literal)
        return str(literal), Fraction(literal)

    def sign(self, op: str) -> str:
        shown = self.random.choice([*self.signs[op], *self.latex.get(op, [])])
        return shown + self.random.choice(["", "", " ", "\t"])


@pytest.mark.parametrize("unicode", [False, True])
def test_values_known_by_construction(unicode):
    checked = 0
    for seed in range(2000):
        writer = TreeWriter(seed, unicode)
        text, value = writer.sum(depth=4)
        if len(text) <= expression.MAX_LENGTH:
            checked += 1
            assert parse(f" {text}\n") == (value, tuple(writer.literals)), text
    assert checked > 1500


@pytest.mark.parametrize(
    ("text", "value", "numbers"),
    [
        ("7", 7, (7,)),
        ("2+3*4", 14, (2, 3, 4)),
        ("10-4-3", 3, (10, 4, 3)),
        ("100/5/2", 10, (100, 5, 2)),
        ("8/3*3", 8, (8, 3, 3)),
        ("1/3+1/6", Fraction(1, 2), (1, 3, 1, 6)),
        ("--3", 3, (3,)),
        ("2*-3", -6, (2, 3)),
        ("-(1+2)*2", -6, (1, 2, 2)),
        ("007", 7, (7,)),
        ("3×7−5", 16, (3, 7, 5)),
        ("3·7", 21, (3, 7)),
        ("6÷4", Fraction(3, 2), (6, 4)),
        ("3\\times7", 21, (3, 7)),
        ("3 \\cdot 7 \\div 2", Fraction(21, 2), (3, 7, 2)),
        ("\t( 3 )\r\n", 3, (3,)),
    ],
)
def test_what_is_read(text, value, numbers):
    assert parse(text) == (value, numbers)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:12]))
def test_what_is_refused(text):
    with pytest.raises(ExpressionError) as error:
        parse(text)
    message = str(error.value)
    assert len(message) < 100 and "\n" not in message


@pytest.mark.parametrize("value", [None, 3, b"3", ["3"]])
def test_only_text_is_read(value):
    with pytest.raises(ExpressionError, match=type(value).__name__):
        parse(value)


@pytest.mark.parametrize(
    ("largest", "too_large"),
    [
        ("1" + " " * 197 + "-1", "1" + " " * 198 + "-1"),
        ("1" + "0" * 8, "1" + "0" * 9),
        ("+".join(["1"] * 20), "+".join(["1"] * 21)),
        ("(" * 20 + "1" + ")" * 20, "(" * 21 + "1" + ")" * 21),
    ],
    ids=["length", "digits", "literals", "depth"],
)
def test_bounds(largest, too_large):
    parse(largest)
    with pytest.raises(ExpressionError):
        parse(too_large)


@given(st.text(max_size=300))
@settings(deadline=None)
def test_any_text_is_answered(text):
    try:
        value, numbers = parse(text)
    except ExpressionError:
        return
    assert isinstance(value, Fraction) and numbers


@given(st.text(alphabet="12+-*/() ", max_size=14))
@example("1--1")
@example("2*-(1)")
@example("2**1")
@example("1//2")
@settings(deadline=None, max_examples=1500)
def test_same_language_as_python(text):
    """Over this alphabet the grammar is Python's, without **, // and unary plus."""
    try:
        want = expression_oracle.evaluate(text)
    except ValueError:
        with pytest.raises(ExpressionError):
            parse(text)
    else:
        assert parse(text) == want
