"""Problems row by row: of JSON lines, CSV and Parquet files, and of the Hugging Face hub."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ais_jax.errors import UserError

# Of training problems a file may lose this share to malformed rows.
TOLERANCE = 0.01
_NAMED = 5
_HUB = "hf:"
_DATASET = re.compile(r"hf:([^:\[]+)(?::([^:\[]+))?:([^:\[]+(?:\[[^\[]*\])?)")  # test, test[:100]

ReadRow = Callable[[dict], dict]


class Reading(NamedTuple):
    """What a file of training problems holds."""

    examples: list[dict]
    left_out: str | None  # how many malformed rows there are, and which; None if none


def read_lines(path: str | os.PathLike, read_row: ReadRow, expected: str) -> list[dict]:
    """An example of each row of a file, all of which must be well-formed.

    Args:
      path: a file of JSON lines, of which blank ones are skipped, or of CSV or Parquet, if its name
        ends in .csv or .parquet; or hf:NAME[:CONFIG]:SPLIT, a dataset of the Hugging Face hub.
      read_row: from a row to an example; raises ValueError if it is none.
      expected: what a row should be, for errors.

    Raises:
      UserError: the file cannot be read, a row is malformed, or there is none.
    """
    examples = []
    for _, found in _examples(path, read_row, expected):
        if isinstance(found, UserError):
            raise found
        examples.append(found)
    if not examples:
        raise line_error(path, 1, "", expected)
    return examples


def read_most(path: str | os.PathLike, read_row: ReadRow, expected: str) -> Reading:
    """An example of each well-formed row of a file; arguments as of `read_lines`.

    Raises:
      UserError: the file cannot be read, has no rows, or more than 1 % of them are malformed.
    """
    examples: list[dict] = []
    wrong: list[int] = []
    first = None
    for number, found in _examples(path, read_row, expected):
        if isinstance(found, UserError):
            wrong.append(number)
            first = first or found
        else:
            examples.append(found)
    rows = len(examples) + len(wrong)
    if not rows:
        raise line_error(path, 1, "", expected)
    if not wrong:
        return Reading(examples, None)
    named = ", ".join(map(str, wrong[:_NAMED])) + (", ..." if len(wrong) > _NAMED else "")
    text = (
        f"{len(wrong)} of {rows} lines of {path} are malformed (line {named}); the first: {first}"
    )
    if len(wrong) > TOLERANCE * rows:
        raise UserError(f"{text}; correct or remove them, {TOLERANCE:.0%} is tolerated")
    return Reading(examples, f"{text}; they are left out")


def _examples(
    path: str | os.PathLike, read_row: ReadRow, expected: str
) -> Iterator[tuple[int, dict | UserError]]:
    """(number, example, or what is wrong with the row) of each row."""
    rows = _reader(path)(path, expected)
    for number, raw in rows:
        try:
            row = json.loads(raw.decode()) if isinstance(raw, bytes) else raw
            if not isinstance(row, dict):
                raise ValueError("not an object")
            found: dict | UserError = read_row(row)
        except UnicodeDecodeError:
            found = UserError(f"{path}, line {number}: not UTF-8 text; expected {expected}")
        except (ValueError, RecursionError):
            text = raw.decode(errors="replace") if isinstance(raw, bytes) else raw
            found = line_error(path, number, text, expected)
        yield number, found


def _reader(path: str | os.PathLike) -> Callable[[Any, str], Iterator[tuple[int, Any]]]:
    if is_hub(path):
        return _hub
    return {".csv": _csv, ".parquet": _parquet}.get(pathlib.Path(path).suffix.lower(), _json_lines)


def is_hub(source: str | os.PathLike) -> bool:
    """Whether a source of problems is a dataset of the hub."""
    return isinstance(source, str) and source.startswith(_HUB)


def _hub(source: str, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values by column) of the rows of hf:NAME[:CONFIG]:SPLIT."""
    match = _DATASET.fullmatch(source)
    if match is None:
        raise UserError(f"{source} is no dataset: write hf:NAME:SPLIT or hf:NAME:CONFIG:SPLIT")
    name, config, split = match.groups()
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs datasets; pip install 'ais-jax[hub]'") from None
    try:
        rows = datasets.load_dataset(name, config, split=split)
        yield from enumerate((dict(row) for row in rows), 1)
    except Exception as error:  # of the network, of the hub, of a file there
        problem = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(
            f"{source} cannot be read: {problem}; correct it, or download a file and name that"
        ) from None


def _csv(path: str | os.PathLike, expected: str) -> Iterator[tuple[int, Any]]:
    """(number of the last line, texts by column) of the rows that are not blank."""
    text = read_text(path, f"a CSV file with {expected}")
    lines = csv.reader(io.StringIO(text, newline=""))
    most = csv.field_size_limit(len(text))  # of all readers: it is put back before any row is used
    try:
        found = [(lines.line_num, row) for row in lines if row]
    finally:
        csv.field_size_limit(most)
    (_, header), *rows = found or [(1, [])]
    if not rows:
        raise line_error(path, 1, ",".join(header), f"a header and rows with {expected}")
    for number, row in rows:
        yield number, dict(zip(header, row, strict=True)) if len(row) == len(header) else row


def _json_lines(path: str | os.PathLike, expected: str) -> Iterator[tuple[int, bytes]]:
    """(number, text) of the lines that are not blank."""
    data = _read_bytes(path, f"lines such as {expected}").removeprefix(b"\xef\xbb\xbf")
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            yield number, line


def _parquet(path: str | os.PathLike, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, values by column) of the rows."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(f"{path}: Parquet needs pyarrow; pip install 'ais-jax[parquet]'") from None
    numbers = itertools.count(1)
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    yield next(numbers), row
    except (OSError, pyarrow.ArrowException) as error:
        problem = str(error).split("\n")[0]
        raise UserError(f"{path}: {problem}; expected columns such as {expected}") from None


def read_text(path: str | os.PathLike, expected: str) -> str:
    """The text of a UTF-8 file.

    Raises:
      UserError: it cannot be read; `expected` says what it should hold.
    """
    try:
        return _read_bytes(path, expected).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text; expected {expected}") from None


def _read_bytes(path: str | os.PathLike, expected: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {expected}") from None


def text_of(row: dict, name: str) -> str:
    """The text of a field of a file's row.

    Raises:
      ValueError: it is absent, blank, no text, or not Unicode.
    """
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"no {name}")
    text.encode()
    return text


def line_error(path: str | os.PathLike, line: int, text: object, expected: str) -> UserError:
    """What is said about a malformed line."""
    shown = str(text)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return UserError(f"{path}, line {line}: {shown!r}; expected {expected}")
