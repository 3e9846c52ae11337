"""Blocks one after the other: scanned over stacked parameters, or each with arrays of its own.

A scan compiles one block whatever their number. Its products read slices of the stacked kernels:
XLA:GPU copies each of them first, and XLA:CPU multiplies them badly (8 times slower for bfloat16 in
jax 0.10). So the copy that samples there holds every block's arrays apart. What a backward pass
needs of each block is stacked too, in memory that is filled with zeros before it is written: a
CPU takes longer for that than for compiling every block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

from ais_jax.linear import RESULT
from ais_jax.mesh import is_axes, spread_rows

# What a recomputed block keeps all the same: its input alone, or the results of its linears.
KEPT = {
    "nothing": None,
    "products": jax.checkpoint_policies.save_only_these_names(RESULT),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Unstacked:
    """What stands in a tree for one stacked array: its slices along the leading axis.

    Attributes:
      items: one entry a block, each an array, a `QuantArray` or again `Unstacked`.
    """

    items: tuple[Any, ...]


class Schedule(NamedTuple):
    """How blocks are run."""

    remat: bool = False  # recompute each block in the backward pass
    keep: str = "nothing"  # of it, one of `KEPT`
    unroll: bool = False  # compile every block of stacked parameters, instead of a loop over one
    mesh: Mesh | None = None  # over which rows are spread between blocks
    attention: str = "auto"  # one of `attention.KINDS`


def is_unstacked(x: Any) -> bool:
    """Whether `x` is one of those."""
    return isinstance(x, Unstacked)


def unstack(tree: Any, axes: Any) -> Any:
    """`tree` with the leaves that have leading "layers" axes taken apart.

    Args:
      tree: parameters or a cache; arrays or containers of arrays with the same leading axes.
      axes: logical axis names, a tuple a leaf of `tree`.
    """

    def one(names, leaf):
        depth = sum(name == "layers" for name in names)
        return _split(leaf, depth)

    return jax.tree.map(one, axes, tree, is_leaf=is_axes)


def _split(leaf: Any, depth: int) -> Any:
    if not depth:
        return leaf
    count = jax.tree.leaves(leaf)[0].shape[0]
    parts = (jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(count))
    return Unstacked(tuple(_split(part, depth - 1) for part in parts))


def call_block(
    block: nnx.Module, call: Callable, x: jax.Array, cache: Any, schedule: Schedule
) -> tuple[jax.Array, Any]:
    """call(block, x, cache), as it is scheduled."""
    run, params = _with_params(block, call, schedule)
    return run(x, (params, cache))


def run_blocks(
    blocks: nnx.Module, call: Callable, x: jax.Array, cache: Any, schedule: Schedule
) -> tuple[jax.Array, Any]:
    """Applies blocks one after the other.

    Args:
      blocks: parameters have the axis of the blocks first, or are `Unstacked`.
      call: (one block, x, its cache) -> (x, what is new of its cache).
      x: [B, T, D].
      cache: of all blocks, in the same form as the parameters, or None.
      schedule: how they are run.

    Returns:
      (x, what is new of all caches, in the same form).
    """
    run, params = _with_params(blocks, call, schedule)
    leaves = jax.tree.leaves(params, is_leaf=is_unstacked)
    if not is_unstacked(leaves[0]):
        return jax.lax.scan(run, x, (params, cache), unroll=schedule.unroll)
    news = []
    for i in range(len(leaves[0].items)):
        part = jax.tree.map(lambda u, i=i: u.items[i], (params, cache), is_leaf=is_unstacked)
        x, new = run(x, part)
        news.append(new)
    if cache is None:
        return x, None
    return x, jax.tree.map(lambda _, *parts: Unstacked(parts), cache, *news, is_leaf=is_unstacked)


def _with_params(block: nnx.Module, call: Callable, schedule: Schedule) -> tuple[Callable, Any]:
    """(x, (parameters, cache)) -> call(block, x, cache) as a function, and the parameters."""
    graphdef, params = nnx.split(block)

    def run(x, inputs):
        params, cache = inputs
        # Or the compiler may split D as it finds it in the kernels, and sum every product.
        x = spread_rows(x, schedule.mesh)
        return call(nnx.merge(graphdef, params), x, cache)

    if schedule.remat:
        run = jax.checkpoint(run, policy=KEPT[schedule.keep])
    return run, params
