"""What every sampler takes and returns."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ais_jax.sampling.diffusion_config import DiffusionConfig

Array = Any  # jax.Array or np.ndarray


class Plan(NamedTuple):
    """At which canvases the tokens of a diffusion model's rollout are scored.

    B rows, N canvases, P prompt positions, T completion positions, S positions scored a canvas.
    """

    visible: Array  # [B, N, T] bool, completion tokens that show; the others are masked
    prompt_visible: Array  # [B, N, P] bool, prompt tokens that show
    positions: Array  # [B, N, S] int32, in the completion
    weights: Array  # [B, N, S] float32, of their log-probs; 0 fills up


class Rollout(NamedTuple):
    """A batch of sampled completions, on device or host (NumPy).

    B rows, P prompt positions (left-padded), T completion positions. The last three are None for
    autoregressive models.
    """

    prompts: Array  # [B, P] int32
    prompt_mask: Array  # [B, P] bool
    tokens: Array  # [B, T] int32; after the end token padding, or what a diffusion model put there
    mask: Array  # [B, T] bool, sampled tokens through the first end token
    logps: Array  # [B, T] float32, under the policy that sampled
    truncated: Array  # [B] bool, no end token within T
    step_map: Array = None  # [B, T] int32, the row's step at which the token was committed
    forwards: Array = None  # [B] int32, steps the row took
    plan: Plan | None = None  # how `score` evaluates it


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
      mask_id: stands for a token not chosen yet; never sampled. -1, no id, for autoregressive
        models.
      diffusion: how a diffusion model is sampled and scored; None for autoregressive models.

    Raises:
      ValueError: blocks and steps do not fit the length.
    """

    max_new_tokens: int
    temperature: float
    pad_id: int
    eos_ids: tuple[int, ...]
    token_count: int
    score_chunk: int = 128
    mask_id: int = -1
    diffusion: DiffusionConfig | None = None

    def __post_init__(self):
        if self.diffusion is not None:
            self.diffusion.check(self.max_new_tokens)

    @property
    def settings(self) -> DiffusionConfig:
        """`diffusion`, of a diffusion model."""
        assert self.diffusion is not None
        return self.diffusion

    @property
    def draws(self) -> int:
        """Sets of random masks that a rollout is scored at."""
        return 1 if self.diffusion is None else self.diffusion.draws

    def allowed_ids(self, vocab_size: int) -> jax.Array:
        """[V] bool: ids that may be sampled. Raises like `check_vocabulary`."""
        self.check_vocabulary(vocab_size)
        ids = jnp.arange(vocab_size)
        # A tokenizer may use its end token for padding; then it must stay allowed.
        padding = (ids == self.pad_id) & (self.pad_id not in self.eos_ids)
        return (ids < self.token_count) & ~padding & (ids != self.mask_id)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Refuses a vocabulary without the mask id.

        Raises:
          ValueError: says what to change.
        """
        if self.diffusion is not None and not 0 <= self.mask_id < vocab_size:
            raise ValueError(
                f"mask_token_id={self.mask_id} is no id of a vocabulary of {vocab_size}: set the "
                "model's mask_token_id to a row that no token uses, and vocab_size above it"
            )
        if self.diffusion is not None and self.mask_id in (*self.eos_ids, self.pad_id):
            raise ValueError(
                f"mask_token_id={self.mask_id} is an end token or padding too: it must be an id of "
                "its own"
            )

    def resized(self, max_new_tokens: int) -> SamplingConfig:
        """The same for completions of another length: as many tokens a step as before.

        Raises:
          ValueError: blocks and steps do not fit the length.
        """
        diffusion = self.diffusion
        if diffusion is not None:
            diffusion = diffusion.resized(self.max_new_tokens, max_new_tokens)
        return dataclasses.replace(self, max_new_tokens=max_new_tokens, diffusion=diffusion)
