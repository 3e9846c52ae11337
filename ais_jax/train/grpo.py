"""Group-relative advantages, and which groups are worth a gradient."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def group_advantages(
    rewards: jax.Array | np.ndarray, group_size: int, kind: str = "std"
) -> jax.Array:
    """Advantages [B] float32 of rewards [B] whose groups are consecutive rows.

        std            (r - mean) / (std + 1e-6), sample standard deviation (GRPO, arXiv 2402.03300)
        mean           r - mean (Dr.GRPO, arXiv 2503.20783)
        leave_one_out  r - mean of the others (RLOO, arXiv 2402.14740)

    A group whose rewards are all equal, or a group of one, gets exactly 0.

    Raises:
      ValueError: the batch does not consist of whole groups, or `kind` is unknown.
    """
    if rewards.ndim != 1 or rewards.shape[0] % group_size:
        raise ValueError(f"rewards of shape {rewards.shape} are not groups of {group_size}")
    groups = jnp.asarray(rewards, jnp.float32).reshape(-1, group_size)
    centred = groups - jnp.mean(groups, axis=1, keepdims=True)
    others = max(group_size - 1, 1)
    if kind == "std":
        std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=1, keepdims=True) / others)
        advantages = centred / (std + 1e-6)
    elif kind == "mean":
        advantages = centred
    elif kind == "leave_one_out":
        advantages = centred * (group_size / others)
    else:
        raise ValueError(f"advantages={kind!r} is unknown; choose std, mean or leave_one_out")
    # The mean of equal numbers may differ from them in the last bit, and std would blow that up.
    spread = jnp.max(groups, axis=1, keepdims=True) > jnp.min(groups, axis=1, keepdims=True)
    return jnp.where(spread, advantages, 0.0).reshape(-1)


def informative_groups(rewards: np.ndarray, group_size: int) -> np.ndarray:
    """[groups] bool: which groups' rewards differ, so that they have an advantage."""
    groups = np.asarray(rewards).reshape(-1, group_size)
    return groups.max(axis=1) > groups.min(axis=1)


def completion_lengths(tokens: np.ndarray, mask: np.ndarray, eos_ids: Sequence[int]) -> np.ndarray:
    """[B] int: tokens of each completion through its first end token, or all that count.

    Args:
      tokens: [B, T] int.
      mask: [B, T] bool, which of them were sampled.
      eos_ids: ids that end a completion.
    """
    ends = np.isin(tokens, np.asarray(eos_ids)) & np.asarray(mask)
    whole = np.asarray(mask).sum(axis=1)
    return np.where(ends.any(axis=1), ends.argmax(axis=1) + 1, whole)


def overlong_penalty(lengths: np.ndarray, longest: int, buffer: int) -> np.ndarray:
    """[B] float32: 0 up to `longest` - `buffer` tokens, then falling in a line to -1 at `longest`.

    DAPO (arXiv 2503.14476), eq. 13.
    """
    return -np.clip((lengths - (longest - buffer)) / buffer, 0, 1).astype(np.float32)
