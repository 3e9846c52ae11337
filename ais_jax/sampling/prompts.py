"""Between text and arrays: prompts, demonstrations and completions of a task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType

import numpy as np

from ais_jax.errors import UserError
from ais_jax.models.tokenizers import CharTokenizer, left_pad
from ais_jax.sampling.types import Rollout


@dataclasses.dataclass(frozen=True)
class Prompter:
    """A task's text as a model's tokens."""

    task: ModuleType
    tokenizer: CharTokenizer
    max_prompt_tokens: int
    max_new_tokens: int

    def fitting(self, examples: Sequence[dict]) -> Prompter:
        """The same with room for the longest prompt of `examples`."""
        longest = max(len(self.tokenizer.encode(self.task.prompt(e))) for e in examples)
        return dataclasses.replace(self, max_prompt_tokens=max(longest, self.max_prompt_tokens))

    def prompts(self, examples: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
        """(ids [B, P] int32, mask [B, P] bool), left-padded."""
        rows = [self.tokenizer.encode(self.task.prompt(example)) for example in examples]
        return left_pad(rows, self.max_prompt_tokens, self.tokenizer.pad_id)

    def demonstrations(self, examples: Sequence[dict], careless: Sequence[bool]) -> Rollout:
        """Prompts with completions, end token included: the task's own solution, or where
        `careless` is true an answer of the right form that does not try."""
        prompts, prompt_mask = self.prompts(examples)
        tokens = np.full((len(examples), self.max_new_tokens), self.tokenizer.pad_id, np.int32)
        mask = np.zeros(tokens.shape, bool)
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

    def completions(self, rollout: Rollout) -> list[str]:
        """Text of each completion, up to its end token."""
        return [self.tokenizer.decode(row) for row in np.asarray(rollout.tokens)]
