"""AMC: problems of the American Mathematics Competitions 12, whose answers are whole numbers.

Two sets go by this name: the 83 problems of 2022 and 2023 (AI-MO/aimo-validation-amc), and the 40
of 2023 alone (Qwen2.5-Math's amc23). Both are for evaluation; training problems come from a file of
such problems as `math` reads, and answers are judged as `math` judges them.
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
    """Problems of the file `task.amc.path`, as `math.generate` takes those of its own."""
    return common.take_from_file(
        options.path, "task.amc.path", math.read_training, count, seed, split, exclude, key
    )
