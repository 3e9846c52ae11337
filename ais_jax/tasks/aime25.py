"""AIME 2025: the 30 problems of the American Invitational Mathematics Examination I and II.

Answers are whole numbers from 0 to 999. They are for evaluation; training problems come from a file
of such problems as `math` reads, and answers are judged as `math` judges them. The file of 2024 has
the same form.
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

generate = common.generate_from_file("task.aime25.path", read_training, key)
