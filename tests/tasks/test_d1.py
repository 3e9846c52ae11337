"""d1's protocol, case by case. Each expected value is what d1's published code gives."""

import glob
import json
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ais_jax.evaluation.rescore import rescore
from ais_jax.tasks import d1, d1_math

GSM8K = {"question": "How many?", "answer": "So.\n#### 1,000"}
MATH = {"problem": "What?", "answer": "\\frac{1}{2}"}
COUNTDOWN = {"numbers": [49, 55, 53], "target": 51}
SUDOKU = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
RIGHT = SUDOKU["solution"]
WRONG = "1" * 16


def right(task, text, example):
    found, total = d1.counts(task, [text], [example])
    assert total.dtype == found.dtype == np.int64
    return int(found[0]), int(total[0])


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("\\boxed{1000}", 1),
        ("\\boxed{1000.0} \\boxed{7}", 1),  # the first counts
        ("\\boxed{7} \\boxed{1000}", 0),
        ("\\boxed{...} \\boxed{} \\boxed{1000}", 1),
        ("\\boxed{x} \\boxed{1000}", 1),  # one without a number is passed over
        ("\\boxed{\\$1000 or 7}", 1),
        ("\\boxed{1,000}", 0),  # its first number is 1
        ("\\boxed{1_000}", 1),  # Python reads it
        ("\\boxed{1e3}", 1),
        ("\\boxed{\\text{1000}", 1),
        ("\\boxed{\n1000}", 0),  # a box ends with its line
        ("\\boxed{nan} <answer>1000</answer>", 0),
        ("<answer>1000</answer>", 1),
        ("<answer>7 1000</answer>", 1),  # the last number of a tag
        ("<answer>1000 7</answer>", 0),
        ("<answer>7</answer> <answer>1000</answer>", 0),
        ("<answer>1000", 0),
        ("<answer></answer> 1000", 0),
        ("the answer is 1000", 0),
        ("#### 1000", 0),
        ("\\boxed{1000}<|eot_id|><|endoftext|>", 1),
        ("", 0),
        (None, 0),
    ],
)
def test_gsm8k(text, want):
    assert right("gsm8k", text, GSM8K) == (want, 1)


def test_d1_finds_no_negative_answers():
    assert right("gsm8k", "\\boxed{-10}", {"question": "?", "answer": "#### -10"}) == (0, 1)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("\\boxed{\\frac{1}{2}}", 1),
        ("\\boxed{\\frac12}", 1),
        ("\\boxed{\\dfrac{1}{2}}", 1),
        ("\\boxed{1/2}", 1),
        ("\\boxed{0.5}", 1),
        ("\\boxed{.5}", 1),
        ("\\boxed{x = 0.5}", 1),
        ("\\boxed{x=0.5}", 1),
        ("\\boxed{0.50}", 0),
        ("\\boxed{\\frac{2}{4}}", 0),
        ("\\boxed{7} \\boxed{1/2}", 1),
        ("\\boxed{1/2} \\boxed{7}", 0),
        ("\\boxed 1/2$", 1),
        ("\\fbox{1/2}", 0),  # found, but the frame stays
        ("<answer>1/2</answer>", 0),  # without a box the whole text is compared
        ("1/2", 1),
        ("\\boxed{1/2 <answer>0.5</answer>", 1),  # an open box is none
        ("\\boxed{} <answer>0.5</answer>", 1),
        ("", 0),
    ],
)
def test_math(text, want):
    assert right("math", text, MATH) == (want, 1)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("\\sqrt3", "\\sqrt{3}"),
        ("3\\text{ cm}", "3"),
        ("90^{\\circ}", "90"),
        ("\\left(1, 2\\right)", "(1,2)"),
        ("50\\%", "50"),
        ("5\\\\\\%%", "5"),
        ("\\$5", "5"),
        ("k=3", "3"),
        ("ab=3", "3"),
        ("abc=3", "abc=3"),
        ("-1/3", "\\frac{-1}{3}"),
        ("01/3", "01/3"),
        ("\\frac1{72}", "\\frac{1}{72}"),
        ("\\frac1", "\\frac1"),
        ("1/2/3", "1/2/3"),
        ("", ""),
    ],
)
def test_normal_forms(text, normal):
    assert d1_math.normal(text) == normal


