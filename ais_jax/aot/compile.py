"""Compiles the programs of a step, and says what each needs and takes."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from ais_jax.aot import costs as costs_lib
from ais_jax.aot import programs as programs_lib
from ais_jax.aot.costs import Costs
from ais_jax.aot.programs import Program, Shapes
from ais_jax.chips import GIB, Chip, Times, times
from ais_jax.train.setup import Run

# XLA cannot time kernels of a GPU that is not there.
_GPU_OPTIONS: Any = {"xla_gpu_autotune_level": 0}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Memory(NamedTuple):
    """Bytes of one device by class, as the compiler plans them; None where it gave up."""

    arguments: int | None
    outputs: int | None
    temporaries: int | None
    peak: int  # the most at a time, of this program alone


class Result(NamedTuple):
    """What is known of one program.

    Attributes:
      program: what was compiled.
      seconds: that compiling took.
      memory: that it needs by itself.
      beside: bytes that lie beside it: what a step keeps and this program does not take.
      limit: bytes that a program may take; None if that is not known.
      analysed: operations of one call by XLA's own analysis, which takes loop bodies once.
      costs: of one call; None where compiling ran out of memory.
      times: of one call at peak rates; None where they are not known.
    """

    program: Program
    seconds: float
    memory: Memory
    beside: int
    limit: float | None
    analysed: float = 0.0
    costs: Costs | None = None
    times: Times | None = None

    @property
    def needed(self) -> int:
        """Bytes in use when the program is at its peak."""
        return self.memory.peak + self.beside

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.costs is not None and (self.limit is None or self.needed <= self.limit)


def compile_all(
    run: Run,
    shapes: Shapes,
    chip: Chip | None,
    names: Collection[str] = (),
    told: Callable[[Result], Any] = lambda result: None,
) -> list[Result]:
    """Compiles programs for the mesh of a run.

    Args:
      run: built on the devices to compile for.
      shapes: the run's.
      chip: figures of one of them, None if they are not known.
      names: of programs; empty takes all.
      told: is called with each result when it is there.
    """
    held = {name: programs_lib.bytes_on_a_device(tree) for name, tree in shapes.held.items()}
    results = []
    for program in programs_lib.programs_of(run, shapes):
        if names and program.name not in names:
            continue
        beside = sum(size for name, size in held.items() if name not in program.takes)
        results.append(_compile(program, run.programs.mesh, beside, chip))
        told(results[-1])
    return results


def _compile(program: Program, mesh: jax.sharding.Mesh, beside: int, chip: Chip | None) -> Result:
    limit = None if chip is None else chip.memory
    gpu = mesh.devices.flat[0].platform in ("gpu", "cuda")
    began = time.perf_counter()
    try:
        compiled = program.lower().compile(_GPU_OPTIONS if gpu else None)
    except jax.errors.JaxRuntimeError as error:
        peak, allowed = out_of_memory(str(error))
        if peak is None:
            raise
        seconds = time.perf_counter() - began
        return Result(program, seconds, Memory(None, None, None, peak), beside, allowed or limit)
    seconds = time.perf_counter() - began
    costs = costs_lib.count(compiled.as_text() or "", mesh.devices.size, program.turns)
    least = None
    if chip is not None:
        least = times(chip, costs.operations, costs.moved, costs.total_received)
    analysis = compiled.cost_analysis() or {}
    analysed = float(analysis.get("flops", 0.0))
    return Result(program, seconds, memory_of(compiled), beside, limit, analysed, costs, least)


def memory_of(compiled: jax.stages.Compiled) -> Memory:
    """What the compiler plans for one device."""
    plan: Any = compiled.memory_analysis()
    arguments, outputs = plan.argument_size_in_bytes, plan.output_size_in_bytes
    temporaries = plan.temp_size_in_bytes
    # Outputs that take the place of donated arguments are there once.
    most = arguments + outputs - plan.alias_size_in_bytes + temporaries
    return Memory(arguments, outputs, temporaries, most)


# As libtpu has put it: bytes needed, and bytes that there are.
_SIZE = r"([\d.]+)([KMGT]?)"
_EXHAUSTED = (
    re.compile(rf"HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)"),
    re.compile(rf"Used {_SIZE} of {_SIZE} hbm"),
)


def out_of_memory(message: str) -> tuple[int | None, int | None]:
    """(bytes needed, bytes allowed), of a compiler's error; None where it does not say.

    Arguments and outputs are among what is needed, whatever the message calls it.

    Example:
      >>> out_of_memory("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 40.50G of "
      ...               "15.75G hbm. Exceeded hbm capacity by 24.75G.")
      (43486543872, 16911433728)
    """
    for form in _EXHAUSTED:
        found = form.search(message)
        if found:
            need, need_unit, most, most_unit = found.groups()
            return int(float(need) * _UNITS[need_unit]), int(float(most) * _UNITS[most_unit])
    return None, None


def gib(size: float | None) -> str:
    """A size to read, "-" where it is not known."""
    return "-" if size is None else f"{size / GIB:.2f}"
