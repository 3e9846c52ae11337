"""4x4 Sudoku: generated puzzles, judging of answers, and files, against a backtracking solver."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ais_jax.errors import UserError
from ais_jax.tasks import sudoku
from ais_jax.tasks.sudoku import Options

PUZZLE, SOLUTION = "3102200002100320", "3142243142131324"
EXAMPLE = {"puzzle": PUZZLE, "solution": SOLUTION}
BLANKS = [i for i in range(16) if PUZZLE[i] == "0"]


def solutions(puzzle: str) -> list[str]:
    """All solutions, by trying every digit in the first blank cell."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    row, column = divmod(cell, 4)
    seen = {
        puzzle[i]
        for i in range(16)
        if i // 4 == row or i % 4 == column or (i // 8, i % 4 // 2) == (row // 2, column // 2)
    }
    return [
        grid
        for digit in "1234"
        if digit not in seen
        for grid in solutions(puzzle[:cell] + digit + puzzle[cell + 1 :])
    ]


def reward_of(completion, example=EXAMPLE) -> float:
    return float(sudoku.reward([completion], [example])[0])


def changed(grid: str, *cells: int) -> str:
    """The grid with another digit in some cells."""
    digits = list(grid)
    for cell in cells:
        digits[cell] = str(int(digits[cell]) % 4 + 1)
    return "".join(digits)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("options", [Options(), Options(1, 1), Options(7, 12), Options(12, 12)])
def test_puzzles_have_one_solution(options, split):
    examples = sudoku.generate(300, seed=3, split=split, options=options)
    assert json.loads(json.dumps(examples)) == examples
    assert len({e["puzzle"] for e in examples}) == len(examples) == 300
    counts = [e["puzzle"].count("0") for e in examples]
    assert options.min_blanks <= min(counts) and max(counts) <= options.max_blanks
    for example in examples:
        assert solutions(example["puzzle"]) == [example["solution"]]


def test_every_puzzle_exists_once_and_is_in_one_split():
    """All puzzles of four givens: those that come from one grid only."""
    grids = np.array([list(map(int, grid)) for grid in solutions("0" * 16)], np.uint8)
    assert len(grids) == 288
    masks = np.zeros((1820, 16), np.uint8)
    for mask, cells in zip(masks, itertools.combinations(range(16), 4), strict=True):
        mask[list(cells)] = 1
    puzzles = (grids[:, None] * masks).reshape(-1, 16) @ (5 ** np.arange(16))
    values, counts = np.unique(puzzles, return_counts=True)
    expected = set(values[counts == 1].tolist())

    generated = []
    for split in ("train", "heldout"):
        with pytest.raises(ValueError, match=f"only \\d+ distinct {split} examples exist") as error:
            sudoku.generate(100_000, 0, split, Options(12, 12))
        exist = int(str(error.value).split("only ")[1].split()[0])
        generated += sudoku.generate(exist, 0, split, Options(12, 12))
    codes = [sum(int(d) * 5**i for i, d in enumerate(e["puzzle"])) for e in generated]
    assert len(codes) == len(expected) and set(codes) == expected


@pytest.mark.smoke
def test_same_seed_same_puzzles():
    assert sudoku.generate(1, 0) == [{"puzzle": "0001210302040410", "solution": "4321214312343412"}]
    assert sudoku.generate(1, 1, "heldout", Options(12, 12)) == [
        {"puzzle": "0030020000000043", "solution": "1432321443212143"}
    ]
    assert sudoku.generate(40, 3) == sudoku.generate(300, 3)[:40]
    assert sudoku.generate(40, 3) != sudoku.generate(40, 4)
    assert sudoku.generate(0, 3) == []


def test_puzzles_are_spread_evenly():
    """Every grid and every number of blanks in proportion to its puzzles."""
    examples = sudoku.generate(20_000, 0)
    assert len({e["solution"] for e in examples}) == 288
    first = [sum(e["solution"][0] == d for e in examples) for d in "1234"]
    assert max(abs(n - 5000) for n in first) < 5 * 61.2  # five standard deviations
    blank = np.mean([[c == "0" for c in e["puzzle"]] for e in examples], axis=0)
    # The symmetries of the grid move every corner to every corner, and so on for each orbit.
    for orbit in ([0, 3, 12, 15], [5, 6, 9, 10], [1, 2, 4, 7, 8, 11, 13, 14]):
        assert np.ptp(blank[orbit]) < 0.025


