"""The compiled parts of autoregressive sampling: begin, decode, and what is done between segments.

All rows of a batch write their newest key at the same column of the cache, so a row's prompt ends
where its completion begins and rows differ in where they start. Tokens stand at the columns of
their keys.

Letters in shapes: R rows, P prompt length (left-padded), S columns, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from ais_jax import mesh as mesh_lib
from ais_jax.models import Model, Params, positions_of
from ais_jax.models import cache as cache_lib
from ais_jax.sampling import logps as lp
from ais_jax.sampling.types import SamplingConfig


class Decoding(NamedTuple):
    """What sampling has come to.

    Rows that are done are padding: they go through the model and record nothing.
    """

    column: jax.Array  # [] int32, that of the newest tokens; their keys are not in the cache yet
    start: jax.Array  # [R] int32, column of the prompt's first token
    first: jax.Array  # [R] int32, column of the completion's first token
    length: jax.Array  # [R] int32, sampled tokens
    done: jax.Array  # [R] bool
    ended: jax.Array  # [R] bool, by an end token
    tokens: jax.Array  # [R, S] int32
    logps: jax.Array  # [R, S] float32
    keys: jax.Array  # [R] PRNG keys
    cache: Any  # S positions


class Setting(NamedTuple):
    """The static part of every program. Hashable."""

    model: Model
    config: SamplingConfig
    mesh: Mesh | None  # None leaves it to the inputs

    @property
    def platform(self) -> str:
        """Where it runs: "cpu", "gpu"..."""
        return mesh_lib.platform_of(self.mesh)


def placement(state: Decoding, model: Model, mesh: Mesh) -> Decoding:
    """Where a state lives: rows over the batch axes, heads over `tensor`. NamedShardings."""
    # What the host reads is whole on every device, so that every process can decide alike.
    everywhere, rows = mesh_lib.replicated(mesh), mesh_lib.batch_sharding(mesh)
    by_row: dict[str, Any] = {
        name: rows if name in ("tokens", "logps", "keys") else everywhere
        for name in Decoding._fields
        if name != "cache"
    }

    def place(names, x) -> NamedSharding:
        return mesh_lib.sharding_of(names, x.shape, mesh, mesh_lib.CACHE_RULES)

    cache: Any = cache_lib.map_axes(place, model.cache_axes, state.cache)
    return Decoding(**by_row, cache=cache)


def _placed(setting: Setting, state: Decoding) -> Decoding:
    """The state where `placement` says."""
    if setting.mesh is None:
        return state
    where = placement(state, setting.model, setting.mesh)
    return jax.lax.with_sharding_constraint(state, where)


def _draw(setting: Setting, params: Params, hidden: jax.Array, keys: jax.Array, step: jax.Array):
    """(tokens, log-probs) [R], the `step`-th [R] of each row, of hidden states [R, D]."""
    model, config = setting.model, setting.config
    allowed = config.allowed_ids(model.config.vocab_size)
    keys = jax.vmap(jax.random.fold_in)(keys, step)
    return lp.next_token(model.unembed(params, hidden), keys, config, allowed)


def _record(setting: Setting, state: Decoding, tokens: jax.Array, logps: jax.Array) -> Decoding:
    """The state with one more token a live row, at the next column."""
    config = setting.config
    live = ~state.done
    tokens = jnp.where(live, tokens.astype(jnp.int32), config.pad_id)
    ended = live & jnp.any(tokens[:, None] == jnp.array(config.eos_ids, jnp.int32), axis=1)
    length = state.length + live
    put = functools.partial(
        jax.lax.dynamic_update_slice_in_dim, start_index=state.column + 1, axis=1
    )
    return state._replace(
        column=state.column + 1,
        length=length,
        done=state.done | ended | (length >= config.max_new_tokens),
        ended=state.ended | ended,
        tokens=put(state.tokens, tokens[:, None]),
        logps=put(state.logps, jnp.where(live, logps, 0.0)[:, None]),
    )


@functools.cache
def program(function: Callable, platform: str) -> Any:
    """`begin` or `decode`, jitted for a platform."""
    return jax.jit(
        function,
        static_argnames=("setting", "columns", "repeats") if function is begin else "setting",
        donate_argnames=() if function is begin else "state",
        compiler_options=mesh_lib.one_by_one(platform),
    )


def begin(
    params: Params,
    prompts: jax.Array,
    prompt_mask: jax.Array,
    keys: jax.Array,
    live: jax.Array,
    *,
    setting: Setting,
    columns: int,
    repeats: int,
) -> Decoding:
    """Reads the prompts and draws the first tokens. See `program`.

    Args:
      params: the policy's.
      prompts: [R / repeats, P] int32, left-padded.
      prompt_mask: [R / repeats, P] bool.
      keys: [R] PRNG keys.
      live: [R] bool; other rows are done from the start.
      setting: static.
      columns: S, more than P.
      repeats: completions a prompt, in consecutive rows. A prompt is read once.
    """
    model, config = setting.model, setting.config
    width = prompts.shape[1]
    hidden, cache = _prefill(setting, params, prompts, prompt_mask)
    axes = model.cache_axes
    cache = cache_lib.resize(axes, cache_lib.repeat_rows(axes, cache, repeats), columns)
    rows = keys.shape[0]
    lengths = jnp.repeat(jnp.sum(prompt_mask, axis=1, dtype=jnp.int32), repeats)
    state = Decoding(
        column=jnp.int32(width - 1),
        start=width - lengths,
        first=jnp.full(rows, width, jnp.int32),
        length=jnp.zeros(rows, jnp.int32),
        done=~live,
        ended=jnp.zeros(rows, bool),
        tokens=jnp.full((rows, columns), config.pad_id, jnp.int32),
        logps=jnp.zeros((rows, columns), jnp.float32),
        keys=keys,
        cache=cache,
    )
    hidden = jnp.repeat(hidden, repeats, axis=0)
    drawn = _draw(setting, params, hidden, keys, state.length)
    return _placed(setting, _record(setting, state, *drawn))


def _prefill(setting: Setting, params: Params, prompts: jax.Array, mask: jax.Array):
    """(last hidden states [R, D], cache of P positions), `prefill_chunk` tokens of a row a time."""
    model, (rows, width) = setting.model, prompts.shape
    positions = positions_of(mask)
    cache = model.empty_cache(rows, width, setting.config.kv_cache, params)
    chunk = setting.config.prefill_chunk
    if width <= chunk:
        hidden, cache = model.hidden(params, prompts, positions, mask, cache, 0)
        return hidden[:, -1], cache

    def read(cache, index, size):
        cut = functools.partial(
            jax.lax.dynamic_slice_in_dim, start_index=index, slice_size=size, axis=1
        )
        hidden, cache = model.hidden(params, cut(prompts), cut(positions), mask, cache, index)
        return cache, hidden[:, -1]

    # The first chunk takes the remainder: every other ends a full chunk before the next.
    rest = width % chunk or chunk
    cache, _ = read(cache, 0, rest)
    starts = jnp.arange(rest, width, chunk)
    cache, last = jax.lax.scan(functools.partial(read, size=chunk), cache, starts)
    return last[-1], cache


def decode(params: Params, state: Decoding, least: jax.Array, *, setting: Setting) -> Decoding:
    """Samples until the columns are full, or no more than `least` rows are live.

    The state's memory is given away. See `program`.
    """
    model, columns = setting.model, state.tokens.shape[1]

    def go_on(state: Decoding):
        live = jnp.sum(~state.done)
        return (state.column < columns - 1) & (live > least) & (live > 0)

    def step(state: Decoding) -> Decoding:
        newest = jax.lax.dynamic_slice_in_dim(state.tokens, state.column, 1, axis=1)
        positions = jnp.maximum(state.column - state.start, 0)[:, None]
        key_mask = jnp.arange(columns) >= state.start[:, None]
        hidden, cache = model.hidden(params, newest, positions, key_mask, state.cache, state.column)
        drawn = _draw(setting, params, hidden[:, -1], state.keys, state.length)
        return _record(setting, state._replace(cache=cache), *drawn)

    return _placed(setting, jax.lax.while_loop(go_on, step, state))


@functools.partial(jax.jit, static_argnames=("setting", "columns"))
def grow(state: Decoding, *, setting: Setting, columns: int) -> Decoding:
    """The state with room for more columns."""
    more = columns - state.tokens.shape[1]
    pad = setting.config.pad_id
    return _placed(
        setting,
        state._replace(
            tokens=jnp.pad(state.tokens, ((0, 0), (0, more)), constant_values=pad),
            logps=jnp.pad(state.logps, ((0, 0), (0, more))),
            cache=cache_lib.resize(setting.model.cache_axes, state.cache, columns),
        ),
    )


@functools.partial(jax.jit, static_argnames="setting", donate_argnames="state")
def shift(state: Decoding, by: jax.Array, *, setting: Setting) -> Decoding:
    """The state without its first `by` columns, so that there is room at the end."""
    return _placed(
        setting,
        state._replace(
            column=state.column - by,
            start=state.start - by,
            first=state.first - by,
            tokens=jnp.roll(state.tokens, -by, axis=1),
            logps=jnp.roll(state.logps, -by, axis=1),
            cache=cache_lib.shift(setting.model.cache_axes, state.cache, by),
        ),
    )


@functools.partial(jax.jit, static_argnames="setting")
def take(state: Decoding, rows: jax.Array, *, setting: Setting) -> Decoding:
    """The given rows [R'] of the state."""
    by_row = {
        name: getattr(state, name)[rows]
        for name in Decoding._fields
        if name not in ("column", "cache")
    }
    cache = cache_lib.take_rows(setting.model.cache_axes, state.cache, rows)
    return _placed(setting, state._replace(**by_row, cache=cache))


@functools.partial(jax.jit, static_argnames="setting", donate_argnames="state")
def refill(state: Decoding, new: Decoding, rows: jax.Array, *, setting: Setting) -> Decoding:
    """The state with the rows of `new`, which has just begun, in the places `rows` [R'].

    Places beyond the state are left out.
    """
    offset = state.column - new.column

    def put(name: str) -> jax.Array:
        old, fresh = getattr(state, name), getattr(new, name)
        if name in ("start", "first"):
            fresh = fresh + offset
        if name in ("tokens", "logps"):
            wide = jnp.zeros((fresh.shape[0], old.shape[1]), old.dtype)
            fresh = jax.lax.dynamic_update_slice_in_dim(wide, fresh, offset, axis=1)
        return old.at[rows].set(fresh, mode="drop")

    by_row = {name: put(name) for name in Decoding._fields if name not in ("column", "cache")}
    # A beginning's columns end with its first tokens, whose keys are yet to be written.
    cache = cache_lib.put_rows(setting.model.cache_axes, state.cache, new.cache, rows, offset)
    return _placed(setting, state._replace(**by_row, cache=cache))


@functools.partial(jax.jit, static_argnames="setting")
def completions(state: Decoding, *, setting: Setting) -> tuple[jax.Array, ...]:
    """(tokens, log-probs, mask) [R, T] and ended [R] of what was sampled, on every device."""
    config = setting.config
    place = jnp.arange(config.max_new_tokens)
    mask = place < state.length[:, None]
    columns = jnp.clip(state.first[:, None] + place, 0, state.tokens.shape[1] - 1)
    tokens = jnp.where(mask, jnp.take_along_axis(state.tokens, columns, axis=1), config.pad_id)
    logps = jnp.where(mask, jnp.take_along_axis(state.logps, columns, axis=1), 0.0)
    out = tokens, logps, mask, state.ended
    if setting.mesh is None:
        return out
    return jax.lax.with_sharding_constraint(out, mesh_lib.replicated(setting.mesh))
