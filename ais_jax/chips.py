"""Peak figures of accelerators, and the least time that work takes on them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

GIB = 2**30
GB = 1e9
TERA = 1e12


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at best.

    Attributes:
      name: as it is sold.
      memory: bytes that programs may take.
      bf16: operations a second in products of bfloat16, two a multiplication.
      int8: of int8.
      fp8: of 8-bit floats; the rate of bfloat16 where these are widened.
      f32: of float32 as compilers do it unless told otherwise.
      f32_highest: of float32 to its last digit.
      bandwidth: bytes a second between memory and cores.
      link: bytes a second that come in from other chips along one axis of the mesh.
    """

    name: str
    memory: float
    bf16: float
    int8: float
    fp8: float
    f32: float
    f32_highest: float
    bandwidth: float
    link: float

    def split(self, parts: int) -> Chip:
        """The share of one of `parts` devices that a chip shows itself as."""
        shares = {
            field.name: getattr(self, field.name) / parts
            for field in dataclasses.fields(self)
            if field.name != "name"
        }
        return dataclasses.replace(self, **shares)


def _tpu(name, gib, bf16, int8, fp8, gb_a_second, link) -> Chip:
    """Figures in GiB, tera-operations and GB. Float32 is six passes of bfloat16, or one."""
    rates = _rates(bf16=bf16, int8=int8, fp8=fp8, f32=bf16, f32_highest=bf16 / 6)
    return Chip(name, gib * GIB, bandwidth=gb_a_second * GB, link=link * GB, **rates)


def _gpu(name, gb, bf16, int8, fp8, tf32, f32, gb_a_second, link) -> Chip:
    """Figures in GB and tera-operations, without sparsity. A twentieth of the memory is CUDA's."""
    rates = _rates(bf16=bf16, int8=int8, fp8=fp8, f32=tf32, f32_highest=f32)
    return Chip(name, 0.95 * gb * GB, bandwidth=gb_a_second * GB, link=link * GB, **rates)


def _rates(**tera: float) -> dict[str, float]:
    return {kind: rate * TERA for kind, rate in tera.items()}


# (device kinds, chip). TPUs: the pages of each version in docs.cloud.google.com/tpu, read in
# November 2026; `memory` is what the compiler of libtpu 0.0.52 lets a program have. A link carries
# the stated "bidirectional bandwidth per chip" / ports / 2 in each direction, and along an axis of
# a torus two of them come in. GPUs: NVIDIA's data sheets; the link is NVLink in one direction.
_CHIPS = (
    (r"TPU v4$", _tpu("TPU v4", 30.5, 275, 275, 275, 1228, 100)),
    (r"TPU v5 ?(lite|e)$", _tpu("TPU v5e", 15.75, 197, 393, 197, 819, 100)),
    (r"TPU v5p?$", _tpu("TPU v5p", 95.73, 459, 918, 459, 2765, 200)),
    (r"TPU v6 ?(lite|e)$", _tpu("TPU v6e", 31.24, 918, 1836, 918, 1638, 200)),
    (r"TPU ?v?7x?$", _tpu("TPU7x", 189.48, 2307, 2307, 4614, 7380, 200)),
    (r"\bA100\b.*80GB", _gpu("A100 80GB", 85.0, 312, 624, 312, 156, 19.5, 2039, 300)),
    (r"\bH100\b.*80GB", _gpu("H100 80GB", 84.9, 989, 1979, 1979, 494, 67, 3352, 450)),
    (r"\bH200\b", _gpu("H200", 150.0, 989, 1979, 1979, 494, 67, 4800, 450)),
)


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a device kind, such as "TPU v5 lite"; None if its figures are not known."""
    for kinds, chip in _CHIPS:
        if re.search(kinds, device_kind):
            return chip
    return None


class Times(NamedTuple):
    """Seconds that each resource is busy at its peak rate."""

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The least time: everything overlaps, and the busiest resource never waits."""
        return max(self)

    @property
    def bound(self) -> str:
        """The busiest resource."""
        return self._fields[self.index(max(self))]


def times(chip: Chip, operations: Mapping[str, float], moved: float, received: float) -> Times:
    """The least times of some work.

    Args:
      chip: that of one device.
      operations: by kind of number, a rate of `Chip` each: {"bf16": 1e12}.
      moved: bytes between memory and cores.
      received: bytes from other devices.
    """
    compute = sum(count / getattr(chip, kind) for kind, count in operations.items())
    return Times(compute, moved / chip.bandwidth, received / chip.link)
