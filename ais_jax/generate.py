"""Text from a prompt, by any model: what `ais-jax generate` shows."""

from __future__ import annotations

import dataclasses
import time

import jax
import numpy as np

from ais_jax import quantize
from ais_jax.errors import UserError
from ais_jax.models import Model, Params
from ais_jax.models.tokenizers import TextTokenizer, Tokenizer
from ais_jax.sampling import DiffusionConfig, Policy, SamplingConfig, sampling_config
from ais_jax.sampling.diffusion import check_prompt

_MOST, _HOTTEST = 1_000_000, 100


@dataclasses.dataclass(frozen=True)
class Options:
    """How to generate.

    Attributes:
      max_new_tokens: completions are cut at this length.
      temperature: 0 is greedy.
      recipe: quantization, a name in `quantize.RECIPES`.
      seed: of the noise.
      samples: completions of the prompt.
      diffusion: how a diffusion model fills a completion in; None takes blocks of 32, or one of
        the whole length if that is less, and commits one token a step.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    recipe: str = "none"
    seed: int = 0
    samples: int = 1
    diffusion: DiffusionConfig | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "samples"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"{name}={getattr(self, name)} must be from 1 to {_MOST}")
        if not 0 <= self.temperature <= _HOTTEST:
            raise UserError(f"temperature={self.temperature} must be from 0 to {_HOTTEST}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} must be from 0 to {2**31 - 1}")


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came out."""

    texts: list[str]
    tokens: int  # sampled, of all completions
    seconds: float  # compilation not included


def prompt_ids(
    tokenizer: Tokenizer, text: str, system: str | None, thinking: bool | None, raw: bool
) -> list[int]:
    """Ids of a prompt: a user's turn where the tokenizer has a chat template, unless `raw`.

    Raises:
      UserError: an option of the template is given, but there is none.
    """
    if not raw and isinstance(tokenizer, TextTokenizer) and tokenizer.has_chat_template:
        turns = [{"role": "system", "content": system}] if system else []
        return tokenizer.chat([*turns, {"role": "user", "content": text}], thinking)
    if system is not None or thinking is not None:
        raise UserError("--system and --thinking need a chat template, and are not for --raw")
    return tokenizer.encode(text)


def generate(
    model: Model, params: Params, tokenizer: Tokenizer, ids: list[int], options: Options
) -> Generated:
    """Completes a prompt.

    Args:
      model: structure.
      params: not quantized.
      tokenizer: the model's.
      ids: the prompt, not empty.
      options: how.

    Raises:
      UserError: the prompt is empty, or the options do not fit the model.
    """
    if not ids:
        raise UserError("the prompt is empty")
    check_prompt(ids, model.mask_id)
    sampling = _sampling(model, tokenizer, options)
    copy = jax.jit(lambda p: quantize.prepare(quantize.quantize(p, options.recipe, model.dtype)))(
        params
    )
    prompts = np.tile(np.array(ids, np.int32), (options.samples, 1))
    keys = jax.random.split(jax.random.key(options.seed), options.samples)
    args = (copy, prompts, np.ones(prompts.shape, bool), keys)
    compiled = jax.jit(Policy(model, sampling).rollout).lower(*args).compile()
    began = time.perf_counter()
    rollout = jax.block_until_ready(compiled(*args))
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    seconds = time.perf_counter() - began
    texts = [tokenizer.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]
    return Generated(texts, int(mask.sum()), seconds)


def _sampling(model: Model, tokenizer: Tokenizer, options: Options) -> SamplingConfig:
    """Raises UserError where the options do not fit the model."""
    if options.diffusion is not None and model.mask_id is None:
        raise UserError("--diffusion is for diffusion models, and this one is autoregressive")
    try:
        diffusion = options.diffusion or DiffusionConfig(min(32, options.max_new_tokens))
        return sampling_config(
            model,
            tokenizer,
            diffusion,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