@pytest.mark.parametrize(
    "text", ["a/b", "\\sqrt", "\\frac", "1\\text{ a}\\text{ b}", "9" * 5000 + "/1"]
)
def test_what_has_no_normal_form_is_compared_as_it_is(text):
    with pytest.raises(d1_math.Unruly):
        d1_math.normal(text)
    assert d1_math.equivalent(text, text)
    assert not d1_math.equivalent(text, text + " ")
    assert not d1_math.equivalent(text, None)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("\\boxed{49 + 55 - 53}", 1),
        ("\\boxed{49 + 55 - 53 = 51}", 1),
        ("\\boxed{53 \\times 1}", 0),
        ("\\boxed{(49+55)-53}", 1),
        ("\\boxed{+49-(-55)-53}", 1),
        ("\\boxed{49+55-53.0}", 0),  # 0 is a further number
        ("\\boxed{49+55-53.}", 1),
        ("\\boxed{49 \\cdot 55 - 53}", 0),
        ("49 + 55 - 53", 1),  # the whole text
        ("<answer>49+55-53</answer>", 0),
        ("\\boxed{49 <answer>49+55-53</answer>", 1),
        ("Hence 49+55-53 = 51, as asked", 1),
        ("\\boxed{49+55}", 0),
        ("\\boxed{49+55-53+0}", 0),
        ("\\boxed{49+55-54}", 0),
        ("\\boxed{49(55)53}", 0),
        ("\\boxed{(49)(55)(53)}", 0),
        ("\\boxed{49**55**53}", 0),
        ("\\boxed{49//55+53}", 0),
        ("\\boxed{49+55-\u0665\u0663}", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_countdown(text, want):
    assert right("countdown", text, COUNTDOWN) == (want, 1)


@pytest.mark.parametrize(
    ("text", "numbers", "target", "want"),
    [
        ("2**3", [2, 3], 8, 1),
        ("7//2", [7, 2], 3, 1),
        ("7/2", [7, 2], 3, 0),
        ("(1-4)**(1/2)", [1, 4, 1, 2], 3, 0),  # a complex number
        ("((1-4)**(1/2))//1", [1, 4, 1, 2, 1], 3, 0),
        ("1/(2-2)", [1, 2, 2], 1, 0),
        ("2**65", [2, 65], 2**65, 1),
        ("1**87+50", [1, 87, 50], 51, 1),
        ("50+2**-99", [50, 2, 99], 50, 1),
        ("(-56)**(74/.42)*2", [56, 74, 42, 2], 50, 0),  # complex, and too large for abs
        ("99**99**99", [99, 99, 99], 1, 0),  # powers are bounded
        ("2**9999-2**9999", [2, 9999, 2, 9999], 0, 0),
        ("(1,2)", [1, 2], 3, 0),
        ("-" * 290 + "1+2", [1, 2], 3, 1),
        ("-" * 1000 + "1+2", [1, 2], 3, 0),
        ("(" * 250 + "1+2" + ")" * 250, [1, 2], 3, 0),
        ("01+2", [1, 2], 3, 0),  # no number of Python's
    ],
)
def test_arithmetic_is_pythons_but_bounded(text, numbers, target, want):
    example = {"numbers": numbers, "target": target}
    assert right("countdown", f"\\boxed{{{text}}}", example) == (want, 1)
    reward = each("countdown", True, f"<answer>{text}</answer>", example)["equation"]
    assert reward == pytest.approx(1 if want else 0.1)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (f"<answer>\n{RIGHT}\n</answer>", 8),
        (f"<answer>{RIGHT}<|eot_id|>", 8),
        (f"<answer>{RIGHT}", 8),  # open and not ended: the run of 16 digits
        (f"<answer>{RIGHT[:8]}" + d1.END, 4),  # short ones are filled up
        (f"<answer>{RIGHT[:8]}", 0),
        (f"<answer>{RIGHT}99</answer>", 8),  # long ones are cut
        (f"<answer>{WRONG}</answer>{RIGHT}", 2),
        (f"<answer>x```{RIGHT}```{WRONG}</answer>", 8),
        (f"<answer>```python\n{RIGHT}\n```\n```\n{WRONG}\n```</answer>", 0),
        (f"<answer>x````{RIGHT}````{WRONG}</answer>", 8),
        (f"<answer></answer> {RIGHT}", 8),
        (f"<answer></answer>\n{RIGHT}<|endoftext|>{WRONG}", 8),
        (f"so {RIGHT} </answer>", 8),  # behind the tag there is nothing
        (f"it is {RIGHT}.", 8),
        (f"it is 0{RIGHT}.", 0),
        (f"<answer>{' '.join(RIGHT)}</answer>", 8),
        ("<answer>3142\n2431\n4213\n1324</answer>", 8),
        ("<answer>I do not know</answer>", 0),
        ("", 0),
        (None, 0),
    ],
)
def test_sudoku(text, want):
    assert right("sudoku", text, SUDOKU) == (want, 8)
    assert d1.score("sudoku", [text], [SUDOKU])[0] == want / 8


def each(task, compat, text, example):
    return {name: float(f([text], [example])[0]) for name, f in d1.rewards(task, compat).items()}


