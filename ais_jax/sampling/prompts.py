"""Between text and arrays: prompts, demonstrations and completions of a task."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ais_jax.errors import UserError
from ais_jax.models.tokenizers import Tokenizer, left_pad
from ais_jax.sampling.diffusion import check_prompt
from ais_jax.sampling.types import Rollout
from ais_jax.tasks import pose


def after_thinking(text: str, opened: bool) -> str:
    """What follows the last </think>: all of a text that does not think, "" if it never gets there.

    `opened` says that it thinks from its beginning; otherwise a <think> of its own does.
    """
    _, mark, answer = text.rpartition("</think>")
    if mark:
        return answer
    return "" if opened or "<think>" in text else text


@dataclasses.dataclass(frozen=True)
class Prompter:
    """A task's text as a model's tokens.

    Attributes:
      task: module of the task.
      tokenizer: the model's.
      max_prompt_tokens: P.
      max_new_tokens: T.
      style: how problems are put, one of `tasks.STYLES`.
      chat: whether the problem is a user's turn in the tokenizer's chat template.
      enable_thinking: argument of the template; None leaves it out.
      system: system message; None leaves it to the template.
      mask_id: id that no prompt may hold; of diffusion models, whose completions go on to their
        full length with end tokens.
    """

    task: ModuleType
    tokenizer: Tokenizer
    max_prompt_tokens: int
    max_new_tokens: int
    style: str = "compact"
    chat: bool = False
    enable_thinking: bool | None = None
    system: str | None = None
    mask_id: int | None = None

    def prompt_ids(self, example: dict) -> list[int]:
        """Ids of one prompt.

        Raises:
          UserError: they hold the mask token.
        """
        text, reply = pose(self.task, example, self.style)
        if self.chat:
            turns = [] if self.system is None else [{"role": "system", "content": self.system}]
            turns.append({"role": "user", "content": text})
            chat = self.tokenizer.chat  # type: ignore[attr-defined]
            ids = chat(turns, self.enable_thinking, reply)
        else:
            ids = self.tokenizer.encode(text + reply)
        check_prompt(ids, self.mask_id)
        return ids

    def fitting(self, examples: Sequence[dict]) -> Prompter:
        """The same with room for the longest prompt of `examples`."""
        longest = max(len(self.prompt_ids(example)) for example in examples)
        return dataclasses.replace(self, max_prompt_tokens=max(longest, self.max_prompt_tokens))

    def prompts(self, examples: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, P] int32, mask [B, P] bool), left-padded."""
        rows: list[list[int]] = []
        for i, example in enumerate(examples):  # a group's rows share one prompt
            again = i > 0 and example is examples[i - 1]
            rows.append(rows[-1] if again else self.prompt_ids(example))
        return left_pad(rows, self.max_prompt_tokens, self.tokenizer.pad_id)

    def demonstrations(self, examples: Sequence[dict], careless: Sequence[bool]) -> Rollout:
        """Prompts with completions, end token included: the task's own solution, or where
        `careless` is true an answer of the right form that does not try."""
        prompts, prompt_mask = self.prompts(examples)
        whole = self.mask_id is not None
        filler = self.tokenizer.eos_id if whole else self.tokenizer.pad_id
        tokens = np.full((len(examples), self.max_new_tokens), filler, np.int32)
        mask = np.full(tokens.shape, whole)
        for i, (example, lazy) in enumerate(zip(examples, careless, strict=True)):
            text = self.task.careless(example) if lazy else self.task.demonstration(example)
            ids = [*self.tokenizer.encode(text), self.tokenizer.eos_id]
            if len(ids) > self.max_new_tokens:
                raise UserError(
                    f"a demonstration of {len(ids)} tokens does not fit "
                    f"rollout.max_new_tokens={self.max_new_tokens}; raise it"
                )
            tokens[i, : len(ids)] = ids
            mask[i, : len(ids)] = True
        logps = np.zeros(tokens.shape, np.float32)
        return Rollout(prompts, prompt_mask, tokens, mask, logps, np.zeros(len(examples), bool))

    @functools.cached_property
    def thinks(self) -> bool:
        """Whether completions begin inside of a <think> that the template has opened."""
        if not self.chat:
            return False
        text = self.tokenizer.render([{"role": "user", "content": "?"}], self.enable_thinking)  # type: ignore[attr-defined]
        return "</think>" not in text.rpartition("<think>")[2] and "<think>" in text

    def answers(self, completions: Sequence[str]) -> list[str]:
        """What completions say after they have thought, see `after_thinking`."""
        return [after_thinking(text, self.opens_thought) for text in completions]

    @property
    def opens_thought(self) -> bool:
        """Whether a completion that says nothing of thinking has not got beyond it."""
        return self.thinks or self.enable_thinking is True

    def completions(self, rollout: Rollout) -> list[str]:
        """Text of each completion, up to its end token."""
        rows = zip(np.asarray(rollout.tokens), np.asarray(rollout.mask), strict=True)
        return [self.tokenizer.decode(tokens[mask]) for tokens, mask in rows]
