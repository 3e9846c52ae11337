"""Devices that are described, not there: of a TPU slice by its name, of GPUs by a file."""

from __future__ import annotations

import importlib.util
import math
import os
import pathlib
import re

from ais_jax.chips import Chip, find_chip
from ais_jax.errors import UserError

EXAMPLES = "v5e:4x4, v5p:4x4x4, v6e:4x4, tpu7x:2x2x1, or cuda:1x1x1 with --gpu-target"
_NAME = re.compile(r"(v\d+[a-z]*|tpu\w+|cuda):(\d+(?:x\d+)*)")


def devices_of(name: str, gpu_target: str | os.PathLike | None = None) -> list:
    """The devices of a topology, in the order in which jax numbers them.

    Args:
      name: "v5p:4x4x4", the chips of a TPU slice along each axis; or "cuda:1x1x8", slices, hosts a
        slice and GPUs a host.
      gpu_target: of GPUs, XLA's description of one, a GpuTargetConfigProto as text.

    Raises:
      UserError: the name is malformed or unknown, or what compiles for it is not installed.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise UserError(f"topology {name!r} is not understood; write it like {EXAMPLES}")
    if match[1] == "cuda":
        return _gpus(name, match[2], gpu_target)
    if gpu_target is not None:
        raise UserError(f"--gpu-target is for topologies of GPUs, and {name!r} is none")
    return _tpus(name)


def _tpus(name: str) -> list:
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise UserError(
            f"topology {name!r} needs the compiler of TPUs: pip install 'ais-jax[tpu]', no TPU "
            "has to be there"
        )
    # Otherwise libtpu asks a server of Google's cloud what machine it is on.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock is for real TPUs
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault(
        "TPU_ACCELERATOR_TYPE", "v5litepod-16"
    )  # any: the topology is what counts
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu raises what its version likes to
        raise UserError(_refused(name, error)) from error


def _gpus(name: str, shape: str, target: str | os.PathLike | None) -> list:
    if target is None:
        raise UserError(
            f"topology {name!r} needs --gpu-target, XLA's description of the GPU as a text file"
        )
    if importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        raise UserError(
            f"topology {name!r} needs the compiler of GPUs: pip install --no-deps "
            "jax-cuda13-plugin jax-cuda13-pjrt, in the version of jax; no GPU has to be there"
        )
    try:
        description = pathlib.Path(target).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--gpu-target {target} cannot be read: {error}") from error
    import jax
    from jax.experimental import topologies

    jax.devices()  # finds the plugin
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=description, topology=shape
        )
        return list(topology.devices)
    except Exception as error:  # as above
        raise UserError(_refused(name, error)) from error


def _refused(name: str, error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return f"topology {name!r} was refused by the compiler ({reason}); known are, say, {EXAMPLES}"


def chip_of(devices: list, name: str) -> Chip | None:
    """The figures of one device; None if the chip is not known.

    TPU v4 and TPU7x show each of a chip's two halves as a device.
    """
    chip = find_chip(devices[0].device_kind)
    shape = name.partition(":")[2]
    if chip is None or not shape:
        return chip
    chips = math.prod(int(n) for n in shape.split("x"))
    return chip.split(len(devices) // chips) if len(devices) > chips else chip
