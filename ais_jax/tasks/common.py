"""What the tasks share: random order, the split, files, numbers, answers in completions."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import pathlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ais_jax.errors import UserError
from ais_jax.tasks.files import Reading, is_hub

SPLITS = ("train", "heldout")
STYLES = ("compact", "instruct")
SPLIT_BUCKETS = 5

_EXHAUSTIVE = 5_000_000
_DRAWS_PER_EXAMPLE = 200
_FIRST_CHUNK, _LARGEST_CHUNK = 2**14, 2**19
_BOXED_REACH = 20_000
_PROSE = 1000
_WORDS = re.compile("[A-Za-z]{2}")
_BOXED = "\\boxed"
_log = logging.getLogger(__name__)

PRINTABLE = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
_TYPOGRAPHY = str.maketrans(dict(zip("‘’“”–—−\t\xa0\u2009\u202f", "''\"\"---    ", strict=True)))
BOXED_INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_UNPRINTABLE = re.compile(r"[^\n -~]")

_LONGEST_NUMBER = 100
_DIGIT = re.compile(r"\d")
_PLAIN = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_NUMBER = re.compile(
    rf"([-+]?) *(?:({_PLAIN})(?: */ *({_PLAIN}))?"
    rf"|\\[dt]?frac *\{{ *(-?{_PLAIN}) *\}} *\{{ *({_PLAIN}) *\}})"
)


def option(default: Any, doc: str) -> Any:
    """A dataclass field with its line of help."""
    return dataclasses.field(default=default, metadata={"doc": doc})


@dataclasses.dataclass(frozen=True)
class FileOptions:
    """Where training problems come from, of a task that does not generate them."""

    path: str | None = option(
        None,
        "file of training problems (JSON lines, CSV, Parquet), as it stands or under $AIS_SHARED, "
        "or hf:NAME[:CONFIG]:SPLIT of the Hugging Face hub",
    )


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


def judge(
    completions: Sequence, examples: Sequence[dict], is_right: Callable[[Any, dict], bool]
) -> np.ndarray:
    """[B] float32, 1 where a completion is right for its example, else 0.

    Raises:
      ValueError: the lengths differ.
    """
    check_batch(completions, examples)
    pairs = zip(completions, examples, strict=True)
    return np.array([is_right(*pair) for pair in pairs], np.float32)


def last_number_word(text: str, word: re.Pattern, cut: bool) -> tuple[str, str] | None:
    """(what stands before it, the last `word` of `text` that has a digit); None if none has.

    `cut` says that `text` was cut off on the left: a word at its start may go on before, and then
    there is None too.
    """
    words = [match for match in word.finditer(text) if _DIGIT.search(match[0])]
    if not words or (words[-1].start() == 0 and cut):
        return None
    return text[: words[-1].start()], words[-1][0]


def boxed_prompt(problem: str, style: str) -> str:
    """The problem, and a newline in compact style, or what to do in instruct style.

    Compact prompts keep to `PRINTABLE`, see `printable`; instruct prompts change nothing.
    """
    check_style(style)
    return printable(f"{problem}\n") if style == "compact" else f"{problem}\n{BOXED_INSTRUCTION}"


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


def generate_from_file(setting: str, read: Callable[[Any], Reading], key: Callable[[dict], str]):
    """`generate` of a task whose training problems are read.

    Args:
      setting: the key of the configuration that names the file, for errors.
      read: reads it.
      key: of a problem.
    """

    def generate(
        count: int,
        seed: int,
        split: str = "train",
        options: FileOptions = FileOptions(),
        exclude: Collection[str] = (),
    ) -> list[dict]:
        """Problems of the file in random order, all different.

        Args:
          count: how many.
          seed: same arguments and file, same examples, on every platform.
          split: "train" or "heldout", about one problem in five; they share no `key`.
          options: which file or dataset, looked up by `common.locate`.
          exclude: keys that must not appear, such as those of evaluation files.

        Raises:
          UserError: the file is not named, absent or malformed.
          ValueError: it has fewer than `count`, or an argument is out of range.
        """
        rows, left_out = read(_located(options.path, setting))
        if left_out and split == "train":  # the same file is read again for the held-out ones
            _log.warning(left_out)
        return take(
            lambda chunks: (rows[i] for indices in chunks for i in indices),
            size=len(rows),
            count=count,
            seed=seed,
            split=split,
            exclude=exclude,
            key=key,
            prompt=key,
            remedy=f"name a longer file in {setting}",
        )

    return generate


def _located(name: str | None, setting: str) -> str | pathlib.Path:
    if name is None:
        raise UserError(f"{setting} is null; name a file of training problems there")
    path = locate(name)
    if path is None:
        raise UserError(
            f"{setting}={name!r} is no file, neither as it stands nor in {_shared()}; correct it, "
            "or set AIS_SHARED to the folder that holds it"
        )
    return path


def locate(name: str) -> str | pathlib.Path | None:
    """A data file, as it stands or under $AIS_SHARED (default ../shared); None where absent.

    A dataset of the Hugging Face hub, hf:NAME[:CONFIG]:SPLIT, stays what it is.
    """
    if is_hub(name):
        return name
    for path in (pathlib.Path(name), _shared() / name):
        if path.is_file():
            return path
    return None


def _shared() -> pathlib.Path:
    return pathlib.Path(os.environ.get("AIS_SHARED", "../shared"))


def printable(text: str) -> str:
    """`text` in the characters of `PRINTABLE`.

    Quotes, dashes and spaces become their ASCII forms, any other character becomes "?".
    """
    return _UNPRINTABLE.sub("?", text.translate(_TYPOGRAPHY))


def number(text: str) -> Fraction | None:
    """The number that the whole of `text` writes, exactly; None if it is none.

    A decimal, with commas between thousands or without, or a quotient of two: 1,024.50, -.5, 1/3,
    \\frac{1}{3}. Digits are 0 to 9, exponents are not read, 100 characters are the most.
    """
    text = text.strip()
    match = len(text) <= _LONGEST_NUMBER and _NUMBER.fullmatch(text.translate(_TYPOGRAPHY))
    if not match:
        return None
    top, bottom = (match[2], match[3]) if match[2] else (match[4], match[5])
    numerator, denominator = _decimal(top), _decimal(bottom or "1")
    if denominator == 0:
        return None
    return (-1 if match[1] == "-" else 1) * numerator / denominator


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip("."))


def answer(completion: object) -> str:
    """The final answer in a completion, stripped; "" if it is not a string.

    The text after the last `<answer>`, up to `</answer>` if it was closed, or else the whole
    completion; of that, the last `\\boxed{...}` with balanced braces, if one starts within its
    last 20,000 characters; without either, the line after the last ####.
    """
    if not isinstance(completion, str):
        return ""
    tagged = _last_tagged(completion)
    text = completion if tagged is None else tagged
    boxed = last_boxed(text)
    if tagged is None and boxed is None:
        text = (hashed(text) or (text, False))[0]
    return (text if boxed is None else boxed).strip()


def hashed(text: str) -> tuple[str, bool] | None:
    """(the line after the last ####, whether further lines follow); None without ####.

    In Markdown the same mark begins a heading.
    """
    _, mark, after = text.rpartition("####")
    line, more, _ = after.strip().partition("\n")
    return (line.strip(), bool(more)) if mark else None


def prose_answer(completion: object, pattern: re.Pattern) -> str | None:
    """The last match of `pattern` in the last 1000 characters of a sentence; None if there is none.

    A sentence has a word of two letters: what character models write is read as it stands. Where an
    answer is marked, nothing else is one.
    """
    if not isinstance(completion, str) or answer(completion) != completion.strip():
        return None
    text = completion[-_PROSE:]
    found = [match[0] for match in pattern.finditer(text)] if _WORDS.search(text) else []
    return found[-1] if found else None


def marked(completion: str) -> str | None:
    """The answer that a completion marks as such, stripped; None if it marks none.

    What `last_boxed` finds, or else the text after the last `<answer>`, up to `</answer>` if it was
    closed.
    """
    boxed = last_boxed(completion)
    text = _last_tagged(completion) if boxed is None else boxed
    return None if text is None else text.strip()


def first_number_boxed(text: str) -> str:
    """The first run of digits in `text`, or 0, as `\\boxed{...}`."""
    match = re.search("[0-9]+", text)
    return f"\\boxed{{{match[0] if match else 0}}}"


def _last_tagged(text: str) -> str | None:
    _, tag, text = text.rpartition("<answer>")
    return text.partition("</answer>")[0] if tag else None


def last_boxed(text: str) -> str | None:
    """Content of the last `\\boxed{...}` with balanced braces that starts in the last 20,000
    characters; None if there is none. One pass from the end.
    """
    text = text[-_BOXED_REACH:]
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
