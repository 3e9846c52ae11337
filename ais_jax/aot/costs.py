"""What a compiled program does: products, bytes moved, messages between devices.

Counted in the program's text, since XLA's own analysis takes the body of every loop once: of 36
scanned layers it sees one. Here a body counts as often as its loop turns.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Any

import numpy as np

from ais_jax.aot import hlo
from ais_jax.aot.hlo import Instruction, Module, Shape

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# These move nothing themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("opt-barrier", "optimization-barrier", "add-dependency", "partition-id", "replica-id"),
    *("while", "conditional", "call", "async-start"),
}
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
# A part of their result takes that part of their operand. Fusions in fusions are taken for such.
_ONE_TO_ONE = ("bitcast", "copy", "convert", "reshape", "fusion")


@dataclasses.dataclass(frozen=True)
class Costs:
    """Work of one device.

    Attributes:
      operations: in products, two a multiplication; by the rate of `chips.Chip` that they go at.
      moved: bytes read from and written to the device's memory.
      collectives: kind -> how many.
      received: kind -> bytes that come in from other devices, by the best known algorithms.
    """

    operations: dict[str, float] = dataclasses.field(default_factory=dict)
    moved: float = 0.0
    collectives: dict[str, float] = dataclasses.field(default_factory=dict)
    received: dict[str, float] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            _merge(self.operations, other.operations),
            self.moved + other.moved,
            _merge(self.collectives, other.collectives),
            _merge(self.received, other.received),
        )

    def __mul__(self, times: float) -> Costs:
        def scaled(counts):
            return {name: count * times for name, count in counts.items()}

        return Costs(
            scaled(self.operations),
            self.moved * times,
            scaled(self.collectives),
            scaled(self.received),
        )

    @property
    def total_operations(self) -> float:
        """Of all kinds."""
        return sum(self.operations.values())

    @property
    def total_received(self) -> float:
        """Bytes of all kinds."""
        return sum(self.received.values())


def _merge(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in a | b}


def count(text: str, devices: int, turns: int = 1) -> Costs:
    """Costs of one call of a program on one device.

    Args:
      text: of `Compiled.as_text()`.
      devices: that run it together.
      turns: of loops whose end depends on the data, such as decoding until all rows have ended.

    Raises:
      ValueError: the text is not that of a compiled program.
    """
    module = hlo.parse(text)
    return _Counter(module, devices, turns).computation(module.entry, False)


class _Counter:
    """Costs by computation, each worked out once."""

    def __init__(self, module: Module, devices: int, turns: int):
        self.module, self.devices, self.turns = module, devices, turns
        self.known: dict[tuple[str, bool], Costs] = {}

    def computation(self, name: str, fused: bool) -> Costs:
        """Costs of a computation; what is `fused` keeps its intermediate results to itself."""
        key = name, fused
        if key not in self.known:
            body = self.module.computations.get(name, {})
            parts = (self._instruction(body, i, fused) for i in body.values())
            self.known[key] = functools.reduce(Costs.__add__, parts, Costs())
        return self.known[key]

    def _instruction(self, body: dict[str, Instruction], i: Instruction, fused: bool) -> Costs:
        costs = Costs(_operations(body, i), 0.0 if fused else self._moved(body, i))
        if i.opcode == "while":
            names = hlo.called(i, "body", "condition")
            inner = sum((self.computation(name, fused) for name in names), Costs())
            return costs + inner * self._turns_of(i)
        if i.opcode == "conditional":
            keys = "branch_computations", "true_computation", "false_computation"
            branches = [self.computation(name, fused) for name in hlo.called(i, *keys)]
            return costs + max(branches, key=lambda c: (c.moved, c.total_operations))
        if i.opcode == "fusion":
            for name in hlo.called(i, "calls"):
                costs += self.computation(name, True)
        elif i.opcode in ("call", "async-start"):
            for name in hlo.called(i, "to_apply", "calls", "called_computations"):
                costs += self.computation(name, fused)
        return costs + self._messages(body, i)

    def _turns_of(self, loop: Instruction) -> int:
        """Of a while loop: as XLA has noted, or up to the one number its counter is compared to."""
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        (name,), (body,) = hlo.called(loop, "condition"), hlo.called(loop, "body")
        condition = self.module.computations.get(name, {})
        seen = list(condition.values())
        for i in list(seen):
            for inner in hlo.called(i, "calls", "to_apply"):
                seen += self.module.computations.get(inner, {}).values()
        numbers = [int(i.inside) for i in seen if _is_whole_number(i)]
        compared = [i for i in seen if i.opcode == "compare"]
        simple = len(numbers) == len(compared) == 1 and not any(
            i.opcode in ("and", "or", "reduce") for i in seen
        )
        if not simple:
            return self.turns
        step = _step(condition, compared[0], self.module.computations.get(body, {}))
        return -(-numbers[0] // step)

    def _messages(self, body: dict[str, Instruction], i: Instruction) -> Costs:
        kind = i.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return Costs()
        group = _group_size(i.attributes, self.devices)
        if group < 2:
            return Costs()
        held = sum(shape.size for shape in _operand_shapes(body, i))
        share = {
            "all-gather": group - 1,
            "all-reduce": 2 * (group - 1) / group,
            "collective-permute": 1,
            "collective-broadcast": 1,
        }.get(kind, (group - 1) / group)
        return Costs(collectives={kind: 1.0}, received={kind: held * share})

    def _moved(self, body: dict[str, Instruction], i: Instruction) -> float:
        if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")):
            return 0.0
        written = sum(shape.far for shape in i.shapes)
        sources = [body[name] for name in i.operands if name in body]
        started = i.opcode.endswith("-start")
        if i.opcode == "fusion":
            (name,) = hlo.called(i, "calls")
            read = sum(self._read(name, k, source) for k, source in enumerate(sources))
            return read + self._written(name, i)
        if i.opcode.removesuffix("-start") in _SLICES:
            result = i.shapes[len(sources) if started else 0]  # after the operands
            return result.far + (0.0 if _near(sources[0]) else result.size)
        if i.opcode in _UPDATES:
            part = sources[1 if i.opcode == "dynamic-update-slice" else -1]
            return _far(part) + (0.0 if i.shapes[0].near else _size(part))
        read = sum(map(_far, sources))
        if i.opcode == "copy-start":
            written = i.shapes[0].far
        elif started:  # results may stand beside the operands
            written = written - read or read
        return written + read

    def _read(self, fusion: str, index: int, source: Instruction) -> float:
        """Bytes that a fusion reads of its operand `index`: a slice, where it takes slices."""
        whole = _far(source)
        if not whole:
            return 0.0
        return min(whole, self._used(fusion, index, whole))

    def _used(self, fusion: str, index: int, whole: float) -> float:
        """Of `whole` bytes, those that a fusion needs: what is sliced is computed in part alone."""
        body = self.module.computations.get(fusion, {})
        at = [i for i in body.values() if i.opcode == "parameter" and i.inside == str(index)]
        total = 0.0
        while at:
            source = at.pop()
            for use in body.values():
                if source.name not in use.operands:
                    continue
                needed = self._needed(source, use, whole)
                if needed < whole:
                    total += needed
                elif use.opcode in _ONE_TO_ONE and not use.root:
                    at.append(use)  # what its own users need of it
                else:
                    return whole
        return total

    def _needed(self, source: Instruction, use: Instruction, whole: float) -> float:
        """Of `whole` bytes of `source`, those that one user needs."""
        if use.operands[0] == source.name and use.opcode in _SLICES:
            return whole * math.prod(use.shapes[0].dims) / max(math.prod(source.shapes[0].dims), 1)
        if use.operands[0] == source.name and use.opcode in _UPDATES:
            return 0.0  # changed in place
        if use.opcode == "fusion":
            (inner,) = hlo.called(use, "calls")
            places = [k for k, name in enumerate(use.operands) if name == source.name]
            return sum(self._used(inner, k, whole) for k in places)
        return whole

    def _written(self, fusion: str, i: Instruction) -> float:
        """Bytes that a fusion writes: of what it changes in place, the part that changes."""
        body = self.module.computations.get(fusion, {})
        root = next((x for x in body.values() if x.root), None)
        if root is None:
            return sum(shape.far for shape in i.shapes)
        ends = [body.get(name) for name in root.operands] if root.opcode == "tuple" else [root]
        if len(ends) != len(i.shapes):
            return sum(shape.far for shape in i.shapes)
        return sum(
            0.0 if shape.near else self._end(body, end, shape)
            for end, shape in zip(ends, i.shapes, strict=True)
        )

    def _end(self, body: dict[str, Instruction], end: Instruction | None, shape: Shape) -> float:
        while end is not None and end.opcode == "bitcast":
            end = body.get(end.operands[0])
        if end is not None and end.opcode in _UPDATES:
            part = body.get(end.operands[1 if end.opcode == "dynamic-update-slice" else -1])
            return shape.size if part is None else _size(part)
        if end is not None and end.opcode == "fusion" and len(end.shapes) == 1:
            (inner,) = hlo.called(end, "calls")
            return self._written(inner, end)
        return shape.size


def _step(condition: dict, compared: Instruction, body: dict[str, Instruction]) -> int:
    """By how much a loop's counter rises a turn: XLA writes some loops with two turns in one."""
    counters = [condition[name] for name in compared.operands if name in condition]
    places = [re.search(r"index=(\d+)", i.attributes) for i in counters]
    place = next((int(match[1]) for match in places if match), None)
    root = next((i for i in body.values() if i.root and i.opcode == "tuple"), None)
    if place is None or root is None or place >= len(root.operands):
        return 1
    rise = body.get(root.operands[place])
    if rise is None or rise.opcode != "add":
        return 1
    steps = [body[name] for name in rise.operands if name in body]
    return next((int(i.inside) for i in steps if _is_whole_number(i)), 1) or 1


