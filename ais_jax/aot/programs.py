"""The programs of a step of a run, as shapes on a mesh whose devices need not be there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ais_jax import mesh as mesh_lib
from ais_jax import models, quantize
from ais_jax.sampling import Rollout, decoding, fill_in
from ais_jax.train.setup import Run
from ais_jax.train.state import TrainState
from ais_jax.train.step import TrainBatch


class Program(NamedTuple):
    """One compiled function of a step.

    Attributes:
      name: quantize, prefill, decode, grow, rollout, score or update.
      lower: lowers it.
      takes: which of `Shapes.held` are among its arguments.
      calls: how often a step calls it, if every completion has its full length.
      turns: of its loops whose end depends on the data.
    """

    name: str
    lower: Callable[[], Any]
    takes: frozenset[str]
    calls: float
    turns: int = 1


class Shapes(NamedTuple):
    """What a step's programs take and give, as ShapeDtypeStructs with shardings."""

    state: TrainState
    frozen: Any  # None where everything is trained
    params: Any  # that the model computes with
    copy: Any  # that samples
    batch: TrainBatch  # a whole rollout batch, all draws
    reference: Any  # what is trained, as it was before GRPO; None without a KL term

    @property
    def held(self) -> dict[str, Any]:
        """What lies in memory between programs, by name."""
        return {
            "parameters": self.state.params,
            "moments": self.state.opt_state,
            "frozen base": self.frozen,
            "rollout copy": self.copy,
            "reference": self.reference,
        }


def bytes_on_a_device(tree: Any) -> int:
    """Bytes that a device holds of arrays that are spread over a mesh."""
    return quantize.bytes_of(
        [
            jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
            for x in jax.tree.leaves(tree)
        ]
    )


def placed(tree: Any, where: Any) -> Any:
    """Shapes with shardings: `where` is one for all, or a tree of them."""
    if isinstance(where, jax.sharding.Sharding):
        where = jax.tree.map(lambda _: where, tree)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, where
    )


def shapes_of(run: Run) -> Shapes:
    """The shapes of a run; nothing is allocated."""
    programs, policy = run.programs, run.policy
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype)
    trainable = jax.eval_shape(programs.init_trainable, key)
    state = jax.eval_shape(programs.init_state, trainable)
    frozen = None if policy.lora is None else _frozen(run)
    params = policy.join(trainable, frozen)
    copy, _ = jax.eval_shape(programs.refit, params, None)
    reference = trainable if run.config.grpo.kl_coef else None
    return Shapes(state, frozen, params, copy, _batch(run), reference)


def _frozen(run: Run) -> Any:
    """The base under adapters, where the rules of training put it."""
    model, mesh = run.policy.model, run.programs.mesh
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(model.dtype)), model.abstract_params()
    )
    frozen = jax.eval_shape(run.policy.hold, placed(shapes, models.shardings_of(model, mesh)))
    axes = quantize.copy_axes(model.param_axes(), frozen)
    return placed(frozen, mesh_lib.param_shardings(axes, frozen, mesh, mesh_lib.TRAIN_RULES))


def _batch(run: Run) -> TrainBatch:
    config, rows = run.config, run.config.grpo.batch_size
    width, length = config.rollout.max_prompt_tokens, config.rollout.max_new_tokens
    by_row = mesh_lib.batch_sharding(run.programs.mesh)

    def array(dtype, *shape):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=by_row)

    mask, floats, ids = array(bool, length), array(jnp.float32, length), array(jnp.int32, length)
    prompts = array(jnp.int32, width), array(bool, width)
    rollout = Rollout(*prompts, ids, mask, floats, array(bool))
    if run.policy.sampling.diffusion is not None:
        rollout = rollout._replace(step_map=ids, forwards=array(jnp.int32))
        keys = array(jax.random.key(0).dtype)
        rollout = jax.eval_shape(run.programs.plan, rollout, keys)
    whole = TrainBatch(rollout, mask, array(jnp.float32), floats, None)
    whole = _rows(whole, rows * run.policy.sampling.draws)
    return whole._replace(ref_logps=whole.old_logps if config.grpo.kl_coef else None)


