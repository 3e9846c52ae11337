"""What the tasks share: random order, the split, answers in completions, lines of files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ais_jax.errors import UserError

SPLITS = ("train", "heldout")
STYLES = ("compact", "instruct")
SPLIT_BUCKETS = 5

_EXHAUSTIVE = 5_000_000
_DRAWS_PER_EXAMPLE = 200
_FIRST_CHUNK, _LARGEST_CHUNK = 2**14, 2**19
_BOXED_REACH = 20_000
_BOXED = "\\boxed"


def option(default: Any, doc: str) -> Any:
    """A dataclass field with its line of help."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def check_option(name: str, value: Any, ok: bool, what: str) -> None:
    """Raises ValueError, naming the option and what it must be, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}={value!r} must be {what}")


def check_style(style: str) -> None:
    """Raises ValueError unless `style` is one of `STYLES`."""
    if style not in STYLES:
        raise ValueError(f"style={style!r} is unknown; choose one of {', '.join(STYLES)}")


def check_batch(completions: Sequence, examples: Sequence) -> None:
    """Raises ValueError unless there are as many completions as examples."""
    if len(completions) != len(examples):
        raise ValueError(
            f"{len(completions)} completions for {len(examples)} examples; they must pair up"
        )


def in_split(key: str, split: str) -> bool:
    """Whether a problem belongs to `split`: by a hash of its key, one in five is held out."""
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    heldout = int.from_bytes(digest, "little") % SPLIT_BUCKETS == 0
    return heldout == (split == "heldout")


def random_indices(size: int, count: int, seed: int) -> Iterator[np.ndarray]:
    """Chunks of int64 indices below `size` in random order, enough to find `count` examples.

    Each index once if there are few; otherwise independent draws, a limited number of them.
    """
    # Raw 64-bit outputs are the part of NumPy's random streams that never changes with versions.
    bits = np.random.PCG64(seed)
    chunk, start = _FIRST_CHUNK, 0
    order = _shuffled(size, bits) if _is_exhaustive(size) else None
    stop = size if order is not None else _EXHAUSTIVE + _DRAWS_PER_EXAMPLE * count
    while start < stop:
        n = min(chunk, stop - start)
        if order is not None:
            yield order[start : start + n]
        else:
            yield (bits.random_raw(n) % np.uint64(size)).astype(np.int64)
        start, chunk = start + n, min(2 * chunk, _LARGEST_CHUNK)


def _is_exhaustive(size: int) -> bool:
    return size <= _EXHAUSTIVE


def _shuffled(size: int, bits: np.random.PCG64) -> np.ndarray:
    return np.argsort(bits.random_raw(size), kind="stable")


def take(
    candidates: Callable[[Iterator[np.ndarray]], Iterable[dict]],
    size: int,
    count: int,
    seed: int,
    split: str,
    exclude: Collection[str],
    key: Callable[[dict], str],
    prompt: Callable[[dict], str],
    remedy: str,
) -> list[dict]:
    """The first `count` candidates with different prompts, of the split and not excluded.

    Args:
      candidates: from chunks of indices to examples, lazily.
      size: number of indices.
      remedy: what to change if there are too few.

    Raises:
      ValueError: there are fewer, or an argument is out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}")
    for name, value in (("count", count), ("seed", seed)):
        if value < 0:
            raise ValueError(f"{name}={value} must be at least 0")
    excluded = frozenset(exclude)
    taken: list[dict] = []
    seen: set[str] = set()
    for example in candidates(random_indices(size, count, seed)) if count else ():
        text, name = prompt(example), key(example)
        if text in seen or name in excluded or not in_split(name, split):
            continue
        seen.add(text)
        taken.append(example)
        if len(taken) == count:
            return taken
    if len(taken) < count:
        found = "exist" if _is_exhaustive(size) else "were found in a long random search"
        raise ValueError(
            f"count={count}: only {len(taken)} distinct {split} examples {found} with these "
            f"options; ask for fewer, or {remedy}"
        )
    return taken


def answer(completion: object) -> str:
    """The final answer in a completion, stripped; "" if it is not a string.

    The text after the last `<answer>`, up to `</answer>` if it was closed, or else the whole
    completion; of that, the last `\\boxed{...}` with balanced braces, if one starts within its
    last 20,000 characters.
    """
    if not isinstance(completion, str):
        return ""
    _, _, text = completion.rpartition("<answer>")
    text = text.partition("</answer>")[0] if len(text) < len(completion) else completion
    boxed = _last_boxed(text[-_BOXED_REACH:])
    return (text if boxed is None else boxed).strip()


def _last_boxed(text: str) -> str | None:
    """Content of the last balanced `\\boxed{...}`, in one pass from the end."""
    if _BOXED not in text:
        return None
    closing: list[int] = []
    for i in range(len(text) - 1, -1, -1):
        if text[i] == "}":
            closing.append(i)
        elif text[i] == "{" and closing:
            end = closing.pop()
            if text.endswith(_BOXED, 0, i):
                return text[i + 1 : end]
    return None


def read_text(path: str | os.PathLike, expected: str) -> str:
    """The text of a UTF-8 file.

    Raises:
      UserError: it cannot be read; `expected` says what it should hold.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {expected}") from None
    except ValueError:
        raise UserError(f"{path}: not UTF-8 text; expected {expected}") from None


def read_lines(
    path: str | os.PathLike, read_row: Callable[[dict], dict], expected: str
) -> list[dict]:
    """An example of each line of a JSON-lines file; blank lines are skipped.

    Args:
      read_row: from a line's object to an example; raises ValueError if it is none.
      expected: what a line should be, for errors.

    Raises:
      UserError: the file cannot be read, a line is malformed, or there is none.
    """
    examples = []
    for number, line in enumerate(read_text(path, f"lines such as {expected}").split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
                examples.append(read_row(row))
            except (ValueError, RecursionError):
                raise line_error(path, number, line, expected) from None
    if not examples:
        raise line_error(path, 1, "", expected)
    return examples


def line_error(path: str | os.PathLike, line: int, text: object, expected: str) -> UserError:
    """What is said about a malformed line."""
    shown = str(text)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return UserError(f"{path}, line {line}: {shown!r}; expected {expected}")