def _is_whole_number(i: Instruction) -> bool:
    whole = i.opcode == "constant" and i.shapes[0].dtype[0] in "su"
    return whole and i.inside.isdigit()


def _far(i: Instruction) -> float:
    """Bytes of an array in the device's memory; of a tuple 0, whose parts are used one by one."""
    return i.shapes[0].far if len(i.shapes) == 1 else 0.0


def _size(i: Instruction) -> float:
    return i.shapes[0].size if i.shapes else 0.0


def _near(i: Instruction) -> bool:
    return bool(i.shapes) and i.shapes[0].near


def _operand_shapes(body: dict[str, Instruction], i: Instruction) -> list[Shape]:
    return [shape for name in i.operands if name in body for shape in body[name].shapes]


def _group_size(attributes: str, devices: int) -> int:
    """Devices that exchange with each other."""
    if "source_target_pairs={{" in attributes:
        return 2
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    mesh = re.search(r"replica_groups=(?:@\w+ )?mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        # An axis, or a part of one as 'axis':(what comes before)size.
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    if listed:
        return len(listed[1].split(","))
    return int(iota[1]) if iota else devices


def _operations(body: dict[str, Instruction], i: Instruction) -> dict[str, float]:
    if i.opcode not in ("dot", "convolution", "custom-call"):
        return {}
    shapes = _operand_shapes(body, i)
    if len(shapes) < 2 or not i.shapes:
        return {}
    if i.opcode == "convolution":
        amount = _convolution(i, shapes[0], shapes[1])
    elif "tpu_custom_call" in i.attributes:
        shapes = [shape for shape in shapes if len(shape.dims) == 4]
        amount = _splash(i, shapes)
    else:
        amount = _dot(i, shapes[0])
    return {_rate(shapes[:2], i.attributes): amount} if amount else {}


def _rate(shapes: list[Shape], attributes: str) -> str:
    """The kind of product that operands of these dtypes make: that of the wider one."""
    dtype = max((shape.dtype for shape in shapes), key=hlo.bits_of)
    if dtype in ("f32", "f64"):
        exact = re.search(r"operand_precision=\{[^}]*high", attributes)
        return "f32_highest" if exact else "f32"
    if dtype[0] in "su" or dtype == "pred":
        return "int8"
    return "fp8" if hlo.bits_of(dtype) <= 8 else "bf16"


def _dot(i: Instruction, left: Shape) -> float:
    """Operations of a dot, or of a call of a GPU's library for one; 0 of other calls."""
    if i.opcode == "custom-call" and "__cublas" not in i.attributes:
        return 0.0
    axes = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^}\]]*)[}\]]', i.attributes)
    found = [int(x) for x in re.findall(r"\d+", axes[1])] if axes else []
    return 2.0 * math.prod(i.shapes[0].dims) * math.prod(left.dims[axis] for axis in found)


