"""The device mesh, and where each logical axis of a parameter lives on it."""

from __future__ import annotations

import dataclasses
import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ais_jax.errors import UserError
from ais_jax.settings import setting

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = dict[str, str | tuple[str, ...] | None]

# Logical axis of a parameter -> mesh axis. Axes that are not listed are replicated.
TRAIN_RULES: Rules = {
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
}
# The rollout copy is small and read once a token: whole on every `fsdp` rank, no gathers.
ROLLOUT_RULES: Rules = {**TRAIN_RULES, "embed": None}
# What decoding keeps of the tokens before.
CACHE_RULES: Rules = {"rows": BATCH_AXES, "kv_heads": "tensor", "heads": "tensor"}


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; their product must be the number of devices."""

    data: int = setting(-1, "devices over which the batch is split; -1 takes all that are left")
    fsdp: int = setting(1, "devices over which batch, parameters and optimizer are split")
    tensor: int = setting(1, "devices over which heads and feed-forward are split")

    def __post_init__(self):
        for name in AXES:
            value = getattr(self, name)
            if value < 1 and value != -1:
                raise ValueError(f"{name}={value} must be at least 1, or -1 for all that are left")


def make_mesh(config: MeshConfig, devices: list | None = None) -> Mesh:
    """A mesh (data, fsdp, tensor) over `devices` (default: all), for automatic partitioning.

    Raises:
      UserError: the product of the axes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if sizes.count(-1) == 1:
        rest = math.prod(s for s in sizes if s != -1)
        sizes[sizes.index(-1)] = len(devices) // rest
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise UserError(
            f"mesh.data={config.data} x mesh.fsdp={config.fsdp} x mesh.tensor={config.tensor} does "
            f"not make {len(devices)} devices; set one of them to -1 or correct the product"
        )
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(tuple(sizes), AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # an axis is a part of one of the network's
        places = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(places, AXES, axis_types=kinds)


def one_by_one(platform: str) -> dict[str, bool]:
    """Compiler options for programs of large products, which use all cores of a CPU each.

    Those that could run at the same time would share the cores and the caches: two at half the
    speed take longer than one after the other, twice as long with two cores.
    """
    if platform != "cpu":
        return {}
    return {"xla_cpu_enable_concurrency_optimized_scheduler": False}


def platform_of(mesh: Mesh | None) -> str:
    """Where programs run: "cpu", "gpu", "tpu"...; without a mesh jax's default."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def batch_devices(mesh: Mesh) -> int:
    """Devices that share the rows of a batch: data x fsdp."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def spread_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`x` [B, ...] with its rows over the batch axes and its other axes whole.

    As it is without a mesh of several devices, or where these axes do not divide the rows.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % batch_devices(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def param_shardings(axes, shapes, mesh: Mesh, rules: Rules):
    """NamedSharding of each parameter.

    Args:
      axes: tree of tuples of logical axis names.
      shapes: tree of arrays or ShapeDtypeStructs of the same structure.
      rules: logical axis -> mesh axis. An axis whose size the mesh axis does not divide is
        replicated. What counts is the size of the axis, heads times head size for a projection.
    """

    def one(names, leaf):  # a QuantArray that is not transposed: values and scale have its axes
        return jax.tree.map(lambda x: sharding_of(names, x.shape, mesh, rules), leaf)

    return jax.tree.map(one, axes, shapes, is_leaf=is_axes)


def is_axes(x) -> bool:
    """Whether `x` is a tuple of axis names, and not a container of such."""
    return isinstance(x, tuple) and all(isinstance(name, str) for name in x)


def sharding_of(
    names: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh, rules: Rules
) -> NamedSharding:
    """Where an array lives whose last axes have the last of these names."""
    spec = [rules.get(name) for name in names[len(names) - len(shape) :]]
    for i, axes in enumerate(spec):
        group = (axes,) if isinstance(axes, str) else axes or ()
        if shape[i] % math.prod(mesh.shape[axis] for axis in group):
            spec[i] = None
    return NamedSharding(mesh, PartitionSpec(*spec))
