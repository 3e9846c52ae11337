"""The compiled programs of a run: the pure functions of a step, jitted over a mesh."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ais_jax import distributed, quantize
from ais_jax import mesh as mesh_lib
from ais_jax.config import Config
from ais_jax.sampling import Policy
from ais_jax.train import step as step_lib
from ais_jax.train.state import init_state, state_shardings


@dataclasses.dataclass(frozen=True)
class Programs:
    """Compiled functions; parameters, state and batches stay sharded between them.

    init_trainable(key) -> what is trained: random parameters, or adapters
    init_base(key) -> random parameters under adapters
    hold(params) -> the frozen part under adapters, quantized if so configured; `params` is donated
    init_state(trainable) -> state
    refit(params, previous or None) -> (sampling copy, share of changed codes)
    rollout(copy, prompts, prompt_mask, keys, between) -> Rollout on the host; not to be jitted
    plan(rollout, keys) -> Rollout, `rollout.diffusion.draws` times the rows
    score(params, rollout) -> (logps, entropy)
    measure(calibration, batch) -> (calibration, Measurement)
    take(batch, rows) -> the batch's rows
    update(state, frozen, batch, coefficient) -> (state, metrics); `state` is donated
    put(array) -> the array, the same in all processes, its rows split over the devices

    `params` are those that the model computes with, see `Policy.join`.
    """

    mesh: jax.sharding.Mesh
    trainable_shardings: Any

    init_trainable: Callable
    init_base: Callable
    hold: Callable
    init_state: Callable
    refit: Callable
    rollout: Callable
    plan: Callable
    score: Callable
    measure: Callable
    take: Callable
    update: Callable
    put: Callable


def build_programs(
    config: Config,
    policy: Policy,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    recipe: str,
) -> Programs:
    """Binds the static parts of each function and says where its results live.

    `recipe` is that of the sampling copy.
    """
    model = policy.model
    shardings = state_shardings(policy, optimizer, mesh)
    base_shardings = mesh_lib.param_shardings(
        model.param_axes(), model.abstract_params(), mesh, mesh_lib.TRAIN_RULES
    )
    platform = mesh_lib.platform_of(mesh)
    rows, everywhere = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)

    refit = functools.partial(
        step_lib.refit,
        model=model,
        recipe=recipe,
        platform=platform,
    )
    copy, _ = jax.eval_shape(lambda p: refit(p, None), model.abstract_params())
    copy_axes = quantize.copy_axes(model.param_axes(), copy)
    copy_shardings = mesh_lib.param_shardings(copy_axes, copy, mesh, mesh_lib.ROLLOUT_RULES)
    # What recomputes its activations stacks few of them: there a CPU would only compile for longer.
    unroll = platform == "cpu" and not model.remat
    update = functools.partial(
        step_lib.update,
        policy=dataclasses.replace(policy, model=dataclasses.replace(model, unroll=unroll)),
        optimizer=optimizer,
        config=config.ais,
        kl_coef=config.grpo.kl_coef,
        micro_batches=config.grpo.minibatch_size // config.grpo.rows,
    )
    return Programs(
        mesh=mesh,
        trainable_shardings=shardings.params,
        init_trainable=jax.jit(policy.init_trainable, out_shardings=shardings.params),
        init_base=jax.jit(model.init, out_shardings=base_shardings),
        hold=jax.jit(policy.hold, donate_argnums=0),
        # A copy: updates give the state's memory away, and the caller keeps the parameters.
        init_state=jax.jit(
            lambda params: init_state(jax.tree.map(jnp.copy, params), optimizer),
            out_shardings=shardings,
        ),
        # The old copy is compared and then dead: its memory is the new one's.
        refit=jax.jit(refit, donate_argnums=1, out_shardings=(copy_shardings, everywhere)),
        rollout=functools.partial(policy.rollout, mesh=mesh),
        plan=jax.jit(
            functools.partial(step_lib.plan, policy=policy, draws=policy.sampling.draws),
            out_shardings=rows,
        ),
        score=jax.jit(
            functools.partial(step_lib.score, policy=policy, rows=config.grpo.rows),
            out_shardings=rows,
        ),
        measure=jax.jit(
            functools.partial(step_lib.measure, config=config.ais), out_shardings=everywhere
        ),
        take=jax.jit(
            lambda batch, index: jax.tree.map(lambda x: x[index], batch), out_shardings=rows
        ),
        update=jax.jit(
            update,
            donate_argnums=0,
            out_shardings=(shardings, everywhere),
            compiler_options=mesh_lib.one_by_one(platform) if unroll else None,
        ),
        put=lambda x: distributed.put(x, rows),
    )