def _rows(tree: Any, rows: int) -> Any:
    """The same with that many rows."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype, sharding=x.sharding), tree
    )


def programs_of(run: Run, shapes: Shapes) -> list[Program]:
    """The programs of a step, in the order of their calls."""
    c, policy = run.config, run.policy
    programs: Any = run.programs  # its functions are jitted, which Callable does not say
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=mesh_lib.replicated(programs.mesh))
    minibatch = _rows(shapes.batch, c.grpo.minibatch_size)
    whole = frozenset(("parameters", "frozen base"))
    # The old policy, the reference, and where plans are not those of sampling the copy.
    scorings = 1 + (shapes.reference is not None) + (not policy.recorded)
    sampling = _autoregressive if policy.sampling.diffusion is None else _diffusion
    return [
        Program(
            "quantize",
            lambda: programs.refit.lower(shapes.params, shapes.copy),
            whole | {"rollout copy"},
            1,
        ),
        *sampling(run, shapes),
        Program(
            "score",
            lambda: programs.score.lower(shapes.params, shapes.batch.rollout),
            whole,
            scorings,
        ),
        Program(
            "update",
            lambda: programs.update.lower(shapes.state, shapes.frozen, minibatch, scalar),
            whole | {"moments"},
            c.grpo.inner_epochs * c.grpo.minibatches,
        ),
    ]


def _diffusion(run: Run, shapes: Shapes) -> list[Program]:
    policy, mesh = run.policy, run.programs.mesh
    rollout = _rows(shapes.batch.rollout, run.config.grpo.batch_size)
    inputs = rollout.prompts, rollout.prompt_mask, _keys(run.config.grpo.batch_size)
    inputs = placed(inputs, mesh_lib.replicated(mesh))
    settings, length = policy.sampling.settings, policy.sampling.max_new_tokens
    steps = settings.steps_of(length) // (length // settings.block_length)
    return [
        Program(
            "rollout",
            lambda: fill_in.lower(policy, shapes.copy, *inputs, mesh),
            frozenset(("rollout copy",)),
            1,
            steps,
        )
    ]


def _keys(rows: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows,), jax.random.key(0).dtype)


def rows_at_a_time(run: Run) -> int:
    """Completions that decode together."""
    devices = mesh_lib.batch_devices(run.programs.mesh)
    return -(-run.config.sampled_at_once // devices) * devices


def decoding_state(run: Run, shapes: Shapes, columns: int) -> Any:
    """The state of decoding with room for so many columns."""
    begin, inputs, static = _beginning(run, shapes)
    state = jax.eval_shape(functools.partial(begin, **(static | {"columns": columns})), *inputs)
    mesh = run.programs.mesh
    return placed(state, decoding.placement(state, run.policy.model, mesh))


def longest(run: Run) -> int:
    """Columns that the cache grows to at most."""
    c = run.config
    crowded = rows_at_a_time(run) < c.grpo.batch_size
    spare = c.rollout.segment if crowded else 0
    return c.rollout.max_prompt_tokens + c.rollout.max_new_tokens + spare


def _beginning(run: Run, shapes: Shapes):
    """`decoding.begin` with its inputs and what is static."""
    c, mesh, rows = run.config, run.programs.mesh, rows_at_a_time(run)
    group = c.grpo.group_size
    repeats = 1 if rows % (group * mesh_lib.batch_devices(mesh)) else group
    by_row = mesh_lib.batch_sharding(mesh)
    prompts = _rows(shapes.batch.rollout, rows // repeats)
    keys, live = placed((_keys(rows), jax.ShapeDtypeStruct((rows,), bool)), by_row)
    inputs = shapes.copy, prompts.prompts, prompts.prompt_mask, keys, live
    static = {
        "setting": decoding.Setting(run.policy.model, run.policy.sampling, mesh),
        "columns": c.rollout.max_prompt_tokens + min(c.rollout.segment, c.rollout.max_new_tokens),
        "repeats": repeats,
    }
    return decoding.begin, inputs, static


def _autoregressive(run: Run, shapes: Shapes) -> list[Program]:
    """Reading prompts, decoding with the longest cache, and the cache's last growth."""
    c, mesh = run.config, run.programs.mesh
    begin, inputs, static = _beginning(run, shapes)
    setting = static["setting"]
    whole = longest(run)
    segment = min(c.rollout.segment, c.rollout.max_new_tokens)
    waves = c.grpo.batch_size / rows_at_a_time(run)
    least = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
    takes = frozenset(("rollout copy",))

    def prefill():
        return decoding.program(begin, setting.platform).lower(*inputs, **static)

    def decode():
        program = decoding.program(decoding.decode, setting.platform)
        state = decoding_state(run, shapes, whole)
        return program.lower(shapes.copy, state, least, setting=setting)

    def grow():
        state = decoding_state(run, shapes, whole - segment)
        return decoding.grow.lower(state, setting=setting, columns=whole)

    segments = -(-c.rollout.max_new_tokens // segment)
    found = [
        Program("prefill", prefill, takes, waves),
        Program("decode", decode, takes, waves * segments, segment),
    ]
    if segments > 1:
        found.append(Program("grow", grow, frozenset(), waves * (segments - 1)))
    return found