def test_splits_share_no_puzzle():
    puzzles = {
        split: {
            e["puzzle"] for s in (0, 1) for e in sudoku.generate(4000, s, split, Options(11, 12))
        }
        for split in ("train", "heldout")
    }
    assert not puzzles["train"] & puzzles["heldout"]


def test_excluded_puzzles_never_appear():
    first = sudoku.generate(300, 5)
    excluded = {sudoku.key(e) for e in first[::2]}
    second = sudoku.generate(300, 5, exclude=excluded)
    assert second[:150] == first[1::2]
    assert not excluded & {e["puzzle"] for e in second}


@pytest.mark.parametrize(
    ("field", "values"),
    [("min_blanks", (0, 5)), ("max_blanks", (6, 5)), ("max_blanks", (6, 13))],
)
def test_bad_options(field, values):
    with pytest.raises(ValueError, match=f"^{field}="):
        Options(*values)


def test_solver():
    assert sudoku.solve(PUZZLE) == SOLUTION
    for example in sudoku.generate(200, 9, options=Options(12, 12)):
        assert sudoku.solve(example["puzzle"]) == example["solution"]
    with pytest.raises(ValueError, match="288 solutions"):
        sudoku.solve("0" * 16)
    with pytest.raises(ValueError, match="0 solutions"):
        sudoku.solve("11" + "0" * 14)
    for text in ("", "5" + "0" * 15, "0" * 15, "٣" + "0" * 15):
        with pytest.raises(ValueError, match="16 digits"):
            sudoku.solve(text)


def test_text_of_a_puzzle():
    assert sudoku.prompt(EXAMPLE) == "3102200002100320:"
    assert sudoku.demonstration(EXAMPLE) == SOLUTION
    assert sudoku.demonstration({"puzzle": PUZZLE}) == SOLUTION
    assert sudoku.key(EXAMPLE) == PUZZLE
    assert set(sudoku.prompt(EXAMPLE) + SOLUTION) == set(sudoku.ALPHABET)
    instruct = sudoku.prompt(EXAMPLE, style="instruct")
    assert all(part in instruct for part in (PUZZLE, "<answer>", "</answer>", "2x2"))
    assert SOLUTION not in instruct
    with pytest.raises(ValueError, match="style='poem'"):
        sudoku.prompt(EXAMPLE, style="poem")


def test_reward_is_the_share_of_blanks_filled_rightly():
    for wrong in range(len(BLANKS) + 1):
        completion = changed(SOLUTION, *BLANKS[:wrong])
        want = np.float32((len(BLANKS) - wrong) / len(BLANKS))
        assert reward_of(completion) == want
        assert sudoku.score([completion], [EXAMPLE])[0] == (wrong == 0)
    assert reward_of(changed(SOLUTION, 0)) == 0
    assert sudoku.reward([SOLUTION] * 2, [EXAMPLE] * 2).dtype == np.float32


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("completion", "want"),
    [
        (SOLUTION, 1),
        (f" {SOLUTION}\n", 1),
        ("3142\n2431\n4213\n1324", 1),
        (" ".join(SOLUTION), 1),
        (f"so <answer>{SOLUTION}</answer>", 1),
        (f"so <answer>\n{SOLUTION}", 1),
        (f"<answer>1</answer> <answer>{SOLUTION}</answer>", 1),
        (f"<answer>{SOLUTION}</answer> <answer>1</answer>", 0),
        (f"\\boxed{{{SOLUTION}}}", 1),
        (f"the answer is {SOLUTION}", 1),
        (f"So:\n#### {SOLUTION}", 1),
        (f"the answer is {SOLUTION[:15]}", 0),
        (f"not {SOLUTION} but {SOLUTION[::-1]}", 0),
        (f"the answer is 0{SOLUTION}", 0),
        (SOLUTION[:15], 0),
        (SOLUTION + "1", 0),
        (SOLUTION[:15] + "5", 0),
        (SOLUTION[:15] + "0", 0),
        (SOLUTION[:15] + "４", 0),
        (SOLUTION[:15] + "٤", 0),
        (SOLUTION[:15] + "²", 0),
        (PUZZLE, 0),
        ("3142|2431|4213|1324", 0),
        (SOLUTION[0] + " " * 300 + SOLUTION[1:], 0),
        ("", 0),
    ],
)
def test_rewards(completion, want):
    assert reward_of(completion) == want
    assert reward_of(completion, {"puzzle": PUZZLE}) == want
    assert sudoku.score([completion], [EXAMPLE])[0] == want


