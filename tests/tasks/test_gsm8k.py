"""GSM8K: what counts as the final number, and problems from files."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ais_jax.errors import UserError
from ais_jax.tasks import common, gsm8k
from ais_jax.tasks.gsm8k import Options

EXAMPLE = {"question": "How many is 9 x 2?", "answer": "It is 9*2=<<9*2=18>>18.\n#### 18"}
FILES = {"gsm8k/train.jsonl": 7473, "gsm8k/test.jsonl": 1319}


def reward_of(completion, answer: str = "18") -> float:
    example = {"question": "?", "answer": f"So.\n#### {answer}"}
    return float(gsm8k.reward([completion], [example])[0])


def made_up(count: int) -> list[dict]:
    return [
        {"question": f"Ann has {n} eggs and finds {n + 7}.\nSum?", "answer": f"#### {2 * n + 7}"}
        for n in range(count)
    ]


@pytest.fixture
def options(tmp_path) -> Options:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(e) + "\n" for e in made_up(400)), encoding="utf-8")
    return Options(str(path))


RIGHT = [
    "It is \\frac{36}{2}.", "$x = \\dfrac{36}{2}$", "17 or -\\frac{-18}{1}", "\\frac{18}{1}}",
    "18", " 18\n", "18.", "18.0", "18.00", "018", "+18", "$18", "18%", "18 %", "$18.00.", "**18**",
    "It is 18.", "9*2=18", "9 * 2 = $18", "17, no: 18", "x\n18 eggs", "18kg", "18-year-old",
    "$18/day", "18/1", "36/2", "\\boxed{18}", "\\boxed{\\$18}", "\\boxed{$18$}", "\\boxed{18\\%}",
    "\\boxed{18.}", "\\boxed{18 \\text{ dollars}}", "\\boxed{18\\,\\text{kg}}", "\\boxed{ +18 }",
    "\\boxed{\\text{about }18}", "\\boxed{x = 18}", "\\boxed{\\frac{36}{2}}", "\\boxed{18} or 19",
    "\\boxed{17} \\boxed{18}", "\\boxed{18} \\boxed{19", "<answer>18</answer>",
    "<answer>\n$18.\n</answer> 19", "<answer>17</answer><answer>18", "<answer>9*2 = 18</answer>",
    "<answer>17</answer> \\boxed{18}", "\\boxed{18}<answer>17</answer>", "#### 18", "####18",
    "#### $18\n5 more", "#### 18\n\n#### Note 3 follows\nso 18", "17\n#### 18", "- 3\n- 18",
    "5 - 18", "x" * 9999 + " 18", "\\boxed{18}" + "x" * 19_000, "18 \ud800",
]  # fmt: skip
WRONG = [
    "", "19", "-18", "$-18", "-$18", "−18", "\\boxed{-18}", "\\boxed{- 18}", "= - 18", "1.8",
    "18.5", ".18", "18,000", "1,8", "1 8", "180", "5,18", "0x18", "a18", "18a3", "18²", "18_",
    "18e0", "18e9", "1e-18", "18E+3", "٨", "１８", "18 ٣", "18/0", "1/18", "5/18/2024", "18 19",
    "eighteen", "NaN", "nan", "Infinity", "\\boxed{nan}", "\\boxed{inf}", "\\boxed{}",
    "\\boxed{} 18", "<answer></answer> 18", "\\boxed{none} 18", "\\boxed{17} 18",
    "<answer>17</answer> 18", "\\boxed{17} <answer>18</answer>", "#### 17\n18",
    "\\boxed{18}{5} \\boxed{17}", "18" + "0" * 200, "0" * 100 + "18", "1e999999999",
    "\\boxed{9**9**9}", "\\frac{18}{7}", "\\frac{18}{0}", "\\frac{36}{2} = 17",
    "\\sqrt{18}", "2^{18}", "2^18", "2_{18}", "\\boxed{\\text{about }\\sqrt{18}}",
    "318" + " x" * 499, "18" + "x " * 1000, "3" * 2000 + "18", "1" * 997 + " 18" + "9" * 1000,
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("completion", "want"),
    [(c, 1) for c in RIGHT] + [(c, 0) for c in WRONG],
    ids=range(len(RIGHT + WRONG)),
)
def test_rewards(completion, want):
    assert reward_of(completion) == want
    assert gsm8k.score([completion], [EXAMPLE]).tolist() == [want]


NUMBERS = [
    ("-4", -4), ("is -4.", -4), ("\\boxed{-4}", -4), ("= - 4", -4), ("(-4)", -4), ("$-4", -4),
    ("is -$4", -4), ("3-4", 4), ("3 - 4", 4), ("(3)-4", 4), ("total - 4", 4), ("−4", -4),
    ("1,024", 1024), ("$1,024.50", Fraction(2049, 2)), ("1{,}024", 1024), ("1\\,024", 1024),
    ("1\\!024", 1024), ("12,345,678", 12345678), ("12,34", None), ("0,123", None), (".5", 0.5),
    ("3/4", 0.75), ("it is 3/4 cups", 0.75), ("\\boxed{\\frac{3}{4}}", 0.75), ("2.", 2),
    ("\\boxed{-\\dfrac{3}{4}}", -0.75), ("0.1", Fraction(1, 10)), ("1e3", None), ("0", 0),
    ("9" * 100, 10**100 - 1), ("9" * 101, None), ("-0", 0),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "want"), NUMBERS, ids=range(len(NUMBERS)))
def test_what_the_final_number_is(completion, want):
    """It is judged right for `want` and for no other reading."""
    readings = {0, 1, 2, 3, 4, 24, 34, 123, 1000, 1024, 12345678, 10**100 - 1, 10**101 - 1}
    readings |= {Fraction(n, 100) for n in (10, 50, 75)} | {Fraction(2049, 2), Fraction(1, 3)}
    for answer in readings | {-n for n in readings}:
        assert reward_of(completion, str(answer)) == (answer == want)


PHRASES = [
    "{}", "So {}.", "**{}**", "= {}", "$ {}", "\\boxed{{{}}} 1", "<answer>{}</answer> 1",
    "#### {}\n1", "<answer>It is {}</answer>", "\\boxed{{{} \\text{{ eggs}}}}", "it is {} eggs.",
]  # fmt: skip
DECIMALS = st.decimals(-(10**9), 10**9, allow_nan=False, allow_infinity=False, places=2)


@given(st.text(alphabet="ab 12.\n"), st.sampled_from(PHRASES), DECIMALS, DECIMALS)
def test_the_right_number_is_accepted_and_no_other(thoughts, phrase, value, other):
    completion = f"{thoughts}\nso " + phrase.format(value)
    assert reward_of(completion, str(value)) == 1
    assert reward_of(completion, f"{value:,}") == 1
    assert reward_of(completion, str(other)) == (value == other)


@given(st.one_of(st.text(), st.text(alphabet="18-/.,#{}\\$% \n", max_size=12)))
def test_hostile_text_gets_a_reward_at_most_once(completion):
    accepted = [n for n in range(-20, 21) if reward_of(completion, str(n))]
    assert len(accepted) <= 1
    for number in accepted:
        assert set(str(abs(number))) <= set(completion) or "/" in completion


def test_rewards_are_batched():
    examples = [EXAMPLE, {"question": "?", "answer": "#### -1"}, EXAMPLE]
    rewards = gsm8k.reward(["18", "-1", None], examples)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1, 1, 0]
    assert gsm8k.reward([], []).shape == (0,)


def test_text_of_a_problem():
    example = {"question": "Zoë’s 3 “eggs” –\tat £2\xa0each?", "answer": "3*2=6\n#### 1,006"}
    assert gsm8k.prompt(example) == 'Zo?\'s 3 "eggs" - at ?2 each?\n'
    assert gsm8k.prompt(example, "instruct") == (
        example["question"]
        + "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    assert gsm8k.demonstration(example) == "\\boxed{1,006}"
    assert gsm8k.careless(example) == "\\boxed{3}"
    assert gsm8k.careless({"question": "none", "answer": "#### 1"}) == "\\boxed{0}"
    with pytest.raises(ValueError, match="style='poem'"):
        gsm8k.prompt(example, style="poem")


def test_problems_come_from_the_file_in_an_order_of_the_seed(options):
    train = gsm8k.generate(100, 3, "train", options)
    assert all(e in made_up(400) for e in train)
    assert train == gsm8k.generate(200, 3, "train", options)[:100]
    assert train != gsm8k.generate(100, 4, "train", options)
    assert train != sorted(train, key=lambda e: made_up(400).index(e))
    assert gsm8k.generate(0, 3, "train", options) == []


def test_every_problem_is_in_one_split(options):
    parts = {}
    for split in common.SPLITS:
        with pytest.raises(
            ValueError, match=rf"only \d+ distinct {split} .*task\.gsm8k\.path"
        ) as e:
            gsm8k.generate(401, 0, split, options)
        exist = int(re.search(r"only (\d+)", str(e.value))[1])
        parts[split] = [gsm8k.key(e) for e in gsm8k.generate(exist, 0, split, options)]
    assert 50 < len(parts["heldout"]) < 110
    assert sorted(parts["train"] + parts["heldout"]) == sorted(map(gsm8k.key, made_up(400)))
    with pytest.raises(ValueError, match="split='test'"):
        gsm8k.generate(1, 0, "test", options)


def test_excluded_and_repeated_problems(tmp_path, options):
    first = gsm8k.generate(200, 5, options=options)
    excluded = {gsm8k.key(e) for e in first[:60]}
    assert gsm8k.generate(140, 5, options=options, exclude=excluded) == first[60:]
    path = tmp_path / "twice.jsonl"
    again = [{**e, "question": " " + e["question"].replace(" ", "  ")} for e in made_up(50)]
    path.write_text("\n".join(map(json.dumps, made_up(50) + again)), encoding="utf-8")
    with pytest.raises(ValueError, match="only") as error:
        gsm8k.generate(100, 0, options=Options(str(path)))
    taken = gsm8k.generate(int(re.search(r"only (\d+)", str(error.value))[1]), 0, "train",
                           Options(str(path)))  # fmt: skip
    assert 30 < len(taken) == len({gsm8k.key(e) for e in taken}) < 50


def test_files_are_looked_up_in_the_shared_folder(tmp_path, monkeypatch, options):
    monkeypatch.setenv("AIS_SHARED", str(tmp_path))
    assert gsm8k.generate(9, 0, options=Options("problems.jsonl")) == gsm8k.generate(
        9, 0, options=options
    )
    with pytest.raises(UserError, match=rf"task\.gsm8k\.path='no\.jsonl' is no file.*{tmp_path}"):
        gsm8k.generate(9, 0, options=Options("no.jsonl"))
    with pytest.raises(UserError, match=r"task\.gsm8k\.path is null"):
        gsm8k.generate(9, 0)


@pytest.mark.parametrize("name", FILES)
def test_published_files(shared_file, name):
    examples = gsm8k.load(shared_file(f"data/{name}"))
    assert len(examples) == len({gsm8k.key(e) for e in examples}) == FILES[name]
    golds = [re.search(r"#### (-?[0-9,]+)$", e["answer"])[1] for e in examples]
    ones = np.ones(len(examples))
    for form in ("\\boxed{{{}}}", "<answer>{}</answer>", "so\n#### {}", "It is ${}."):
        written = [f"9 - 4 = 5, {form.format(gold)}" for gold in golds]
        np.testing.assert_array_equal(gsm8k.reward(written, examples), ones)
        other = [form.format(int(gold.replace(",", "")) + 1) for gold in golds]
        np.testing.assert_array_equal(gsm8k.reward(other, examples), 0 * ones)
    np.testing.assert_array_equal(gsm8k.reward([e["answer"] for e in examples], examples), ones)
    np.testing.assert_array_equal(
        gsm8k.reward([gsm8k.demonstration(e) for e in examples], examples), ones
    )
    assert gsm8k.reward([gsm8k.careless(e) for e in examples], examples).mean() < 0.03
    for e in examples:
        compact = gsm8k.prompt(e) + gsm8k.demonstration(e) + gsm8k.careless(e)
        assert set(compact) <= set(gsm8k.ALPHABET)


def test_own_files_come_back(options):
    assert gsm8k.load(options.path) == made_up(400)


MALFORMED = [
    "{", "[" * 100_000, "[]", "{}", '{"question": "?"}', '{"question": "?", "answer": 18}',
    '{"question": "", "answer": "#### 18"}', '{"question": ["?"], "answer": "#### 18"}',
    '{"question": "\\ud800", "answer": "#### 18"}', '{"question": "?", "answer": "18"}',
    '{"question": "?", "answer": "#### x"}', '{"question": "?", "answer": "#### NaN"}',
    '{"question": "?", "answer": "#### 1e9"}', '{"problem": "?", "answer": "#### 18"}',
]  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_lines(tmp_path, line):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(EXAMPLE) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2: .*expected .*question") as error:
        gsm8k.load(path)
    assert len(str(error.value)) < 300 + len(str(path)) and "\n" not in str(error.value)
