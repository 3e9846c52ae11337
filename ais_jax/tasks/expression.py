"""Exact values of arithmetic expressions, for text that a model wrote.

    sum     = product { ("+" | "-") product }
    product = unary { ("*" | "/") unary }
    unary   = { "-" } atom
    atom    = digits | "(" sum ")"

Also read as operators: × and \\times, · and \\cdot, ÷ and \\div, − (U+2212). Digits are ASCII.
There are no powers, no decimals, no names and no implied products. ASCII whitespace may stand
between tokens. Lengths, nesting and literals are bounded, so that any text is answered at once.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_LENGTH = 200
MAX_DEPTH = 20
MAX_LITERALS = 20
MAX_DIGITS = 9

_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]+)|(?P<number>[0-9]+)"
    r"|(?P<operator>[-+*/()×÷·−]|\\(?:times|div|cdot))"
)
_ASCII_OPERATORS = {
    "×": "*", "·": "*", "÷": "/", "−": "-", "\\times": "*", "\\cdot": "*", "\\div": "/"
}  # fmt: skip


class ExpressionError(ValueError):
    """The text is not an expression of the grammar, is too large, or divides by zero."""


class Expression(NamedTuple):
    """What an expression says."""

    value: Fraction
    numbers: tuple[int, ...]  # its literals from left to right, without their signs


def parse(text: str) -> Expression:
    """Value and literals of an expression; whitespace around it is ignored.

    At most 200 characters, 20 levels of parentheses, and 20 literals of 9 digits.

    Raises:
      ExpressionError: anything else.

    Example:
      >>> parse("-(3 + 7) ÷ 4")
      Expression(value=Fraction(-5, 2), numbers=(3, 7, 4))
    """
    if not isinstance(text, str):
        raise ExpressionError(f"an expression is text, not {type(text).__name__}")
    text = text.strip()
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"{len(text)} characters; at most {MAX_LENGTH} are read")
    tokens = _tokens(text)
    numbers = tuple(token for token in tokens if isinstance(token, int))
    if len(numbers) > MAX_LITERALS:
        raise ExpressionError(f"{len(numbers)} numbers; at most {MAX_LITERALS} are read")
    parser = _Parser(tokens)
    value = parser.sum(0)
    if parser.token is not None:
        raise ExpressionError(f"{parser.token!r} where an operator was expected")
    return Expression(value, numbers)


def _tokens(text: str) -> list[int | str]:
    tokens: list[int | str] = []
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise ExpressionError(f"unexpected {text[position]!r} at character {position + 1}")
        position = match.end()
        token = match[0]
        if match.lastgroup == "operator":
            tokens.append(_ASCII_OPERATORS.get(token, token))
        elif match.lastgroup == "number":
            if len(token) > MAX_DIGITS:
                raise ExpressionError(f"a number of {len(token)} digits; at most {MAX_DIGITS}")
            tokens.append(int(token))
    return tokens


class _Parser:
    """Recursive descent; `depth` counts open parentheses and bounds the recursion."""

    def __init__(self, tokens: list[int | str]):
        self._rest = iter(tokens)
        self._advance()

    def _advance(self) -> None:
        self.token = next(self._rest, None)

    def sum(self, depth: int) -> Fraction:
        value = self._product(depth)
        while self.token in ("+", "-"):
            subtract = self.token == "-"
            self._advance()
            term = self._product(depth)
            value = value - term if subtract else value + term
        return value

    def _product(self, depth: int) -> Fraction:
        value = self._unary(depth)
        while self.token in ("*", "/"):
            divide = self.token == "/"
            self._advance()
            factor = self._unary(depth)
            if divide and factor == 0:
                raise ExpressionError("division by zero")
            value = value / factor if divide else value * factor
        return value

    def _unary(self, depth: int) -> Fraction:
        sign = 1
        while self.token == "-":
            sign = -sign
            self._advance()
        return sign * self._atom(depth)

    def _atom(self, depth: int) -> Fraction:
        token = self.token
        if isinstance(token, int):
            self._advance()
            return Fraction(token)
        if token != "(":
            shown = "the end" if token is None else repr(token)
            raise ExpressionError(f"{shown} where a number or '(' was expected")
        if depth == MAX_DEPTH:
            raise ExpressionError(f"more than {MAX_DEPTH} levels of parentheses")
        self._advance()
        value = self.sum(depth + 1)
        if self.token != ")":
            raise ExpressionError("a '(' is not closed")
        self._advance()
        return value
