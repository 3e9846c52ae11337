"""Text from a prompt, by any model: what `ais-jax generate` shows."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import jax
import numpy as np

from ais_jax.errors import UserError
from ais_jax.models import Model, Params
from ais_jax.models.tokenizers import TextTokenizer, Tokenizer
from ais_jax.sampling import (
    DiffusionConfig,
    Policy,
    SamplingConfig,
    sampling_config,
    sampling_copy,
)
from ais_jax.sampling.diffusion import check_prompt
from ais_jax.sampling.types import check_truncation

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
      top_k: only the most probable `top_k` tokens are drawn; 0 keeps all.
      top_p: of those only the fewest that hold this much of their probability.
      min_p: of those only tokens at least `min_p` times as probable as the most probable one.
      diffusion: how a diffusion model fills a completion in; None takes blocks of 32, or one of
        the whole length if that is less, and commits one token a step.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    recipe: str = "none"
    seed: int = 0
    samples: int = 1
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    diffusion: DiffusionConfig | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "samples"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise UserError(f"{name}={getattr(self, name)} must be from 1 to {_MOST}")
        if not 0 <= self.temperature <= _HOTTEST:
            raise UserError(f"temperature={self.temperature} must be from 0 to {_HOTTEST}")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"seed={self.seed} must be from 0 to {2**31 - 1}")
        try:
            check_truncation(self.top_k, self.top_p, self.min_p)
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.temperature == 0 and (self.top_k, self.top_p, self.min_p) != (0, 1, 0):
            raise UserError(
                f"top_k={self.top_k}, top_p={self.top_p} and min_p={self.min_p} change nothing at "
                "temperature 0, which takes the most probable token: raise the temperature"
            )


@dataclasses.dataclass(frozen=True)
class Generated:
    """What came out."""

    texts: list[str]
    tokens: int  # sampled, of all completions
    seconds: float  # without compilation


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
    platform = jax.default_backend()
    copy = jax.jit(lambda p: sampling_copy(model, p, options.recipe, platform))(params)
    prompt = np.array([ids], np.int32)
    keys = jax.random.split(jax.random.key(options.seed), options.samples)
    with _compile_times() as compiling:
        began = time.perf_counter()
        rollout = Policy(model, sampling).rollout(copy, prompt, np.ones(prompt.shape, bool), keys)
        seconds = time.perf_counter() - began - sum(compiling)
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    texts = [tokenizer.decode(row[kept]) for row, kept in zip(tokens, mask, strict=True)]
    return Generated(texts, int(mask.sum()), seconds)


@contextlib.contextmanager
def _compile_times() -> Iterator[list[float]]:
    """A list to which the seconds of each compilation are added."""
    seconds: list[float] = []

    def listen(event: str, duration_secs: float, **_) -> None:
        if event.startswith("/jax/core/compile/") and "trace" not in event:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


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
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
