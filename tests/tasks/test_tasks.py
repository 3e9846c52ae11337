"""What all tasks have in common."""

import dataclasses
import inspect
import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

from ais_jax import tasks
from ais_jax.errors import UserError
from ais_jax.tasks import common, d1

TEN_MEGABYTES = 10_000_000
MATHS = ("math", "amc", "aime25")
HOSTILE = [
    None,
    3,
    b"3*7-5",
    ["3*7-5"],
    float("nan"),
    "9**9**9",
    "٣+٧",
    "1/0",
    "\x00",
    "3*7-5\x00",
    "\ud800",
    "%s%n{0.__class__}",
    "__import__('os').system('true')",
    "(" * TEN_MEGABYTES,
    "3*7-5" + "\n+0" * 3_000_000,
    "<answer>" * 1_000_000,
    "<answer>" + "1" * TEN_MEGABYTES,
    "</answer>" * 1_000_000,
    "\\boxed{" * 1_000_000,
    "\\boxed{" + "}" * TEN_MEGABYTES,
    "\\boxed{" + "{" * TEN_MEGABYTES,
    "<answer>" + "((" * 90 + "3" + "))" * 90,
]


def one_of_each(name: str) -> dict:
    return {
        "countdown": {"numbers": [3, 7, 5], "target": 16},
        "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
        "arithmetic": {"problem": "7*8", "answer": 56},
        "gsm8k": {"question": "How many is 9 x 2?", "answer": "It is 9*2=18.\n#### 18"},
        **{x: {"problem": "What is $9\\times 2$?", "answer": "18"} for x in MATHS},
    }[name]


def options_of(name: str, folder):
    """Options with which 200 problems exist."""
    task = tasks.get_task(name)
    rows = {
        "gsm8k": lambda n: {"question": f"How many is {n} + 1?", "answer": f"#### {n + 1}"},
        **dict.fromkeys(MATHS, lambda n: {"problem": f"What is ${n}x+x$?", "answer": f"{n + 1}x"}),
    }
    if name not in rows:
        return task.Options()
    path = folder / "problems.jsonl"
    path.write_text("".join(json.dumps(rows[name](n)) + "\n" for n in range(400)))
    return task.Options(str(path))