PERFECT = "<reasoning>\nso\n</reasoning>\n<answer>\n1000\n</answer>\n"
LONG = PERFECT.replace("\nso\n", "\nso\nand so\n")


@pytest.mark.parametrize(
    ("text", "compat", "want"),
    [
        # correct, int, strict_format, soft_format, xml_count
        (PERFECT, True, (0, 0.5, 0.5, 0, 0.5)),  # soft wants the tags on one line
        (PERFECT, False, (2, 0.5, 0.5, 0.5, 0.5)),
        (LONG, True, (0, 0.5, 0, 0, 0.5)),  # reasoning of two lines never matches
        (LONG, False, (2, 0.5, 0.5, 0.5, 0.5)),
        (PERFECT.replace("1000", "1,000"), True, (2, 0, 0.5, 0, 0.5)),  # text is compared
        (PERFECT.replace("1000", "1,000"), False, (2, 0.5, 0.5, 0.5, 0.5)),
        (PERFECT.replace("1000", "-7"), True, (0, 0, 0.5, 0, 0.5)),
        (PERFECT.replace("1000", "-7"), False, (0, 0.5, 0.5, 0.5, 0.5)),
        ("<reasoning>a</reasoning> <answer>1000</answer>", True, (0, 0.5, 0, 0.5, 0)),
        ("1,000", True, (2, 0, 0, 0, 0)),
        ("1000", False, (2, 0.5, 0, 0, 0)),
        (PERFECT + "1234567890", True, (0, 0.5, 0, 0, 0.5 - 0.02)),
        ("", True, (0, 0, 0, 0, 0)),
        (None, True, (0, 0, 0, 0, 0)),
    ],
)
def test_rewards_of_gsm8k(text, compat, want):
    found = each("gsm8k", compat, text, GSM8K)
    assert list(found) == ["correct", "int", "strict_format", "soft_format", "xml_count"]
    assert tuple(found.values()) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("text", "compat", "want"),
    [
        ("<answer>\\boxed{1/2}</answer>", True, (2, 0.75)),
        ("<answer>\\boxed{1/2}</answer>", False, (2, 1)),
        ("<answer>1/2</answer>", True, (0, 0.75)),
        ("<answer>1/2</answer>", False, (0, 0.75)),
        ("\\boxed{0.5}", True, (2, 0.25)),
        ("\\boxed{0.5}", False, (2, 0.5)),
        ("\\boxed{7}", False, (0, 0.5)),
        ("1/2", False, (2, 0.25)),
        ("", False, (0, 0.25)),
        (None, False, (0, 0)),
    ],
)
def test_rewards_of_math(text, compat, want):
    assert tuple(each("math", compat, text, MATH).values()) == want


@pytest.mark.parametrize(
    ("text", "published", "mended"),
    [
        ("<answer>49+55-53</answer>", 1, 1),
        ("<answer>7</answer> so <answer> (49 + 55) - 53 </answer>", 1, 1),
        ("<answer>49+53-55</answer>", 0.1, 0.1),
        ("<answer>49+55</answer>", 0.1, 0),
        ("<answer>I do not know</answer>", 0.1, 0),
        ("<answer>49 \\times 55 - 53</answer>", 0.1, 0.1),
        ("<answer>49+55-53.</answer>", 1, 0),  # no decimals in ours
        ("<answer>99**99**99</answer>", 0.1, 0),
        ("<answer>49+55-53", 0, 0),
        ("49+55-53", 0, 0),
        (None, 0, 0),
    ],
)
def test_rewards_of_countdown(text, published, mended):
    assert each("countdown", True, text, COUNTDOWN)["equation"] == pytest.approx(published)
    assert each("countdown", False, text, COUNTDOWN)["equation"] == pytest.approx(mended)


@pytest.mark.parametrize(
    ("text", "published", "mended"),
    [
        (f"<answer>{RIGHT}</answer>", 1, 1),
        (f"<answer>{WRONG}</answer><answer>{' '.join(RIGHT)}</answer>", 1, 1),
        (f"<answer>{RIGHT[:8]}</answer>", 0.5, 0),
        (f"<answer>{RIGHT}1</answer>", 1, 0),
        (f"<answer>is {RIGHT}</answer>", 1, 0),
        (f"<answer>1{RIGHT[1:]}</answer>", 1, 0),  # a given cell is changed
        ("<answer>none</answer>", 0, 0),
        (f"<answer>{RIGHT}", 0, 0),
        (None, 0, 0),
    ],
)
def test_rewards_of_sudoku(text, published, mended):
    assert each("sudoku", True, text, SUDOKU)["cells"] == published
    assert each("sudoku", False, text, SUDOKU)["cells"] == mended


