"""Sampling behind one interface: the trainer knows `Policy.rollout` and `Policy.score` alone."""

from __future__ import annotations

import dataclasses

import jax

from ais_jax import lora as lora_lib
from ais_jax.lora import LoraConfig
from ais_jax.models import Model, Params
from ais_jax.models.tokenizers import CharTokenizer, Tokenizer
from ais_jax.sampling import autoregressive, diffusion, estimators
from ais_jax.sampling.diffusion_config import DiffusionConfig
from ais_jax.sampling.types import Plan, Rollout, SamplingConfig

__all__ = ["DiffusionConfig", "Plan", "Policy", "Rollout", "SamplingConfig", "sampling_config"]


def sampling_config(
    model: Model, tokenizer: Tokenizer, diffusion: DiffusionConfig, **settings
) -> SamplingConfig:
    """How a model is sampled with its tokenizer's ids.

    Args:
      model: structure.
      tokenizer: the model's.
      diffusion: used for diffusion models alone.
      **settings: lengths, temperature and chunk of `SamplingConfig`.

    Raises:
      ValueError: lengths, steps or the mask id do not fit.
    """
    mask_id = model.mask_id
    config = SamplingConfig(
        pad_id=tokenizer.pad_id,
        eos_ids=tokenizer.eos_ids,
        token_count=tokenizer.size,
        mask_id=-1 if mask_id is None else mask_id,
        diffusion=None if mask_id is None else diffusion,
        **settings,
    )
    config.check_vocabulary(model.config.vocab_size)
    if isinstance(tokenizer, CharTokenizer) and 0 <= config.mask_id < tokenizer.size:
        raise ValueError(
            f"mask_token_id={mask_id} is one of the tokenizer's {tokenizer.size} ids: set it and "
            "vocab_size above them, or leave vocab_size at 0"
        )
    return config


@dataclasses.dataclass(frozen=True)
class Policy:
    """A model with the way it is sampled. Hashable; parameters are passed to each call.

    Attributes:
      model: structure.
      sampling: lengths, temperature, ids.
      lora: what is trained are adapters beside a frozen base; None is the whole model.
    """

    model: Model
    sampling: SamplingConfig
    lora: LoraConfig | None = None

    def join(self, trainable: Params, frozen: Params | None) -> Params:
        """What the model computes with, from what is trained and what is not; copies nothing."""
        if self.lora is None:
            return trainable
        assert frozen is not None
        return lora_lib.join(trainable, frozen, self.lora.scale)

    def init_trainable(self, key: jax.Array) -> Params:
        """Random parameters, or adapters that change nothing yet; float32."""
        if self.lora is None:
            return self.model.init(key)
        return lora_lib.init(self.lora, self.model, key)

    def hold(self, base: Params) -> Params:
        """The frozen part under adapters, as `lora.base_recipe` says, otherwise in `dtype`."""
        assert self.lora is not None
        return lora_lib.hold(base, self.lora, self.model.dtype)

    def trainable_axes(self) -> Params:
        """Logical axis names of what is trained, a tuple a leaf."""
        if self.lora is None:
            return self.model.param_axes()
        return lora_lib.param_axes(self.lora, self.model)

    def rollout(
        self, params: Params, prompts: jax.Array, prompt_mask: jax.Array, keys: jax.Array
    ) -> Rollout:
        """Samples a completion a row; see `autoregressive.rollout` and `diffusion.rollout`."""
        engine = autoregressive if self.sampling.diffusion is None else diffusion
        return engine.rollout(self.model, params, prompts, prompt_mask, keys, self.sampling)

    def plan(self, rollout: Rollout, keys: jax.Array) -> Rollout:
        """The rollout, with the canvases at which a diffusion model scores it.

        Args:
          rollout: as it was sampled.
          keys: [B] PRNG keys of the masks that are drawn.
        """
        if self.sampling.diffusion is None:
            return rollout
        return rollout._replace(plan=estimators.draw_plan(rollout, keys, self.sampling))

    def score(self, params: Params, batch: Rollout) -> tuple[jax.Array, jax.Array]:
        """(log-probs, entropy) [B, T] float32 of a rollout that `plan` has been called on.

        See `autoregressive.score` and `estimators.score`.
        """
        engine = autoregressive if self.sampling.diffusion is None else estimators
        return engine.score(self.model, params, batch, self.sampling)

    @property
    def recorded(self) -> bool:
        """Whether scoring replays sampling, so that the log-probs of a rollout are comparable.

        Otherwise the policy that sampled has to be scored on the same plan, or the estimator's bias
        would be taken for a mismatch.
        """
        return self.sampling.diffusion is None or self.sampling.diffusion.recorded

    @property
    def unbiased(self) -> bool:
        """Whether the mean importance ratio of a rollout is 1."""
        return self.sampling.diffusion is None or self.sampling.diffusion.unbiased
