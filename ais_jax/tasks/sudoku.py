"""Sudoku on a 4x4 grid of 2x2 blocks: every row, column and block holds 1 to 4 once.

Example: {"puzzle": "3102200002100320", "solution": "3142243142131324"}, rows from top to bottom, 0
for a blank. The interface is described in `ais_jax.tasks`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from ais_jax.tasks import common, files

ALPHABET = "01234:"
CELLS = 16
MAX_ANSWER_LENGTH = 200

_MOST_BLANKS = 12  # with fewer than four givens no 4x4 puzzle has a single solution
_PUZZLE = re.compile(r"[0-4]{16}")
_GRID = re.compile(r"[1-4]{16}")
_GRID_IN_TEXT = re.compile(r"(?<![0-9])[1-4]{16}(?![0-9])")
_FILE_LINE = (
    "Puzzle,Solution as 16 digits 0-4 and 16 digits 1-4 that agree (a spreadsheet drops leading "
    "zeros)"
)


@dataclasses.dataclass(frozen=True)
class Options:
    """Which puzzles are generated.

    Raises:
      ValueError: a value is out of range.
    """

    min_blanks: int = common.option(6, "fewest blank cells, at least 1")
    max_blanks: int = common.option(10, "most blank cells, at most 12")

    def __post_init__(self):
        if self.min_blanks < 1:
            raise ValueError(f"min_blanks={self.min_blanks} must be at least 1")
        if not self.min_blanks <= self.max_blanks <= _MOST_BLANKS:
            raise ValueError(
                f"max_blanks={self.max_blanks} must be from min_blanks={self.min_blanks} to "
                f"{_MOST_BLANKS}"
            )


@functools.cache
def _grids() -> np.ndarray:
    """[288, 16] int8, all solved grids in ascending order."""
    rows = itertools.permutations((1, 2, 3, 4))
    bands = [
        upper + lower
        for upper, lower in itertools.product(rows, repeat=2)
        if not set(upper[:2]) & set(lower[:2]) and not set(upper[2:]) & set(lower[2:])
    ]
    grids = [
        top + bottom
        for top, bottom in itertools.product(bands, repeat=2)
        if all(len({*top[c::4], *bottom[c::4]}) == 4 for c in range(4))
    ]
    return np.array(grids, np.int8)


@functools.cache
def _unique_givens() -> tuple[np.ndarray, np.ndarray]:
    """The 12 grids whose first row is 1234, and which givens determine each of them.

    Returns:
      [12, 16] int8, and [12, 65536] bool: bit i of the second index says that cell i is given.
      All other grids are these with the digits renamed.
    """
    grids = _grids()
    bases = grids[(grids[:, :4] == (1, 2, 3, 4)).all(axis=1)]
    agreement = (bases[:, None] == grids) @ (1 << np.arange(CELLS))
    ambiguous = np.zeros((len(bases), 2**CELLS), bool)
    for base, common_cells in zip(ambiguous, agreement, strict=True):
        base[common_cells[common_cells < 2**CELLS - 1]] = True
    for cell in range(CELLS):  # what leaves two grids possible still does with fewer givens
        pairs = ambiguous.reshape(len(bases), -1, 2, 2**cell)
        pairs[:, :, 0] |= pairs[:, :, 1]
    return bases, ~ambiguous


def solve(puzzle: str) -> str:
    """The single solution of a puzzle.

    Raises:
      ValueError: it is not 16 digits 0 to 4, or has no or several solutions.
    """
    if not _PUZZLE.fullmatch(puzzle):
        raise ValueError(f"puzzle {puzzle!r} must be 16 digits 0 to 4")
    cells = np.array(list(puzzle), np.int8)
    solutions = _grids()[((cells == 0) | (cells == _grids())).all(axis=1)]
    if len(solutions) != 1:
        raise ValueError(f"puzzle {puzzle!r} has {len(solutions)} solutions; exactly 1 is needed")
    return "".join(map(str, solutions[0].tolist()))


def generate(
    count: int,
    seed: int,
    split: str = "train",
    options: Options = Options(),
    exclude: Collection[str] = (),
) -> list[dict]:
    """Random puzzles with a single solution, all different, each as likely as any other.

    Args:
      count: how many.
      seed: same arguments, same examples, on every platform.
      split: "train" or "heldout"; they share no puzzle, whatever the other arguments, but they do
        share solutions: there are only 288.
      options: which puzzles.
      exclude: puzzles that must not appear, such as those of evaluation files.

    Raises:
      ValueError: fewer than `count` exist, or an argument is out of range.
    """
    bases, unique = _unique_givens()
    blanks = CELLS - np.bitwise_count(np.arange(2**CELLS, dtype=np.uint32)).astype(int)
    wanted = unique & (options.min_blanks <= blanks) & (blanks <= options.max_blanks)
    base, givens = np.nonzero(wanted)
    renamings = np.array(list(itertools.permutations((1, 2, 3, 4))), np.int8)

    def candidates(chunks: Iterable[np.ndarray]) -> Iterator[dict]:
        for indices in chunks:
            pair, renaming = np.divmod(indices, len(renamings))
            solutions = np.take_along_axis(renamings[renaming], bases[base[pair]] - 1, axis=1)
            given = givens[pair, None] >> np.arange(CELLS) & 1
            for puzzle, solution in zip(_text(solutions * given), _text(solutions), strict=True):
                yield {"puzzle": puzzle, "solution": solution}

    return common.take(
        candidates,
        size=len(base) * len(renamings),
        count=count,
        seed=seed,
        split=split,
        exclude=exclude,
        key=key,
        prompt=prompt,
        remedy="widen min_blanks to max_blanks",
    )


def _text(grids: np.ndarray) -> list[str]:
    """Rows of digits [n, 16] as strings."""
    digits = (grids + ord("0")).astype(np.uint8).tobytes().decode("ascii")
    return [digits[i : i + CELLS] for i in range(0, len(digits), CELLS)]


def key(example: dict) -> str:
    """The puzzle."""
    return example["puzzle"]


def prompt(example: dict, style: str = "compact") -> str:
    """The puzzle as text: "3102200002100320:" in compact style."""
    common.check_style(style)
    if style == "compact":
        return f"{example['puzzle']}:"
    return (
        f"Here is a 4x4 Sudoku, its four rows written one after the other: {example['puzzle']}. "
        "A 0 is a blank cell. Replace every 0 by a digit from 1 to 4 so that each row, each "
        "column and each of the four 2x2 blocks has all four digits. Think it through first. Then "
        "write the complete grid as 16 digits, in the same order, between <answer> and </answer>."
    )


def demonstration(example: dict) -> str:
    """The solution: the example's, or found if it has none.

    Raises:
      ValueError: the puzzle has no or several solutions.
    """
    return example["solution"] if "solution" in example else solve(example["puzzle"])


def careless(example: dict) -> str:
    """An answer that looks at rows alone: each row's missing digits, in rising order."""
    rows = (example["puzzle"][i : i + 4] for i in range(0, 16, 4))
    return "".join(_fill_row(row) for row in rows)


