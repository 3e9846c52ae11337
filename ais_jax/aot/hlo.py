"""A compiled program's text, as XLA prints it: computations of instructions."""

from __future__ import annotations

import math
import re
from typing import NamedTuple

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([\w\-]+)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
_NEAR = re.compile(r"S\([1-9]")


class Shape(NamedTuple):
    """An array."""

    dtype: str  # as XLA names it: bf16, s8, f8e4m3fn...
    dims: tuple[int, ...]
    near: bool = False  # held beside the cores, in the VMEM of a TPU, not in the memory

    @property
    def size(self) -> float:
        """Bytes, without padding."""
        return math.prod(self.dims) * bits_of(self.dtype) / 8

    @property
    def far(self) -> float:
        """Bytes in the device's memory."""
        return 0.0 if self.near else self.size


class Instruction(NamedTuple):
    """One line."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # its results, those of a tuple one after the other
    operands: tuple[str, ...]
    inside: str  # what stands in its parentheses
    attributes: str  # what stands after them
    root: bool


class Module(NamedTuple):
    """Computations by name."""

    computations: dict[str, dict[str, Instruction]]
    entry: str


def bits_of(dtype: str) -> int:
    """Bits of a number of a dtype; 0 of what is none, as a token."""
    if dtype == "pred":
        return 8
    digits = re.search(r"\d+", dtype)
    return int(digits.group()) if digits else 0


def parse(text: str) -> Module:
    """Reads the text of `Compiled.as_text()`.

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = _HEADER.match(line)
            if header:
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _parse_line(line)
            if instruction:
                current[instruction.name] = instruction
    if not entry:
        raise ValueError("the text is not that of a compiled program: it has no ENTRY")
    return Module(computations, entry)


def _parse_line(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = _COMMENT.sub("", line[head.end() :])
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    return Instruction(
        name=head[2],
        opcode=opcode[1],
        shapes=shapes_of(rest[:end]),
        operands=tuple(_NAME.findall(inside)),
        inside=inside,
        attributes=rest[close + 1 :],
        root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if not depth:
            return i
    return len(text) - 1


def shapes_of(text: str) -> tuple[Shape, ...]:
    """The arrays of a type: "bf16[4,8]{1,0:T(8,128)S(1)}", or a tuple of such."""
    return tuple(
        Shape(
            dtype,
            tuple(int(n.strip(" <=")) for n in dims.split(",") if n.strip()),
            bool(layout and _NEAR.search(layout)),
        )
        for dtype, dims, layout in _ARRAY.findall(text)
    )


def called(instruction: Instruction, *keys: str) -> list[str]:
    """Names of the computations under keys such as "body" or "calls"."""
    found: list[str] = []
    for key in keys:
        match = re.search(rf"\b{key}=(\{{[^}}]*\}}|%?[\w.\-]+)", instruction.attributes)
        if match:
            found += re.findall(r"[\w.\-]+", match[1].replace("%", ""))
    return found
