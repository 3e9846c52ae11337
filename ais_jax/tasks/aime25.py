"""AIME 2025: the 30 problems of the American Invitational Mathematics Examination I and II.

Answers are whole numbers from 0 to 999. They are for evaluation; training problems come from a file
of such problems as `math` reads, and answers are judged as `math` judges them. The file of 2024 has
the same form.
"""

from __future__ import annotations

from collections.abc import Collection

from ais_jax.tasks import common, math
from ais_jax.tasks.math import (
    ALPHABET,
    careless,
    demonstration,
    extract,
    gold,
    key,
    load,
    prompt,
    reward,
    score,
)

Options = common.FileOptions

__all__ = [
    "ALPHABET",
    "Options",
    "careless",
    "demonstration",
    "extract",
    "generate",
    "gold",
    "key",
    "load",
    "prompt",
    "reward",
    "score",
]


def generate(
    count: int,
    seed: int,
    split: str = "train",
    options: Options = Options(),
    exclude: Collection[str] = (),
) -> list[dict]:
    """Problems of the file `task.aime25.path`, as `math.generate` takes those of its own."""
    return common.take_from_file(
        options.path, "task.aime25.path", math.read_training, count, seed, split, exclude, key
    )
