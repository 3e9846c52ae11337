"""What every sampler takes and returns."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ais_jax.models.cache import FORMATS, NONE
from ais_jax.sampling.diffusion_config import DiffusionConfig
from ais_jax.settings import at_least

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
      kv_cache: format of keys and values, one of `models.cache.FORMATS`; "none" is the compute
        dtype.
      slots: completions at a time, the others wait for a row; None takes all.
      segment: columns by which the cache grows.
      prefill_chunk: prompt tokens a row that are read at a time.
      compact_steps: rows that have ended leave the batch if at least this many steps may follow.
      top_k: only the most probable `top_k` tokens are drawn; 0 keeps all. This and the next two,
        see `logps.truncate`, are for evaluation: they would bias every ratio.
      top_p: of those only the fewest that hold this much of their probability.
      min_p: of those only tokens at least `min_p` times as probable as the most probable one.

    Raises:
      ValueError: blocks and steps do not fit the length, or a setting is out of range or is one of
        autoregressive models and set for a diffusion model.
    """

    max_new_tokens: int
    temperature: float
    pad_id: int
    eos_ids: tuple[int, ...]
    token_count: int
    score_chunk: int = 128
    mask_id: int = -1
    diffusion: DiffusionConfig | None = None
    kv_cache: str = NONE
    slots: int | None = None
    segment: int = 256
    prefill_chunk: int = 512
    compact_steps: int = 64
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if self.diffusion is not None:
            self.diffusion.check(self.max_new_tokens)
        check_truncation(self.top_k, self.top_p, self.min_p)
        if self.diffusion is not None and self.truncated:
            raise ValueError(
                "top_k, top_p and min_p are for autoregressive models: leave them at 0, 1 and 0"
            )
        if self.diffusion is not None and (self.kv_cache != NONE or self.slots is not None):
            raise ValueError(
                f"kv_cache={self.kv_cache} and slots={self.slots} are for autoregressive models: "
                "leave them at none and null"
            )
        if self.kv_cache not in FORMATS:
            raise ValueError(f"kv_cache={self.kv_cache!r} is unknown; choose one of {FORMATS}")
        at_least(self, 1, "max_new_tokens", "score_chunk", "slots")
        at_least(self, 1, "segment", "prefill_chunk", "compact_steps")

    @property
    def truncated(self) -> bool:
        """Whether improbable tokens are left out."""
        return (self.top_k, self.top_p, self.min_p) != (0, 1, 0)

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


def check_truncation(top_k: int, top_p: float, min_p: float) -> None:
    """Refuses what `logps.truncate` cannot do.

    Raises:
      ValueError: one of them is out of range.
    """
    if top_k < 0:
        raise ValueError(f"top_k={top_k} must be at least 0, which keeps all tokens")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, which keeps all tokens")
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p={min_p} must be from 0, which keeps all tokens, to 1")
