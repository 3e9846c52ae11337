"""`ais-jax aot`: what a config needs on devices that are not there, for a person to read."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Sequence

from ais_jax import mesh as mesh_lib
from ais_jax.aot import programs as programs_lib
from ais_jax.aot.advice import advise
from ais_jax.aot.compile import Result, compile_all, gib
from ais_jax.aot.topology import chip_of, devices_of
from ais_jax.chips import GIB, Chip
from ais_jax.config import Config
from ais_jax.errors import UserError
from ais_jax.models.published import PUBLISHED
from ais_jax.train.setup import Run, build_run

NAMES = ("quantize", "prefill", "decode", "grow", "rollout", "score", "update")
_MEMORY = ("program", "arguments", "outputs", "temporaries", "peak", "beside", "all", "")
_WORK = ("program", "calls", "TFLOP", "XLA's", "GB", "network GB", "ms", "bound by", "collectives")


def aot(
    config: Config,
    topology: str,
    names: Collection[str] = (),
    gpu_target: str | os.PathLike | None = None,
    write: Callable[[str], object] = print,
) -> bool:
    """Compiles a config's programs for a topology and writes a report.

    Args:
      config: the whole run.
      topology: see `topology.devices_of`.
      names: of programs, out of `NAMES`; empty takes all.
      gpu_target: for topologies of GPUs.
      write: takes each part of the report.

    Returns:
      Whether every program fits.

    Raises:
      UserError: the config cannot be run on such devices, or a program is none of its own.
    """
    devices = devices_of(topology, gpu_target)
    return report(config, devices, chip_of(devices, topology), names, topology, write)


def report(
    config: Config,
    devices: list,
    chip: Chip | None,
    names: Collection[str] = (),
    topology: str = "",
    write: Callable[[str], object] = print,
) -> bool:
    """`aot` for given devices."""
    config, note = without_absent_checkpoint(config)
    try:
        run = build_run(config, pathlib.Path("unused"), devices)
        config.check_devices(mesh_lib.batch_devices(run.programs.mesh))
    except ValueError as error:
        raise UserError(str(error)) from error
    shapes = programs_lib.shapes_of(run)
    known = [program.name for program in programs_lib.programs_of(run, shapes)]
    for name in names:
        if name not in known:
            raise UserError(
                f"--program {name} is none of this config's: choose from {', '.join(known)}"
            )
    write("\n".join([*_heading(run, shapes, chip, topology), *note]))
    results = compile_all(run, shapes, chip, names, lambda result: write(_progress(result)))
    write("\nGiB on each device\n" + _table(_MEMORY, [_memory_row(r) for r in results]))
    write("\nOne call, on each device\n" + _table(_WORK, [_work_row(r) for r in results]))
    if all(r.times for r in results) and not names:
        write("\n" + _step(results))
    for result in results:
        if not result.fits:
            write("\n" + _verdict(run, shapes, result))
    return all(result.fits for result in results)


def without_absent_checkpoint(config: Config) -> tuple[Config, list[str]]:
    """A config whose absent checkpoint is replaced by the published sizes that its folder names.

    Only sizes matter for compiling. Returns the config, and lines that say what was done.
    """
    path = config.model.checkpoint
    if path is None or os.path.exists(path) or pathlib.Path(path).name not in PUBLISHED:
        return config, []
    name = pathlib.Path(path).name
    model = dataclasses.replace(config.model, checkpoint=None, published=name)
    note = f"{path} is not here: the sizes are those that {name} was published with"
    return dataclasses.replace(config, model=model), [note]


def _heading(run: Run, shapes, chip: Chip | None, topology: str) -> list[str]:
    mesh = run.programs.mesh
    device = mesh.devices.flat[0]
    axes = " x ".join(f"{name} {mesh.shape[name]}" for name in mesh_lib.AXES)
    recipe, why = run.recipe
    held = [
        f"{name} {gib(programs_lib.bytes_on_a_device(tree))}"
        for name, tree in shapes.held.items()
        if tree is not None
    ]
    lines = [
        f"{topology}: {mesh.devices.size} x {device.device_kind}"
        + ("" if chip is None else f" of {chip.memory / GIB:.2f} GiB")
        + f", mesh {axes}, rollouts in {recipe}"
        + (f" ({why})" if why else ""),
        "Compiled, not run: sizes are the compiler's plan, times an estimate at peak rates.",
        f"Kept from step to step, GiB on each device: {', '.join(held)}",
    ]
    if chip is None:
        lines.append(f"No figures are known of {device.device_kind}: no times, and no verdict")
    return lines


def _progress(result: Result) -> str:
    return f"compiled {result.program.name} in {result.seconds:.0f} s"


def _memory_row(result: Result) -> Sequence[str]:
    memory = result.memory
    verdict = "fits" if result.fits else f"does not fit in {gib(result.limit)}"
    sizes = (*memory, result.beside, result.needed)
    return (result.program.name, *map(gib, sizes), verdict if result.limit else "")


def _work_row(result: Result) -> Sequence[str]:
    costs, least, name = result.costs, result.times, result.program.name
    if costs is None:
        return (name, *["-"] * (len(_WORK) - 1))
    kinds = [f"{costs.collectives[kind]:.0f} {kind}" for kind in sorted(costs.collectives)]
    return (
        name,
        f"{result.program.calls:g}",
        f"{costs.total_operations / 1e12:.3g}",
        f"{result.analysed / 1e12:.3g}",
        f"{costs.moved / 1e9:.3g}",
        f"{costs.total_received / 1e9:.3g}",
        "-" if least is None else f"{1e3 * least.seconds:.4g}",
        "-" if least is None else least.bound,
        ", ".join(kinds) or "none",
    )


def _step(results: Sequence[Result]) -> str:
    """The seconds of a step, by what it spends them on."""
    seconds = {r.program.name: r.program.calls * r.times.seconds for r in results if r.times}
    parts = ", ".join(f"{name} {value:.2g}" for name, value in seconds.items())
    total = sum(seconds.values())
    return f"A step in which every completion has full length: {total:.3g} s at least ({parts})"


def _verdict(run: Run, shapes, result: Result) -> str:
    lines = [
        f"{result.program.name} does not fit: it needs {gib(result.needed)} GiB of "
        f"{gib(result.limit)} on each device. What would help most:"
    ]
    lines += [
        f"  {advice.setting}{advice.where}  (about {gib(advice.freed)} GiB less)"
        for advice in advise(run, shapes, result)
    ]
    return "\n".join(lines)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be; the first and the last are words, to the left."""
    table = [heading, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heading))]
    last = len(heading) - 1

    def line(row):
        cells = [
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, table))
