"""Every completion of an evaluation, as lines of JSON that a later run goes on from."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ais_jax.errors import UserError
from ais_jax.train.metrics import write_json

SETTINGS = "eval.json"


@dataclasses.dataclass(frozen=True)
class Generation:
    """A completion of a problem and what it is worth.

    Attributes:
      index: of the problem, in the order of its file.
      sample: which completion of it, from 0.
      completion: text up to the end token.
      tokens: sampled, the end token included.
      truncated: it has not ended within the length.
      counts: (right, total) by measure.
      answer: what votes for it; None where it gives no answer.
      problem: key of the problem.
    """

    index: int
    sample: int
    completion: str
    tokens: int
    truncated: bool
    counts: Mapping[str, Sequence[int]]
    answer: str | None
    problem: str


def read(path: pathlib.Path) -> list[Generation]:
    """The generations in a file; none where there is no file.

    A last line that a killed run has not finished is removed from the file.

    Raises:
      UserError: another line is no generation, or the file cannot be read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        try:
            os.truncate(path, len(whole))
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
    names = [field.name for field in dataclasses.fields(Generation)]
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            found.append(_checked(Generation(*[row[name] for name in names])))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{path}, line {number} is no generation: correct it or remove the file, and its "
                "completions are sampled again"
            ) from None
    return found


def _checked(g: Generation) -> Generation:
    """Raises TypeError unless every field is what it should be."""
    texts = (g.completion, g.problem, g.answer or "")
    counts = [x for pair in g.counts.values() for x in pair]
    numbers = (g.index, g.sample, g.tokens, *counts)
    whole = all(type(x) is int and x >= 0 for x in numbers) and type(g.truncated) is bool
    if not (whole and all(isinstance(x, str) for x in texts) and counts):
        raise TypeError
    return g


def append(path: pathlib.Path, generations: Iterable[Generation]) -> None:
    """Adds lines to a file; they are on disk afterwards.

    Raises:
      UserError: it cannot be written.
    """
    lines = [json.dumps(dataclasses.asdict(generation)) + "\n" for generation in generations]
    try:
        with path.open("a", encoding="ascii") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; nothing is lost") from None


def open_folder(folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of an evaluation, or sees that the one in it was done with these settings.

    Raises:
      UserError: it was not, or the folder cannot be used.
    """
    path = folder / SETTINGS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        before = json.loads(path.read_bytes()) if path.exists() else None
        if before is None:
            write_json(path, dict(settings))
            return
    except OSError as error:
        raise UserError(f"--output {folder} cannot be used: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is damaged: take another --output") from None
    for name, value in settings.items():
        old = before.get(name) if isinstance(before, dict) else None
        if old != json.loads(json.dumps(value)):
            raise UserError(
                f"{folder} holds an evaluation with {name}={old}, not {value}: take another "
                "--output, or the same settings"
            )