@pytest.mark.smoke
def test_no_module_imports_jax():
    program = (
        "import pkgutil, sys, importlib, ais_jax.tasks as t\n"
        "for m in pkgutil.iter_modules(t.__path__, 'ais_jax.tasks.'):\n"
        "    importlib.import_module(m.name)\n"
        "print(' '.join(m.split('.')[0] for m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    loaded = set(done.stdout.split())
    assert "ais_jax" in loaded
    assert not loaded & {"jax", "jaxlib", "flax", "optax", "yaml", "transformers"}


def test_modules_by_name():
    assert tasks.TASKS == ("countdown", "sudoku", "arithmetic", "gsm8k", "math", "amc", "aime25")
    assert [tasks.name_of(tasks.get_task(name)) for name in tasks.TASKS] == list(tasks.TASKS)
    assert tasks.get_task("sudoku") is tasks.sudoku
    assert tasks.get_task("countdown") is tasks.countdown
    assert tasks.get_task("arithmetic") is tasks.arithmetic
    assert tasks.get_task("gsm8k") is tasks.gsm8k
    assert tasks.get_task("math") is tasks.math
    for wrong, nearest in (
        ("contdown", "countdown"),
        ("Sudoko", "sudoku"),
        ("count", "countdown"),
        ("arithmetics", "arithmetic"),
        ("gsm", "gsm8k"),
        ("maths", "math"),
    ):
        with pytest.raises(
            UserError,
            match=f"task '{wrong}' .*mean '{nearest}'.*countdown, sudoku, arithmetic, gsm8k, math",
        ):
            tasks.get_task(wrong)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_all_tasks_have_the_same_interface(name):
    task, model = tasks.get_task(name), tasks.get_task("countdown")
    for function in ("generate", "key", "prompt", "demonstration", "reward", "score", "load"):
        parameters = list(inspect.signature(getattr(task, function)).parameters)
        assert parameters == list(inspect.signature(getattr(model, function)).parameters)
    fields = dataclasses.fields(task.Options)
    assert fields and all(field.metadata["doc"] for field in fields)
    hash(task.Options())
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(task.Options(), fields[0].name, 1)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_demonstrations_are_rewarded(name, tmp_path):
    task = tasks.get_task(name)
    examples = task.generate(200, 0, options=options_of(name, tmp_path))
    completions = [task.demonstration(e) for e in examples]
    for judge in (task.reward, task.score):
        np.testing.assert_array_equal(judge(completions, examples), np.ones(200, np.float32))
        shifted = judge(completions[1:] + completions[:1], examples)
        assert shifted.mean() < 0.1
    assert json.dumps(examples)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_lengths_must_agree(name):
    task = tasks.get_task(name)
    judges = [task.reward, task.score] + ([task.cell_accuracy] if name == "sudoku" else [])
    for judge in judges:
        with pytest.raises(ValueError, match="2 completions for 1 examples"):
            judge(["", ""], [one_of_each(name)])


@pytest.mark.parametrize("name", tasks.TASKS)
@pytest.mark.parametrize("completion", HOSTILE, ids=lambda c: repr(c[:9] if c == str(c) else c))
def test_hostile_completions_score_nothing(name, completion):
    task = tasks.get_task(name)
    assert task.reward([completion], [one_of_each(name)]).tolist() == [0.0]
    assert task.score([completion], [one_of_each(name)]).tolist() == [0.0]


def test_one_in_five_is_held_out():
    keys = [str(i) for i in range(20_000)]
    heldout = [common.in_split(key, "heldout") for key in keys]
    assert [common.in_split(key, "train") for key in keys] == [not h for h in heldout]
    assert abs(sum(heldout) - 4000) < 5 * 56.6  # five standard deviations


@pytest.mark.parametrize("size", [1, 10, 50_000])
def test_small_spaces_are_visited_once(size):
    visited = np.concatenate(list(common.random_indices(size, 1, seed=0)))
    np.testing.assert_array_equal(np.sort(visited), np.arange(size))
    if size > 10:
        assert (visited != np.arange(size)).mean() > 0.99


def test_large_spaces_are_drawn_from_evenly():
    size = 2**40 + 15
    drawn = next(common.random_indices(size, 1, seed=0))
    assert drawn.dtype == np.int64 and drawn.min() >= 0 and drawn.max() < size
    counts = np.bincount(drawn * 8 // size, minlength=8)
    assert abs(counts - len(drawn) / 8).max() < 5 * np.sqrt(len(drawn) / 8)


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        (" a b\n", "a b"),
        ("x<answer> a </answer>y", "a"),
        ("<answer>a", "a"),
        ("<answer></answer>", ""),
        ("a</answer>", "a</answer>"),
        ("<answer>a</answer><answer>b</answer>c</answer>", "b"),
        ("\\boxed{a}", "a"),
        ("\\boxed{a{b}c}}", "a{b}c"),
        ("\\boxed{a}\\boxed{b", "a"),
        ("\\boxed{a}{b}", "a"),
        ("\\boxed{\\boxed{a}}", "a"),
        ("\\boxed", "\\boxed"),
        ("<answer>so \\boxed{a}.</answer>\\boxed{b}", "a"),
        ("\\boxed{a}" + "x" * 19_000, "a"),
        (None, ""),
        (b"a", ""),
    ],
)
def test_answers_in_completions(completion, want):
    assert common.answer(completion) == want


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        (" a ", None),
        ("<answer> a </answer>", "a"),
        ("<answer>a", "a"),
        ("<answer></answer>", ""),
        ("\\boxed{ a }", "a"),
        ("\\boxed{a}<answer>b</answer>", "a"),
        ("<answer>b</answer>\\boxed{a}", "a"),
        ("\\boxed{a}\\boxed{{b}}", "{b}"),
        ("<answer>b</answer>\\boxed{a", "b"),
        ("\\boxed{a}" + "x" * 20_000, None),
    ],
)
def test_marked_answers(completion, want):
    assert common.marked(completion) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("18", 18),
        (" +1,024.50 ", Fraction("1024.5")),
        ("-.5", Fraction("-0.5")),
        ("− 2.", -2),
        ("-3/4", Fraction(-3, 4)),
        ("1,000 / .5", 2000),
        ("-\\dfrac{ -1 }{3}", Fraction(1, 3)),
        ("\\frac{1}{3}", Fraction(1, 3)),
        *((text, None) for text in ("", ".", "-", "1 2", "1,2", "1,0000", "01,000", "1e3", "1_0")),
        *(
            (text, None)
            for text in ("1/0", "\\frac{1}{0}", "1/2/3", "2\\frac{1}{3}", "٣", "²", "½")
        ),
        *((text, None) for text in ("nan", "inf", "0x1", "1.2.3", "--1", "1/-2", "9" * 101)),
    ],
)
def test_numbers(text, want):
    assert common.number(text) == want


def test_printable_text():
    assert len(set(common.PRINTABLE)) == len(common.PRINTABLE) == 96
    assert common.printable(common.PRINTABLE) == common.PRINTABLE
    assert common.printable("‘a’ “b”—c\td\xa0é\r\n\x7f") == "'a' \"b\"-c d ??\n?"


def test_shared_files_are_found(tmp_path, monkeypatch):
    assert common.locate("hf:openai/gsm8k:main:test") == "hf:openai/gsm8k:main:test"
    (tmp_path / "here").mkdir()
    (tmp_path / "shared" / "folder").mkdir(parents=True)
    (tmp_path / "shared" / "a.txt").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("AIS_SHARED", raising=False)
    assert common.locate("a.txt").samefile(tmp_path / "shared" / "a.txt")
    monkeypatch.setenv("AIS_SHARED", str(tmp_path / "none"))
    assert common.locate("a.txt") is None
    monkeypatch.setenv("AIS_SHARED", str(tmp_path / "shared"))
    assert common.locate("folder") is None
    (tmp_path / "here" / "a.txt").touch()
    assert common.locate("a.txt").samefile(tmp_path / "here" / "a.txt")
    assert common.locate(str(tmp_path / "shared" / "a.txt")) == tmp_path / "shared" / "a.txt"


@pytest.mark.parametrize("name", tasks.TASKS)
def test_problems_are_posed_in_every_style(name):
    task, example = tasks.get_task(name), one_of_each(name)
    for style in common.STYLES:
        assert tasks.pose(task, example, style) == (task.prompt(example, style), "")
    for style in ("d1", "d1_eval"):
        if name in d1.TASKS:
            text, reply = tasks.pose(task, example, style)
            assert text == d1.prompt(name, example, evaluation=style == "d1_eval")
            assert reply == ("<reasoning>" if style == "d1_eval" else "")
        else:
            with pytest.raises(ValueError, match=f"style='{style}' is for gsm8k, .*not {name}"):
                tasks.pose(task, example, style)
    with pytest.raises(ValueError, match="style='d2' is unknown"):
        tasks.pose(task, example, "d2")