# Products of queries and keys, or of such a size, in the kernels of splash attention.
_SPLASH = {"fwd": 2, "dq": 3, "dkv": 4}


def _splash(i: Instruction, shapes: list[Shape]) -> float:
    """Operations of splash attention, which says nothing of them itself; 0 of other kernels.

    Its first two operands of four axes are queries [B, H, T, h] and keys [B, K, S, h]. With places
    of queries among its operands it is causal, and sees half of the pairs.
    """
    kind = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)
    if kind is None or len(shapes) < 2:
        return 0.0
    causal = any("q_sequence" in name for name in i.operands)
    pairs = math.prod(shapes[0].dims) * shapes[1].dims[2] / (2 if causal else 1)
    return 2.0 * _SPLASH[kind[1]] * pairs


def _convolution(i: Instruction, left: Shape, right: Shape) -> float:
    """Operations of a convolution, which is how a TPU writes its products.

    A batch of products is a spatial axis there, whose window meets one number at each place.
    """
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", i.attributes)
    if labels is None:
        return 0.0
    out = i.shapes[0]
    size = {
        name: dict(zip(label, shape.dims, strict=True))
        for name, label, shape in zip("lro", labels.groups(), (left, right, out), strict=True)
    }
    window = _window(i.attributes)
    total = 2.0 * size["o"]["b"] * size["o"]["f"] * size["r"]["i"]
    for axis in (label for label in labels[3] if label.isdigit()):
        place = int(axis)
        settings = tuple(window[key][place] if key in window else None for key in _WINDOW)
        total *= _pairs(size["l"][axis], size["r"][axis], size["o"][axis], *settings)
    return total


_WINDOW = ("stride", "pad", "lhs_dilate", "rhs_dilate")


def _window(attributes: str) -> dict[str, list[Any]]:
    """What window={...} says by axis: "pad" as its lower end, the others as they are."""
    inside = re.search(r"window=\{([^}]*)\}", attributes)
    found: dict[str, list[Any]] = {}
    for key, value in re.findall(r"(\w+)=(\S+)", inside[1] if inside else ""):
        parts = value.split("x")
        found[key] = [int(part.split("_")[0]) for part in parts] if key in _WINDOW else parts
    return found


@functools.lru_cache(maxsize=4096)
def _pairs(
    length: int, width: int, out: int, stride: int | None, pad: int | None, *dilations: int | None
) -> int:
    """Pairs of a place of the result and one of the window that meet a number of the input."""
    left, right = (x or 1 for x in dilations)
    place = np.arange(out)[:, None] * (stride or 1) - (pad or 0) + np.arange(width) * right
    inside = (place >= 0) & (place <= (length - 1) * left)
    return int(np.sum(inside & (place % left == 0)))
