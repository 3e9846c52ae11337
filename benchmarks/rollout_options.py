"""What rollout.py is asked for, and how its parts say what they found."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured. Hashable.

    Attributes:
      platform: of the devices here, as jax calls it.
      recipes: the first one is what the others are compared with; "fp8+fp8_kv" is recipe fp8 with
        a cache in fp8_kv.
      rows: numbers of completions at a time.
      peer_rows: the same of part b.
      peers: (name, Python of its environment) of those who are compared with.
      configs: configuration files of jobs whose steps are taken apart.
      alone: only one process exists at a time.
      timeout: seconds that one run may take.
    """

    model: str
    platform: str
    dtype: str
    recipes: tuple[str, ...]
    rows: tuple[int, ...]
    peer_rows: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    peers: tuple[tuple[str, str], ...]
    configs: tuple[str, ...]
    alone: bool
    timeout: float

    @property
    def setting(self) -> str:
        """What every rollout of a table does."""
        return (
            f"Prompts of {self.prompt_tokens} tokens, {self.new_tokens} new ones at temperature 1, "
            "none ending early."
        )

    @property
    def memory(self) -> str:
        """What a peak of memory is."""
        if self.platform == "cpu":
            return "The peak is that of the process's resident memory while it sampled."
        return "The peak is that of the device's memory so far in the process."


def memory(answer: Mapping) -> float:
    """Peak of an answer, MiB: of the device if it has memory of its own."""
    return answer.get("peak_device_mib", answer["peak_rss_mib"])


def bar(text: str, value: float | None, least: float, *, most: bool = False) -> str:
    """A line that says whether a figure is reached; `most` if it is to stay below `least`."""
    asked = f"{'at most' if most else 'at least'} {least:g}"
    if value is None:
        return f"- {text}: asked {asked}, not measured"
    met = value <= least if most else value >= least
    return f"- {text}: asked {asked}, measured {value:.3g}: {'met' if met else '**not met**'}"
