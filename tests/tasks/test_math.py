"""MATH: which answers are the same, and problems from files."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ais_jax.errors import UserError
from ais_jax.tasks import math as task
from ais_jax.tasks.math import Options

EXAMPLE = {"problem": "What is $x$ if $2x=36$?", "answer": "18"}
FILES = {"math/math500_test.jsonl": 500, "math/math_train_4500.jsonl": 4500}


def reward_of(completion, answer: str = "18") -> float:
    return float(task.reward([completion], [{"problem": "?", "answer": answer}])[0])


def made_up(count: int) -> list[dict]:
    return [{"problem": f"What is\n${n}^2 x$?", "answer": f"{n * n}x"} for n in range(count)]


@pytest.fixture
def options(tmp_path) -> Options:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in made_up(400)), encoding="utf-8")
    return Options(str(path))


SAME = [
    ("18", "18", "18.", "18.0", "018", " 18 ", "+18", "$18$", "\\$18", "18\\%", "18^\\circ", "18°",
          "18^{\\circ}", "x=18", "x = 18", "f(x) = 18", "\\text{18}", "18 \\text{ cm}",
     "18\\text{ cm}^2", "18 \\text{ m}^{3}.",
     "18\\mbox{ ways.}", "18\\,\\mathrm{km}", "36/2", "\\frac{36}{2}", "\\!18"),
    ("1,024", "1024", "1{,}024", "1,\\!024", "1\\,024", "\\$1,024.00", "1,024\\text{ dollars}"),
    ("11,\\! 111,\\! 100", "11111100"),
    ("0.5", ".5", ".50", "\\frac12", "\\frac{1}{2}", "\\dfrac{1}{2}", "\\tfrac 12", "\\frac 1{2}",
     "\\frac{1}2", "1/2", "\\frac{2}{4}", "\\frac{ 1 }{ 2 }", "x=\\frac12", "\\frac{.5}{1}"),
    ("-\\frac{1}{3}", "\\frac{-1}{3}", "-1/3", "- \\frac13", "−1/3"),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\frac{\\pi}{2})", "(3, \\dfrac \\pi {2} )"),
    ("2\\sqrt{5}", "2 \\sqrt5", "2\\sqrt 5", "x = 2\\sqrt{5}", "$2\\sqrt{5}$."),
    ("x^{2}+1", "x^2 + 1", "x^2\\;+\\;1", "y=x^2+1", "x^2~+\n1"),
    ("52_8", "52_{8}"),
    ("\\text{east}", "east", "\\textbf{east}", "\\text{ east }", "\\mathrm{east}."),
    ("\\text{(C)}", "C", "(C)", "\\text{C}", "(\\text{C})", "\\textbf{(C)}"),
    ("y = 2x", "2x", "y=2x", "f(x) = 2x"),
    ("1,-2", "1, -2", "1,\\ -2", "1.0,-2.00"),
    ("19 \\text{ and }43", "19\\text{ and }43", "19 and 43"),
    ("\\begin{pmatrix} -1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}-1\\\\2\\end{pmatrix}",
     "\\begin{pmatrix} -1 \\\\2 \\end{pmatrix}"),
    ("\\{1,2\\}", "\\left\\{ 1, 2 \\right\\}"),
]  # fmt: skip
DIFFERENT = [
    ("18", "19"), ("18", "-18"), ("18", "1 8"), ("18", "1.8"), ("18", "1,8"), ("18", "18x"),
    ("18", "180"), ("18", "18,000"), ("18", ""), ("18", "\\text{}"), ("18", "x="), ("18", "18/0"),
    ("18", "١٨"), ("18", "１８"), ("18", "18²"), ("18", "18e0"), ("18", "1.8e1"),
    ("18", "17 \\text{ or } 18"), ("18", "18^2"),
    ("10", "10_2"), ("10", "10_{5}"), ("2", "x=3=2"), ("4", "[4,4]"), ("2", "1  1"), ("11", "1 1"),
    ("5", ".5"), ("0.5", "5"), ("0.25", "0.2"), ("0.3", "\\frac13"), ("0.333", "1/3"),
    ("12", "1 2"), ("1\\frac12", "\\frac{11}{2}"), ("1 1/2", "11/2"), ("\\frac12", "\\frac21"),
    ("1200", "1, 200"), ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"),
    ("(2,100)", "(2100)"), ("x^2", "x2"), ("2x", "x^2"),
    ("\\text{east}", "west"), ("\\pi", "3.14"), ("\\infty", "-\\infty"), ("2,3", "23"),
    ("\\sqrt{2}", "2"), ("\\sqrt{12}", "\\sqrt{1}2"),
    ("1e999999999", "1e99999999"), ("18", "9" * 200), ("18", "18" + " \\text{}" * 400),
]  # fmt: skip
# What math-verify takes for the same beyond that.
VERIFIED = [
    ("2+x", "x+2"), ("18", "9*2"), ("\\frac12", "50\\%"), ("50", "50\\%"),
    ("3\\sqrt{13}", "\\sqrt{117}"),
    ("(1,2)", "1,2"), ("1,2,3", "3,2,1"), ("\\frac34", "\\frac{6}{8}"), ("x^2-1", "(x-1)(x+1)"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "written"), VERIFIED, ids=range(len(VERIFIED)))
def test_math_verify_is_asked_where_texts_differ(right, written):
    assert reward_of(f"\\boxed{{{written}}}", right) == 1
    assert reward_of(f"<answer>{written}</answer>", right) == 1


@pytest.mark.parametrize("forms", SAME, ids=range(len(SAME)))
def test_forms_of_one_answer(forms):
    for right in forms:
        for written in forms:
            assert reward_of(f"so \\boxed{{{written}}}", right) == 1, (written, right)
        for other, *_ in SAME:
            assert reward_of(f"so \\boxed{{{other}}}", right) == (other == forms[0]), (other, right)


@pytest.mark.parametrize(("right", "written"), DIFFERENT, ids=range(len(DIFFERENT)))
def test_different_answers(right, written):
    assert reward_of(f"\\boxed{{{right}}}", right) == 1
    assert reward_of(f"\\boxed{{{written}}}", right) == 0


RIGHT = [
    "\\boxed{18}", "\\boxed{18} or 19", "\\boxed{17}, no: \\boxed{18}", "\\boxed{18} \\boxed{17",
    "\\boxed{18}" + "x" * 19_000, "<answer>18</answer>", "<answer> $18$ </answer> 19",
    "<answer>17</answer><answer>18", "<answer>17</answer> \\boxed{18}",
    "\\boxed{18} <answer>17</answer>", "\\boxed{\\boxed{18}}", "\\boxed{18}\ud800",
]  # fmt: skip
PROSE = [
    "18", "#### 18", "x=18", "\\boxed{18", "It is $18$.", "17 or 18", "#### 18\n5 more",
    "#### Step 3\nSo it is 18.", "#### x^2\nis 18",
]  # fmt: skip
WRONG = [
    "It is $\\sqrt{18}$", "x^18", "2^{18}", "10_{18}", "\\sqrt[3]{18}", "#### Step 18\nso 17",
    "\\boxed18", "", "17", "#### 17", "#### 17 18", "18 or 17", "\\boxed", "\\boxed{", "\\boxed{}",
    "\\boxed{17} 18", "\\boxed{18}\\boxed{17}", "\\boxed{} 18", "<answer></answer>18",
    "<answer>It is 18</answer>", "\\boxed{nan}", "\\boxed{NaN}", "\\boxed{1e999999999}",
    "\\boxed{9**9**9}", "\\boxed{18}" + "x" * 20_000, "\\boxed{18 " + "x" * 1_000_000 + "}",
    "\\boxed{" * 100_000 + "17" + "}" * 100_000, "\\boxed{" + "{" * 5_000 + "18" + "}" * 5_001,
    "\\boxed{" + "\\text{" * 160 + "18" + "}" * 161, "\\boxed{" + "\\frac{" * 140 + "1" + "}" * 141,
    "\\boxed{" + "1,000" * 190 + "}", "\\boxed{" + " " * 990 + "1}", "\\boxed{" + "9" * 990 + "}",
    "\\boxed{" + "1" * 90 + "/" + "1" * 900 + "}", "\\boxed{__import__('os')}", None, 18,
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("completion", "want"),
    [(c, 1) for c in RIGHT + PROSE] + [(c, 0) for c in WRONG],
    ids=range(len(RIGHT + PROSE + WRONG)),
)
def test_rewards(completion, want):
    assert reward_of(completion) == want
    assert task.score([completion], [EXAMPLE]).tolist() == [want]


PIECES = ["\\frac", "\\text", "\\left(", "{", "}", " ", "1", "2", ",", ".", "/", "^", "=", "x", "-",
          "\\circ", "$", "\\\\", "\\!", "\\,", "٣", "\\boxed{"]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_text_is_judged_and_numbers_exclude_each_other(text):
    """Of texts and numbers alone: what math-verify takes for equal is its own affair."""
    reward_of(f"\\boxed{{{text}}}", "18")
    accepted = [n for n in range(-30, 31) if task._agree(text, str(n))]
    assert len(accepted) <= 1
    assert accepted in ([], [0]) or set(text) & set("12")


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6), st.integers(1, 99))
def test_quotients_are_compared_exactly(top, bottom, factor):
    right = f"\\frac{{{top}}}{{{bottom}}}"
    assert reward_of(f"\\boxed{{{top * factor}/{bottom * factor}}}", right) == 1
    assert reward_of(f"\\boxed{{{top * factor + 1}/{bottom * factor}}}", right) == 0


def test_rewards_are_batched():
    examples = [EXAMPLE, {"problem": "?", "answer": "x"}, EXAMPLE]
    rewards = task.reward(["\\boxed{18}", "\\boxed{x}", "\\boxed{x}"], examples)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1, 1, 0]
    assert task.reward([], []).shape == (0,)


def test_text_of_a_problem():
    example = {"problem": "What is “half”\tof $36°$?", "answer": "\\frac{36}{2}"}
    assert task.prompt(example) == 'What is "half" of $36?$?\n'
    assert task.prompt(example, "instruct") == (
        example["problem"]
        + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert task.demonstration(example) == "\\boxed{\\frac{36}{2}}"
    assert task.careless(example) == "\\boxed{36}"
    assert task.careless({"problem": "none", "answer": "1"}) == "\\boxed{0}"
    with pytest.raises(ValueError, match="style='poem'"):
        task.prompt(example, style="poem")


def test_problems_come_from_the_file_in_one_split_each(options):
    train = task.generate(250, 3, "train", options)
    heldout = task.generate(50, 3, "heldout", options)
    assert all(e in made_up(400) for e in train + heldout)
    assert len({task.key(e) for e in train + heldout}) == 300
    assert train[:100] == task.generate(100, 3, "train", options)
    assert train[:100] != task.generate(100, 4, "train", options)
    excluded = {task.key(e) for e in train[:60]}
    assert task.generate(190, 3, "train", options, excluded) == train[60:]
    with pytest.raises(ValueError, match=r"only \d+ distinct heldout .*task\.math\.path"):
        task.generate(200, 3, "heldout", options)


def test_the_file_must_be_there(tmp_path, monkeypatch, options):
    monkeypatch.setenv("AIS_SHARED", str(tmp_path))
    assert task.generate(9, 0, options=Options("problems.jsonl")) == task.generate(
        9, 0, options=options
    )
    with pytest.raises(UserError, match=rf"task\.math\.path='no\.jsonl' is no file.*{tmp_path}"):
        task.generate(9, 0, options=Options("no.jsonl"))
    with pytest.raises(UserError, match=r"task\.math\.path is null"):
        task.generate(9, 0)


@pytest.mark.parametrize("name", FILES)
def test_published_files(shared_file, name):
    path = shared_file(f"data/{name}")
    examples, ones = task.load(path), np.ones(FILES[name])
    assert len(examples) == len({task.key(e) for e in examples}) == FILES[name]
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    np.testing.assert_array_equal(task.reward([row["solution"] for row in rows], examples), ones)
    for form in ("\\boxed{{{}}}", "$\\boxed{{ {} }}$ or 5", "<answer>{}</answer>",
                 "<answer>${}$.</answer> 5"):  # fmt: skip
        written = [form.format(e["answer"]) for e in examples]
        np.testing.assert_array_equal(task.reward(written, examples), ones)
    other = examples[1:501] + examples[:1]
    same = [a["answer"] != b["answer"] for a, b in zip(examples, other, strict=False)]
    found = task.reward([form.format(e["answer"]) for e in other], examples[: len(other)])
    # 120 and 120^\\circ, -1 and x=-1 are among them.
    assert np.mean(same) > 0.9 and found[same].sum() <= 2
    np.testing.assert_array_equal(
        task.reward([task.demonstration(e) for e in examples], examples), ones
    )
    assert task.reward([task.careless(e) for e in examples], examples).mean() < 0.05
    for e in examples:
        compact = task.prompt(e) + task.demonstration(e) + task.careless(e)
        assert set(compact) <= set(task.ALPHABET)


def test_published_whole_numbers_in_other_forms(shared_file):
    examples = [
        e for e in task.load(shared_file("data/math/math500_test.jsonl"))
        if re.fullmatch("-?[0-9]+", e["answer"])
    ]  # fmt: skip
    assert len(examples) > 200
    for form, want in (("{:,}", 1), ("{}.00", 1), ("x={}", 1), ("{}^\\circ", 1), ("{}.01", 0)):
        written = [f"\\boxed{{{form.format(int(e['answer']))}}}" for e in examples]
        assert (task.reward(written, examples) == want).all()
    following = [f"\\boxed{{{int(e['answer']) + 1}}}" for e in examples]
    assert not task.reward(following, examples).any()


def test_files(tmp_path, options):
    assert task.load(options.path) == made_up(400)
    path = tmp_path / "answers.jsonl"
    lines = [
        {"problem": "?", "solution": "\\boxed{1} and \\boxed{\\frac{1}{2}}.", "level": 1},
        {"problem": "?", "solution": "\\boxed{1}", "answer": " 2 "},
        {"problem": "?", "solution": "\\boxed{3}", "answer": None},
        {"problem": "?", "answer": 27.0},
        {"problem": "?", "answer": 27},
        {"problem": "?", "answer": 0.5},
        {"problem": "?", "expected_answer": "070", "solution": "\\boxed{71}"},
        {"problem": "?", "answer": None, "expected_answer": 70.0},
    ]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    assert [e["answer"] for e in task.load(path)] == [
        "\\frac{1}{2}", "2", "3", "27", "27", "0.5", "070", "70"
    ]  # fmt: skip


MALFORMED = [
    "{", "[" * 100_000, "[]", "{}", '{"problem": "?"}', '{"problem": "?", "answer": NaN}',
    '{"problem": "?", "answer": Infinity}', '{"problem": "?", "answer": true}',
    '{"problem": "?", "answer": 1e-7}', '{"problem": "?", "answer": ' + "1" * 2000 + "}",
    '{"problem": " ", "answer": "18"}',
    '{"problem": "?", "answer": ""}', '{"problem": "?", "answer": "$"}',
    '{"problem": "?", "answer": "}18{"}', '{"problem": "?", "answer": "{18"}',
    '{"problem": "?", "answer": "\\\\boxed{18}"}', '{"problem": "\\udc00", "answer": "18"}',
    '{"problem": "?", "solution": "18"}', '{"problem": "?", "solution": "\\\\boxed{18"}',
    '{"problem": "?", "answer": "' + "18+" * 400 + '"}', '{"question": "?", "answer": "18"}',
]  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_lines(tmp_path, line):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(EXAMPLE) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2: .*expected .*problem") as error:
        task.load(path)
    assert len(str(error.value)) < 400 + len(str(path)) and "\n" not in str(error.value)
