"""Tokenizers. A character tokenizer serves the tiny models that need no downloaded vocabulary."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np

from ais_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CharTokenizer:
    """One token a character: id 0 pads, id 1 ends a completion, then the alphabet in order."""

    alphabet: str
    pad_id: int = 0
    eos_id: int = 1

    @property
    def size(self) -> int:
        """Number of ids, specials included."""
        return len(self.alphabet) + 2

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without specials.

        Raises:
          UserError: a character is not in the alphabet.
        """
        ids = {char: i + 2 for i, char in enumerate(self.alphabet)}
        unknown = sorted(set(text) - set(ids))
        if unknown:
            raise UserError(
                f"the character tokenizer does not know {unknown[0]!r} in {text[:40]!r}; "
                f"its alphabet is {self.alphabet!r}"
            )
        return [ids[char] for char in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end token; padding is skipped."""
        chars = []
        for i in ids:
            if i == self.eos_id:
                break
            if i != self.pad_id:
                chars.append(self.alphabet[i - 2])
        return "".join(chars)


def left_pad(
    rows: Sequence[Sequence[int]], length: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(ids [B, length] int32, mask [B, length] bool), rows flush right.

    Raises:
      UserError: a row is longer than `length`.
    """
    ids = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        if len(row) > length:
            raise UserError(
                f"a prompt of {len(row)} tokens does not fit rollout.max_prompt_tokens={length}; "
                "raise it"
            )
        if row:
            ids[i, -len(row) :] = row
            mask[i, -len(row) :] = True
    return ids, mask