def _fill_row(row: str) -> str:
    missing = iter(digit for digit in "1234" if digit not in row)
    return "".join(next(missing) if cell == "0" else cell for cell in row)


def reward(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """The share of blank cells that are filled as in the solution.

    0 if the answer that `common.answer` finds, or the last grid of a sentence without a mark, is
    not 16 digits 1 to 4 (whitespace between them is ignored, 200 characters are read at most) or if
    it changes a given cell. Of a puzzle with several solutions, such as a quarter of those in d1's
    test file, the example's alone is right.

    Args:
      completions: B texts.
      examples: B puzzles; the solution is found where it is absent.

    Returns:
      [B] float32; for a puzzle without blanks 1 if it is repeated, else 0.

    Raises:
      ValueError: the lengths differ, or a puzzle without "solution" has no or several solutions.
    """
    common.check_batch(completions, examples)
    rewards = np.zeros(len(completions), np.float32)
    for i, (completion, example) in enumerate(zip(completions, examples, strict=True)):
        answer = _answer(completion)
        if _GRID.fullmatch(answer) and _extends(answer, example["puzzle"]):
            right, blanks = _matches(answer, example)
            rewards[i] = right / blanks if blanks else 1.0
    return rewards


def score(completions: Sequence[str], examples: Sequence[dict]) -> np.ndarray:
    """[B] float32, 1 where the whole puzzle is solved, else 0. Raises like `reward`."""
    return (reward(completions, examples) == 1).astype(np.float32)


def cells(completions: Sequence[str], examples: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """(blank cells filled as in the solution, blank cells), each [B] int.

    Answers are cut or padded to 16 characters and given cells are not compared. Raises like
    `reward`.
    """
    common.check_batch(completions, examples)
    counts = [
        right_cells(_answer(completion), example)
        for completion, example in zip(completions, examples, strict=True)
    ]
    right, blanks = zip(*counts, strict=True) if counts else ((), ())
    return np.array(right, int), np.array(blanks, int)


def cell_accuracy(completions: Sequence[str], examples: Sequence[dict]) -> float:
    """The share of blank cells filled as in the solution, pooled over all puzzles.

    The measure of the d1 evaluation (arXiv 2504.12216). 0 if there is no blank. Raises like
    `reward`.
    """
    right, blanks = cells(completions, examples)
    return int(right.sum()) / max(int(blanks.sum()), 1)


MEASURES = {"cell_accuracy": cell_accuracy}


def _answer(completion: object) -> str:
    text = common.answer(completion)
    grid = "".join(text.split()) if len(text) <= MAX_ANSWER_LENGTH else ""
    if _GRID.fullmatch(grid):
        return grid
    return common.prose_answer(completion, _GRID_IN_TEXT) or grid


def _extends(grid: str, puzzle: str) -> bool:
    """Whether the given cells of the puzzle are the grid's."""
    return all(given in ("0", cell) for given, cell in zip(puzzle, grid, strict=True))


def right_cells(answer: str, example: dict) -> tuple[int, int]:
    """(blank cells that are right, blank cells) of an answer that is cut or filled up with 0."""
    return _matches(answer[:CELLS].ljust(CELLS, "0"), example)


def _matches(answer: str, example: dict) -> tuple[int, int]:
    """(blank cells that are right, blank cells)."""
    cells = zip(example["puzzle"], answer, demonstration(example), strict=True)
    blanks = [(a, s) for given, a, s in cells if given == "0"]
    return sum(a == s for a, s in blanks), len(blanks)


def load(path: str | os.PathLike) -> list[dict]:
    """Puzzles of a file with the columns Puzzle and Solution, or with this module's own keys.

    CSV, or JSON lines or Parquet with texts: a number has lost the zeros it began with.

    Raises:
      UserError: the file cannot be read or a line is malformed.
    """
    return files.read_lines(path, _read_row, _FILE_LINE)


def _read_row(row: dict) -> dict:
    puzzle, solution = (row.get(name.title(), row.get(name)) for name in ("puzzle", "solution"))
    if not isinstance(puzzle, str) or not isinstance(solution, str):
        raise ValueError("no puzzle")
    if not _PUZZLE.fullmatch(puzzle) or not _GRID.fullmatch(solution):
        raise ValueError("not a puzzle and a grid")
    solved = (_grids() == np.array(list(solution), np.int8)).all(axis=1).any()
    if not solved or not _extends(solution, puzzle):
        raise ValueError("not the solution")
    return {"puzzle": puzzle, "solution": solution}