def test_prompts_are_those_of_the_published_code():
    """Of each the beginning and the end; the whole texts have been compared."""
    posed = d1.prompt("countdown", COUNTDOWN, True)
    assert posed.startswith("Using only the provided numbers, create an arithmetic expression that")
    assert "For example: \\boxed{a + b * c}Respond in the following format:" in posed
    assert posed.endswith("</answer>\n\nNumbers: [49, 55, 53]\nTarget: 51")
    posed = d1.prompt("countdown", COUNTDOWN, False)
    assert posed.startswith("\nRespond in the following format:\n<reasoning>\n...")
    assert "Using only the numbers [49, 55, 53], create" in posed
    assert posed.endswith("a valid answer is: <answer>\n2*4-3\n</answer>")
    assert "boxed{}. \nRespond in" in d1.prompt("gsm8k", GSM8K, True)
    assert d1.prompt("gsm8k", GSM8K, False).endswith("</answer>\n\n\nHow many?")
    assert 'boxed{...}\n</answer>" \n\n\nWhat?' in d1.prompt("math", MATH, True)
    assert d1.prompt("math", MATH, False).endswith("in a \\boxed{}. \n\nWhat?")
    for evaluation in (True, False):
        posed = d1.prompt("sudoku", SUDOKU, evaluation)
        assert posed.startswith("\nPlease solve the following 4x4 Sudoku puzzle.")
        assert posed.endswith("\n\nSolve the following Sudoku puzzle: 3102200002100320\n")


PIECES = [
    "<answer>", "</answer>", "<reasoning>\n", "\n</reasoning>\n", "```", "\\boxed{", "}",
    "\\boxed ", "=", " ", "\n", "1", "49", "55", "53", "+", "-", "*", "/", "(", ")", ".", RIGHT,
    "٣", "\\frac", "$",
]  # fmt: skip


@given(st.lists(st.sampled_from(PIECES), max_size=30).map("".join))
def test_any_text_is_judged(text):
    for task, example in zip(d1.TASKS, (GSM8K, MATH, COUNTDOWN, SUDOKU), strict=True):
        found, total = right(task, text, example)
        assert 0 <= found <= total
        for compat in (True, False):
            assert np.isfinite(list(each(task, compat, text, example).values())).all()


@pytest.mark.parametrize(
    "unit", ["<answer>", "\\boxed{", "```", "1", "49+", "= ", "\\frac", " ", "("]
)
def test_long_texts_are_read_in_part(unit):
    text = unit * (1_000_000 // len(unit))
    for task, example in zip(d1.TASKS, (GSM8K, MATH, COUNTDOWN, SUDOKU), strict=True):
        assert right(task, text, example)[0] <= 2
        for compat in (True, False):
            each(task, compat, text, example)


@pytest.mark.parametrize("task", d1.TASKS)
def test_lengths_must_agree(task):
    with pytest.raises(ValueError, match="d1 has no task 'amc', only gsm8k"):
        d1.counts("amc", [], [])
    with pytest.raises(ValueError, match="d1 has no task 'amc', only gsm8k"):
        d1.rewards("amc", True)
    with pytest.raises(ValueError, match="1 completions for 0 examples"):
        d1.counts(task, [""], [])
    for function in d1.rewards(task, True).values():
        with pytest.raises(ValueError, match="1 completions for 0 examples"):
            function([""], [])
    assert d1.score(task, [], []).shape == (0,)


PUBLISHED = {
    "gsm8k": (69.29, 76.37, 78.14),
    "math500": (26.0, 32.4, 36.2),
    "countdown": (20.70, 19.53, 16.02),
    "sudoku": (11.72, 6.69, 5.47),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_generations_have_the_published_accuracy(name):
    folder = os.environ.get("AIS_D1_GENERATIONS")
    if not folder:
        pytest.skip("AIS_D1_GENERATIONS names no folder of d1's eval_baselines")
    for length, want in zip((128, 256, 512), PUBLISHED[name], strict=True):
        pattern = str(pathlib.Path(folder) / f"{name}_instruct_{length}_*_generations.json")
        scored = {s.scorer: s.estimate.value for s in rescore(sorted(glob.glob(pattern)), name)}
        (found,) = (value for scorer, value in scored.items() if scorer.startswith("d1"))
        assert 100 * found == pytest.approx(want, abs=0.05)


def test_generations_of_d1s_layout_are_scored(tmp_path):
    """Where d1 has not found the right answer itself, no answer is right."""
    rows = [
        {"question": "?", "generations": "\\boxed{3}", "ground_truth": 3.0},
        {"question": "?", "generations": "\\boxed{3}", "ground_truth": None},
    ]
    path = tmp_path / "generations.json"
    path.write_text(json.dumps({"generations": rows}))
    assert [s.estimate.value for s in rescore([str(path)], "gsm8k")] == [0.5, 0.5]