def test_the_given_solution_counts():
    """Of a puzzle with several solutions, the one in the example."""
    example = {"puzzle": "0" * 16, "solution": SOLUTION}
    other = solutions("0" * 16)[0]
    matches = sum(a == b for a, b in zip(other, SOLUTION, strict=True))
    assert 0 < matches < 16
    assert reward_of(other, example) == np.float32(matches / 16)
    with pytest.raises(ValueError, match="288 solutions"):
        reward_of(other, {"puzzle": "0" * 16})


def test_a_puzzle_without_blanks():
    example = {"puzzle": SOLUTION, "solution": SOLUTION}
    assert reward_of(SOLUTION, example) == 1
    assert reward_of(changed(SOLUTION, 3), example) == 0
    assert sudoku.cell_accuracy([SOLUTION], [example]) == 0
    assert sudoku.cell_accuracy([], []) == 0


def test_cell_accuracy_is_pooled_over_cells():
    hard, easy = sudoku.generate(1, 0, options=Options(12, 12)) + sudoku.generate(
        1, 0, options=Options(1, 1)
    )
    nothing = "5" * 16
    assert sudoku.cell_accuracy([hard["solution"], nothing], [hard, easy]) == 12 / 13
    assert sudoku.cell_accuracy([nothing, easy["solution"]], [hard, easy]) == 1 / 13
    assert sudoku.reward([hard["solution"], nothing], [hard, easy]).mean() == 0.5
    right = sum(cell < 10 for cell in BLANKS)
    assert sudoku.cell_accuracy([SOLUTION[:10]], [EXAMPLE]) == right / len(BLANKS)
    assert sudoku.cell_accuracy([SOLUTION + "123"], [EXAMPLE]) == 1
    assert sudoku.cell_accuracy([changed(SOLUTION, 0)], [EXAMPLE]) == 1
    assert sudoku.cell_accuracy([None], [EXAMPLE]) == 0


@given(
    st.one_of(
        st.text(),
        st.text(alphabet="01234 \n", max_size=24),
        st.builds("<answer>{}".format, st.text(alphabet="1234", min_size=16, max_size=16)),
    )
)
@settings(deadline=None, max_examples=500)
def test_any_text_is_judged(completion):
    reward, score = reward_of(completion), sudoku.score([completion], [EXAMPLE])[0]
    assert 0 <= reward <= 1
    assert score == (reward == 1)
    assert 0 <= sudoku.cell_accuracy([completion], [EXAMPLE]) <= 1


@pytest.mark.parametrize(
    ("name", "count", "with_one_solution"),
    [("4x4_test_sudoku.csv", 500, 376), ("spg_test_sudoku_split_new.csv", 256, 256)],
)
def test_real_puzzles(shared_file, name, count, with_one_solution):
    path = shared_file(f"data/sudoku/{name}")
    examples = sudoku.load(path)
    rows = [line.split(",") for line in path.read_text(encoding="utf-8").split()][1:]
    assert [[e["puzzle"], e["solution"]] for e in examples] == rows
    assert len(examples) == count
    assert any(e["puzzle"].startswith("0") for e in examples)
    completions = [e["solution"] for e in examples]
    assert (sudoku.reward(completions, examples) == 1).all()
    assert (sudoku.score(completions, examples) == 1).all()
    assert sudoku.cell_accuracy(completions, examples) == 1
    solved = [solutions(e["puzzle"]) for e in examples]
    single = [{"puzzle": e["puzzle"]} for e, s in zip(examples, solved, strict=True) if len(s) == 1]
    assert len(single) == with_one_solution
    completions = [s[0] for s in solved if len(s) == 1]
    assert (sudoku.reward(completions, single) == 1).all()
    one_wrong = [changed(e["solution"], e["puzzle"].index("0")) for e in examples]
    want = [(n - 1) / n for n in (e["puzzle"].count("0") for e in examples)]
    np.testing.assert_array_equal(sudoku.reward(one_wrong, examples), np.float32(want))
    assert not sudoku.score(one_wrong, examples).any()
    excluded = {sudoku.key(e) for e in examples}
    generated = sudoku.generate(2000, 0, options=Options(8, 8), exclude=excluded)
    assert not excluded & {e["puzzle"] for e in generated}


