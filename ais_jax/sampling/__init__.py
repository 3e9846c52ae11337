"""Sampling behind one interface: the trainer knows `Policy.rollout` and `Policy.score` alone."""

from __future__ import annotations

import dataclasses

import jax

from ais_jax.models import Model, Params
from ais_jax.sampling import autoregressive
from ais_jax.sampling.types import Rollout, SamplingConfig

__all__ = ["Policy", "Rollout", "SamplingConfig"]


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with the way it is sampled. Hashable; parameters are passed to each call."""

    model: Model
    sampling: SamplingConfig

    def rollout(
        self, params: Params, prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array
    ) -> Rollout:
        """Samples a completion a row; see `autoregressive.rollout`."""
        return autoregressive.rollout(self.model, params, prompts, prompt_mask, keys, self.sampling)

    def score(self, params: Params, batch: Rollout) -> tuple[jax.Array, jax.Array]:
        """(log-probs, entropy) [B, T] float32 of a rollout; see `autoregressive.score`."""
        return autoregressive.score(self.model, params, batch, self.sampling)
