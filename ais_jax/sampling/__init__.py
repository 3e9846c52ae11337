"""Sampling behind one interface: the trainer knows `Policy.rollout` and `Policy.score` alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from ais_jax import lora as lora_lib
from ais_jax import mesh as mesh_lib
from ais_jax import quantize
from ais_jax.lora import LoraConfig
from ais_jax.models import Model, Params
from ais_jax.models.tokenizers import CharTokenizer, Tokenizer
from ais_jax.sampling import autoregressive, diffusion, estimators
from ais_jax.sampling.diffusion_config import DiffusionConfig
from ais_jax.sampling.types import Plan, Rollout, SamplingConfig

__all__ = [
    "DiffusionConfig",
    "Plan",
    "Policy",
    "Rollout",
    "SamplingConfig",
    "sampling_config",
    "sampling_copy",
]


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


def sampling_copy(model: Model, params: Params, recipe: str, platform: str) -> Params:
    """The copy of `params` that samples, quantized and laid out for `platform`; jittable.

    Args:
      model: structure; its dtype is that of what is not quantized.
      params: what the model computes with; adapters are merged in.
      recipe: a name in `quantize.RECIPES`.
      platform: "cpu", "gpu" or "tpu".
    """
    copy = quantize.quantize(lora_lib.merge(params), recipe, model.dtype, platform=platform)
    copy = quantize.prepare(copy, platform)
    if platform == "cpu":
        copy = model.fuse(copy)  # off the CPU a fused axis could not be split over `tensor`
    return copy if platform == "tpu" else model.unstack(copy)


@functools.partial(jax.jit, static_argnames=("policy", "mesh"))
def fill_in(policy: Policy, params: Params, prompts, prompt_mask, keys, mesh: Mesh | None):
    """`diffusion.rollout` of rows that are spread over the mesh, compiled."""
    args = prompts, prompt_mask, keys
    if mesh is not None:
        args = jax.lax.with_sharding_constraint(args, mesh_lib.batch_sharding(mesh))
    out = diffusion.rollout(policy.model, params, *args, policy.sampling)
    if mesh is not None:
        out = jax.lax.with_sharding_constraint(out, mesh_lib.replicated(mesh))
    return out


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
        self,
        params: Params,
        prompts: np.ndarray,
        prompt_mask: np.ndarray,
        keys: jax.Array,
        mesh: Mesh | None = None,
        between: Callable[[], object] = lambda: None,
    ) -> Rollout:
        """Samples completions, as many as there are keys; compiled parts run inside.

        See `autoregressive.rollout` for the arguments, and `diffusion.rollout`.

        Returns:
          `Rollout` on the host.
        """
        if self.sampling.diffusion is None:
            return autoregressive.rollout(
                self.model, params, prompts, prompt_mask, keys, self.sampling, mesh, between
            )
        repeats = len(keys) // len(prompts)
        rows = (np.repeat(x, repeats, axis=0) for x in (prompts, prompt_mask))
        return jax.device_get(fill_in(self, params, *rows, keys, mesh))

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
