"""The final number of a completion: of a box, a tag, a line after ####, or the text itself."""

from __future__ import annotations

import re
from fractions import Fraction

from ais_jax.tasks import common

_REACH = 1000
_SPACING = re.compile(r"\\[!,;:$%]|[$%]")
_WORD = re.compile(r"[\w.,]+(?:(?<=[0-9][eE])[-+][0-9]+)?(?:/[\w.,]+)?")
_QUANTITY = re.compile(r"([0-9.,]+(?:/[0-9.,]+)?)(?:/?[A-Za-z]+)?")  # 18, 3/4, 18kg, 18/day
_FRACTION = re.compile(r"\\[dt]?frac *\{ *-?[0-9.,]+ *\} *\{ *[0-9.,]+ *\}")
_PART = re.compile(r"(?:[\^_]|\\sqrt(?:\[\w*\])?) *\{? *[-+]?\Z")  # of a power, an index, a root
_MINUS = re.compile(r"(?:(?<![\w)}])[-−–]|[^\w)}\s][ \t]*[-−–][ \t]*)\Z")


def final_number(completion: str) -> Fraction | None:
    """The last number of the last `\\boxed{...}`; without one, of what follows the last `<answer>`;
    without that, the number on the line after the last ####; else the last of the completion.

    None where there is none. What is ignored and what is no number, `gsm8k.reward` says.
    """
    text = common.marked(completion)
    if text is None:
        line, _ = common.hashed(completion) or ("", False)
        text = completion if whole_number(line) is None else line
    whole = whole_number(text)
    return _last_number(text) if whole is None else whole


def whole_number(text: str) -> Fraction | None:
    """The number that a text is but for $, % and LaTeX spacing; None if it is none."""
    return common.number(_plain(text)) if len(text) <= _REACH else None


def _plain(text: str) -> str:
    return _SPACING.sub("", text.replace("{,}", ","))


def _last_number(text: str) -> Fraction | None:
    plain = _plain(text[-_REACH:])
    found = common.last_number_word(plain, _WORD, len(text) > _REACH)
    if found is None:
        return None
    before, word = found
    if _PART.search(before):
        return None
    fractions = [m for m in _FRACTION.finditer(plain) if m.start() <= len(before) < m.end()]
    if fractions:
        value, before = common.number(fractions[0][0]), plain[: fractions[0].start()]
    else:
        quantity = _QUANTITY.fullmatch(word.rstrip(".,"))
        value = common.number(quantity[1]) if quantity else None
    return -value if value is not None and _MINUS.search(before) else value
