"""Arithmetic by other means than the library's: Python's syntax trees, and exhaustive search."""

import ast
import itertools
import operator
from fractions import Fraction

_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> tuple[Fraction, tuple[int, ...]]:
    """Exact value and literals. ValueError for what is no arithmetic, or divides by zero."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        return _value(tree), tuple(
            node.value for node in sorted(_literals(tree), key=lambda node: node.col_offset)
        )
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from None


def _value(node) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError(f"{ast.dump(node)} is not arithmetic")


def _literals(tree) -> list[ast.Constant]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Constant)]


def solve(numbers: list[int], target: int) -> str | None:
    """An expression for a Countdown problem, by joining any two terms in all ways."""
    return _join([(Fraction(n), str(n)) for n in numbers], target)


def _join(terms, target) -> str | None:
    if len(terms) == 1:
        return terms[0][1] if terms[0][0] == target else None
    for i, j in itertools.permutations(range(len(terms)), 2):
        (a, left), (b, right) = terms[i], terms[j]
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        joined = [(a + b, "+"), (a - b, "-"), (a * b, "*")] + ([(a / b, "/")] if b else [])
        for value, op in joined:
            found = _join([*rest, (value, f"({left}{op}{right})")], target)
            if found is not None:
                return found
    return None
