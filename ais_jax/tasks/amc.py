"""AMC: problems of the American Mathematics Competitions 12, whose answers are whole numbers.

Two sets go by this name: the 83 problems of 2022 and 2023 (AI-MO/aimo-validation-amc), and the 40
of 2023 alone (Qwen2.5-Math's amc23). Both are for evaluation; training problems come from a file of
such problems as `math` reads, and answers are judged as `math` judges them.
"""

from __future__ import annotations

from ais_jax.tasks import common
from ais_jax.tasks.math import (
    ALPHABET,
    careless,
    demonstration,
    extract,
    gold,
    key,
    load,
    prompt,
    read_training,
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

generate = common.generate_from_file("task.amc.path", read_training, key)
