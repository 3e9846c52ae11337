"""What every sampler takes and returns."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = Any  # jax.Array or np.ndarray


class Rollout(NamedTuple):
    """A batch of sampled completions, on device or host (NumPy).

    B rows, P prompt positions (left-padded), T completion positions.
    """

    prompts: Array  # [B, P] int32
    prompt_mask: Array  # [B, P] bool
    tokens: Array  # [B, T] int32, padded after the end token
    mask: Array  # [B, T] bool, sampled tokens through the first end token
    logps: Array  # [B, T] float32, under the policy that sampled
    truncated: Array  # [B] bool, no end token within T


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Static settings of a sampler, shared by rollout and score.

    Attributes:
      max_new_tokens: T.
      temperature: divides the logits; 0 decodes greedily (evaluation only, no ratio exists).
      pad_id: id of padding; never sampled.
      eos_ids: ids that end a completion.
      token_count: ids from here on do not exist in the tokenizer and are never sampled.
      score_chunk: positions whose logits exist at the same time while scoring.
    """

    max_new_tokens: int
    temperature: float
    pad_id: int
    eos_ids: tuple[int, ...]
    token_count: int
    score_chunk: int = 128

    def allowed_ids(self, vocab_size: int) -> jax.Array:
        """[V] bool: ids that may be sampled."""
        ids = jnp.arange(vocab_size)
        # A tokenizer may use its end token for padding; then it must stay allowed.
        padding = (ids == self.pad_id) & (self.pad_id not in self.eos_ids)
        return (ids < self.token_count) & ~padding