@pytest.mark.parametrize(
    "line",
    [
        "310220000210032,3142243142131324",
        "3102200002100320,314224314213132",
        "3102200002100320",
        "3102200002100320,3142243142131324,1",
        "3102200002100325,3142243142131324",
        "3102200002100320,3142243142131320",
        f"{PUZZLE},{changed(SOLUTION, 2)}",
        "1102200002100320,3142243142131324",
        "٣102200002100320,3142243142131324",
        "x,y",
        '"' + "1" * 200_000 + '"',
    ],
    ids=range(11),
)
def test_malformed_lines(tmp_path, line):
    path = tmp_path / "puzzles.csv"
    text = f"Puzzle,Solution\n{PUZZLE},{SOLUTION}\n\n{line}\n"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"puzzles\.csv, line 4: .*expected Puzzle,Sol") as error:
        sudoku.load(path)
    assert len(str(error.value)) < 300 + len(str(path)) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: No such file .*expected a CSV file"):
        sudoku.load(tmp_path / "none.csv")
    path = tmp_path / "puzzles.csv"
    for text, message in (
        ("", "line 1: ''; expected a header and rows with Puzzle,Solution"),
        (f"{PUZZLE},{SOLUTION}\n", f"line 1: '{PUZZLE},{SOLUTION}'; expected a header and rows"),
        (f"task,grid\n{PUZZLE},{SOLUTION}\n", "line 2: .*'task': .*expected Puzzle,Solution"),
        (f"{PUZZLE},{SOLUTION}\n" * 2, "line 2: .*expected Puzzle,Solution"),
        ("Puzzle,Solution\n", "line 1: 'Puzzle,Solution'; expected a header and rows"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=message):
            sudoku.load(path)
    path.write_bytes(f"\ufeffPuzzle,Solution\r\n{PUZZLE},{SOLUTION}\r\n".encode())
    assert sudoku.load(path) == [EXAMPLE]


def test_other_kinds_of_files(tmp_path):
    path = tmp_path / "puzzles.CSV"
    example = {"puzzle": "0001210302040410", "solution": "4321214312343412"}
    path.write_text(f"level,puzzle,solution\n1,{example['puzzle']},{example['solution']}\n")
    assert sudoku.load(path) == [example]  # zeros that lead are kept
    path = tmp_path / "puzzles.jsonl"
    path.write_text(json.dumps({"Puzzle": PUZZLE, "Solution": SOLUTION}) + "\n")
    assert sudoku.load(path) == [EXAMPLE]
    path.write_text('{"puzzle": 1210302040410, "solution": 4321214312343412}\n')
    with pytest.raises(UserError, match=r"line 1: .*a spreadsheet drops leading zeros"):
        sudoku.load(path)


def test_the_careless_answer_fills_rows_and_keeps_what_is_given():
    examples = sudoku.generate(200, seed=5)
    answers = [sudoku.careless(example) for example in examples]
    for text, example in zip(answers, examples, strict=True):
        assert all(g in ("0", a) for g, a in zip(example["puzzle"], text, strict=True))
        assert all(sorted(text[i : i + 4]) == list("1234") for i in range(0, 16, 4))
    assert sudoku.score(answers, examples).mean() < 0.3
    assert 0.2 < sudoku.reward(answers, examples).mean() < 0.9
