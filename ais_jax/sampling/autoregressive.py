"""Autoregressive sampling with a KV cache, and scoring of what was sampled.

The compiled parts are in decoding.py. Here the host decides between them, from how many rows are
done: when the cache grows, when the batch shrinks, when waiting prompts take the places of rows
that have ended. None of it changes what a row samples.

Letters in shapes: N completions, R rows at a time, P prompt length (left-padded), T completion
length, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ais_jax import distributed
from ais_jax import mesh as mesh_lib
from ais_jax.models import Model, Params, positions_of
from ais_jax.quantize import QuantArray
from ais_jax.sampling import decoding
from ais_jax.sampling import logps as lp
from ais_jax.sampling.decoding import Decoding, Setting, begin, decode, program
from ais_jax.sampling.types import Rollout, SamplingConfig

# Below this many rows a CPU's products are slower, not faster, but those of float32.
_LEAST_ROWS_ON_CPU = 8
# Buckets of prompt lengths: every one is a program to compile.
_WIDTHS, _NARROWEST = 4, 32


def rollout(
    model: Model,
    params: Params,
    prompts: np.ndarray,
    prompt_mask: np.ndarray,
    keys: jax.Array,
    config: SamplingConfig,
    mesh: Mesh | None = None,
    between: Callable[[], object] = lambda: None,
) -> Rollout:
    """Samples completions: prefill, then decoding in segments.

    Not to be jitted: compiled parts run one after the other, and between them the host looks at
    how many rows are done. The cache grows by `config.segment` columns, so short completions never
    pay for `max_new_tokens`; a batch that has half ended shrinks; with fewer `config.slots` than
    completions, waiting ones take the places of those that have ended.

    The noise of completion n at its step t comes from `fold_in(keys[n], t)` alone, so its tokens
    depend neither on the rows beside it nor on when it gets its turn.

    Args:
      model: structure of the policy; its dtype is that of activations and cache.
      params: the policy's parameters, usually quantized and prepared.
      prompts: [M, P] int32, left-padded, on the host, the same in all processes.
      prompt_mask: [M, P] bool, on the host.
      keys: [N] PRNG keys; N / M completions of each prompt, in consecutive rows.
      config: lengths, temperature, ids, engine.
      mesh: spreads rows over its batch axes, and heads over `tensor`.
      between: called after every segment; what it raises ends the sampling.

    Returns:
      `Rollout` of N rows on the host; `logps` are float32 log-probs under `params` of the
      distribution sampled from.
    """
    setting = Setting(model, config, mesh)
    job = _job(setting, params, np.asarray(prompts), np.asarray(prompt_mask), keys)
    found = _Found(
        tokens=np.full((job.total, config.max_new_tokens), config.pad_id, np.int32),
        logps=np.zeros((job.total, config.max_new_tokens), np.float32),
        mask=np.zeros((job.total, config.max_new_tokens), bool),
        ended=np.zeros(job.total, bool),
    )
    rows = job.round_up(min(config.slots or job.total, job.total))
    waiting = min(rows, job.total)  # the next completion that has no row yet
    requests = np.where(np.arange(rows) < waiting, np.arange(rows), -1)
    crowded = waiting < job.total
    columns = job.width + min(config.segment, config.max_new_tokens)
    state = _begin(job, requests, columns)
    while True:
        if waiting < job.total:
            least = len(requests) - _group(job, len(requests))
        else:
            least = _fewer(job, state, requests)
        state = program(decode, setting.platform)(params, state, np.int32(least), setting=setting)
        done = np.asarray(state.done)
        between()
        requests = _collect(job, state, requests, done, found)
        if waiting == job.total and done.all():
            break
        if waiting < job.total:
            state, requests, waiting = _refill(job, state, requests, waiting)
        elif (requests >= 0).sum() <= (fewer := _fewer(job, state, requests)):
            state, requests = _compact(job, state, requests, fewer)
        state = _make_room(job, state, requests, crowded)
    if job.repeats > 1:
        prompts, prompt_mask = (np.repeat(x, job.repeats, axis=0) for x in (prompts, prompt_mask))
    return Rollout(prompts, prompt_mask, found.tokens, found.mask, found.logps, ~found.ended)


class _Found(NamedTuple):
    """What has been sampled, on the host, by completion; filled in as rows end."""

    tokens: np.ndarray  # [N, T] int32
    logps: np.ndarray  # [N, T] float32
    mask: np.ndarray  # [N, T] bool
    ended: np.ndarray  # [N] bool, by an end token


class _Job(NamedTuple):
    """What stays the same while completions are sampled."""

    setting: Setting
    params: Params
    prompts: np.ndarray  # [M, width]
    mask: np.ndarray  # [M, width]
    keys: jax.Array  # [N]
    repeats: int  # N / M
    multiple: int  # rows are a multiple of this, the devices that share them
    fewest: int  # rows at a time

    @property
    def total(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        return self.prompts.shape[1]

    def round_up(self, rows: int) -> int:
        """The next possible number of rows."""
        return -(-max(rows, self.fewest) // self.multiple) * self.multiple

    def put(self, x: Any) -> jax.Array:
        """On the devices, rows split over them."""
        mesh = self.setting.mesh
        if mesh is None:
            return jnp.asarray(x)
        return distributed.put(x, mesh_lib.batch_sharding(mesh))


def _job(setting: Setting, params: Params, prompts, mask, keys: jax.Array) -> _Job:
    """Raises ValueError for prompts without tokens, and keys that are no multiple of them."""
    if not len(prompts) or not len(keys) or len(keys) % len(prompts):
        raise ValueError(f"{len(keys)} keys are no multiple of {len(prompts)} prompts")
    if (
        prompts.shape != mask.shape
        or not mask[:, -1].all()
        or (np.diff(mask.astype(int)) < 0).any()
    ):
        raise ValueError(
            f"prompts {prompts.shape} and prompt_mask {mask.shape} must have one shape, and every "
            "row padding on its left alone and at least one token"
        )
    mesh = setting.mesh
    slow = setting.platform == "cpu" and (setting.model.dtype != "float32" or _quantized(params))
    width = prompt_width(mask)
    return _Job(
        *(setting, params, prompts[:, -width:], mask[:, -width:], keys),
        repeats=len(keys) // len(prompts),
        multiple=1 if mesh is None else mesh_lib.batch_devices(mesh),
        fewest=_LEAST_ROWS_ON_CPU if slow else 1,
    )


def _quantized(params: Params) -> bool:
    def is_quantized(x) -> bool:
        return isinstance(x, QuantArray)

    return any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized)))


def prompt_width(mask: np.ndarray) -> int:
    """The bucket of the longest prompt in a left-padded mask [M, P]: one of few widths up to P."""
    width = mask.shape[1]
    longest = max(int(mask.sum(axis=1).max()), 1)
    step = max(-(-width // _WIDTHS), _NARROWEST)
    return min(-(-longest // step) * step, width)


def _begin(job: _Job, requests: np.ndarray, columns: int) -> Decoding:
    """The given completions with their first tokens; -1 are rows without one."""
    filled = np.maximum(requests, 0)
    repeats = job.repeats if _whole_groups(job, filled) else 1
    chosen = filled[::repeats] // job.repeats
    return program(begin, job.setting.platform)(
        job.params,
        *(job.put(x) for x in (job.prompts[chosen], job.mask[chosen])),
        *(job.put(x) for x in (job.keys[filled], requests >= 0)),
        setting=job.setting,
        columns=columns,
        repeats=repeats,
    )


def _whole_groups(job: _Job, rows: np.ndarray) -> bool:
    """Whether completions of a prompt stand together, and devices can share out the prompts."""
    if len(rows) % (job.repeats * job.multiple):
        return False
    groups = rows.reshape(-1, job.repeats) // job.repeats
    return bool((groups == groups[:, :1]).all())


def _collect(job: _Job, state: Decoding, requests, done, found: _Found) -> np.ndarray:
    """Writes down the rows that have ended, and returns the requests without them."""
    rows = np.flatnonzero(done & (requests >= 0))
    if rows.size:
        parts = (np.asarray(x) for x in decoding.completions(state, setting=job.setting))
        for into, part in zip(found, parts, strict=True):
            into[requests[rows]] = part[rows]
    return np.where(done, -1, requests)


def _group(job: _Job, rows: int) -> int:
    """Rows that are refilled at a time: one shape to compile, and not a prefill for each row."""
    return min(-(-max(rows // 4, 1) // job.multiple) * job.multiple, rows)


def _refill(job: _Job, state: Decoding, requests: np.ndarray, waiting: int):
    """(state, requests, waiting) with waiting completions in the places of ended ones."""
    group = _group(job, len(requests))
    while waiting < job.total and (requests < 0).sum() >= group:
        free = np.flatnonzero(requests < 0)[:group]
        chosen = np.arange(waiting, waiting + group)
        chosen = np.where(chosen < job.total, chosen, -1)
        new = _begin(job, chosen, job.width + 1)
        places = np.where(chosen >= 0, free, len(requests)).astype(np.int32)
        state = decoding.refill(state, new, places, setting=job.setting)
        requests = requests.copy()
        requests[free] = chosen
        waiting += int((chosen >= 0).sum())
    return state, requests, waiting


def _fewer(job: _Job, state: Decoding, requests: np.ndarray) -> int:
    """The number of rows that the batch shrinks to once no more are live; 0 if it does not."""
    config, rows = job.setting.config, len(requests)
    smaller = job.round_up(-(-rows // 2))
    remaining = config.max_new_tokens - np.asarray(state.length)[requests >= 0].min()
    return smaller if smaller < rows and remaining >= config.compact_steps else 0


def _compact(job: _Job, state: Decoding, requests: np.ndarray, rows: int):
    """(state, requests) of the live rows, filled up to `rows` with ended ones."""
    kept = np.argsort(requests < 0, kind="stable")[:rows]
    return decoding.take(state, kept.astype(np.int32), setting=job.setting), requests[kept]


def _make_room(job: _Job, state: Decoding, requests: np.ndarray, crowded: bool) -> Decoding:
    """The state with a column to go on in: room is made at the end, or left behind at the front."""
    config, columns = job.setting.config, state.tokens.shape[1]
    column = int(state.column)
    if column < columns - 1:
        return state
    starts = np.asarray(state.start)[requests >= 0]
    unused = min(int(starts.min()), column - job.width)
    # Rows that begin late need columns beyond those of the first ones.
    most = job.width + config.max_new_tokens + (config.segment if crowded else 0)
    if columns < most and unused < max(config.segment // 2, 1):
        more = min(columns + config.segment, most)
        return decoding.grow(state, setting=job.setting, columns=more)
    return decoding.shift(state, np.int32(unused), setting=job.setting)


def score(
    model: Model, params: Params, batch: Rollout, config: SamplingConfig
) -> tuple[jax.Array, jax.Array]:
    """Log-probs of a rollout's tokens and the entropy under `params`, [B, T] float32 each.

    One forward over prompt and completion; differentiable in `params`. Values at positions where
    `batch.mask` is 0 are finite and meaningless.
    """
    tokens = jnp.concatenate([batch.prompts, batch.tokens], axis=1)
    mask = jnp.concatenate([batch.prompt_mask, batch.mask], axis=1)
    # Nothing follows the last token: it is predicted, never read.
    hidden, _ = model.hidden(params, tokens[:, :-1], positions_of(mask[:, :-1]), mask[:, :-1])
    return lp.token_logps(
        hidden[:, batch.prompts.shape[1] - 1 :],
        functools.partial(model.unembed, params),
        batch.tokens,
        temperature=config.temperature or 1,
        allowed=config.allowed_ids(model.config.vocab_size),
        chunk=config.score_chunk,
        vocab_chunk=lp.vocab_chunk(model.mesh),
    )
