"""How d1 finds and compares answers of MATH: the text normal form of Hendrycks et al. (2021).

Written anew to give what the published code gives, also where that is odd: a text that its rules
cannot deal with is compared as it is. Texts are of any length, and every rule takes one pass.
"""

from __future__ import annotations

_BOXED, _SPACED, _FRAMED = "\\boxed", "\\boxed ", "\\fbox"


class Unruly(ValueError):
    """The rules cannot deal with a text."""


def boxed(text: str) -> str | None:
    """The content of the last box; the whole text without one; None if it is not closed.

    A box is \\\\boxed{...}, or \\\\boxed followed by a blank, up to the next dollar sign. The frame
    \\\\fbox{...} is found too, but stays around its content.
    """
    if _SPACED in text:
        return text.rpartition(_SPACED)[2].split("$", 1)[0]
    start = text.rfind(_BOXED)
    if start < 0:
        start = text.rfind(_FRAMED)
    if start < 0:
        return text
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if text[i] == "}" and depth == 0:
            found = text[start : i + 1]
            opening = _BOXED + "{"
            return found[len(opening) : -1] if found.startswith(opening) else found
    return None


def equivalent(first: str | None, second: str | None) -> bool:
    """Whether both have the same normal form; where a text has none, whether they are the same."""
    if first is None or second is None:
        return first is second
    try:
        return normal(first) == normal(second)
    except Unruly:
        return first == second


def normal(text: str) -> str:
    """The normal form.

    Raises:
      Unruly: there is none.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac")
    for unseen in ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$"):
        text = text.replace(unseen, "")
    text = _without_unit(text).replace("\\%", "").replace("\\%", "")  # twice, as published
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    if text[0] == ".":
        text = "0" + text
    name, equals, value = text.partition("=")
    if equals and "=" not in value and len(name) <= 2:
        text = value
    text = _braced_fractions(_braced_roots(text).replace(" ", ""))
    return _quotient("\\frac{1}{2}" if text == "0.5" else text)


def _without_unit(text: str) -> str:
    parts = text.split("\\text{ ")
    if len(parts) > 2:
        raise Unruly
    return parts[0]


def _braced_roots(text: str) -> str:
    """sqrt3 as sqrt{3}."""
    head, *parts = text.split("\\sqrt")
    if "" in parts:
        raise Unruly
    return head + "".join(
        "\\sqrt" + (part if part[0] == "{" else f"{{{part[0]}}}{part[1:]}") for part in parts
    )


def _braced_fractions(text: str) -> str:
    """frac12 and frac1{2} as frac{1}{2}."""
    head, *parts = text.split("\\frac")
    found = [head]
    for part in parts:
        if not part:
            raise Unruly
        if part[0] != "{":
            if len(part) < 2:
                return text
            second = part[1] if part[1] == "{" else f"{{{part[1]}}}"
            part = f"{{{part[0]}}}{second}{part[2:]}"
        found.append("\\frac" + part)
    return "".join(found)


def _quotient(text: str) -> str:
    """1/2 as frac{1}{2}."""
    parts = text.split("/")
    if len(parts) != 2:
        return text
    try:
        top, bottom = map(int, parts)
        written = f"{top}/{bottom}"
    except ValueError:
        raise Unruly from None
    return f"\\frac{{{top}}}{{{bottom}}}" if written == text else text
