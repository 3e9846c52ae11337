"""Arithmetic: generated problems, judging of answers, and files, against plain integers."""

import itertools
import json
import re

import expression_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ais_jax.errors import UserError
from ais_jax.tasks import arithmetic
from ais_jax.tasks.arithmetic import Options

EXAMPLE = {"problem": "7*8", "answer": 56}
OPTIONS = {
    "default": Options(),
    "sums": Options(min_number=10, max_number=99, operators="+"),
    "three": Options(max_number=20, operators="*-", terms=3),
    "largest": Options(min_number=9000, max_number=9999, operators="*+-", terms=4),
}


def reward_of(completion, answer: int = 56) -> float:
    return float(arithmetic.reward([completion], [{"problem": "7*8", "answer": answer}])[0])


def everything(split: str, options: Options) -> list[dict]:
    """All examples of a split that exist."""
    with pytest.raises(ValueError, match=f"only \\d+ distinct {split} examples exist") as error:
        arithmetic.generate(100_000, 0, split, options)
    exist = int(str(error.value).split("only ")[1].split()[0])
    return arithmetic.generate(exist, 0, split, options)


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_problems_have_the_properties_asked_for(options, split):
    count = 60 if options == Options() else 400
    examples = arithmetic.generate(count, seed=7, split=split, options=options)
    assert json.loads(json.dumps(examples)) == examples
    assert len({e["problem"] for e in examples}) == len(examples) == count
    for example in examples:
        value, numbers = expression_oracle.evaluate(example["problem"])
        assert type(example["answer"]) is int and example["answer"] == value
        assert len(numbers) == options.terms
        assert all(options.min_number <= n <= options.max_number for n in numbers)
    operators = "".join(re.sub("[0-9]", "", e["problem"]) for e in examples)
    assert set(operators) == set(options.operators)
    shares = np.array([operators.count(op) for op in options.operators]) / len(operators)
    assert abs(shares - 1 / len(options.operators)).max() < 0.15
    assert (arithmetic.reward([str(e["answer"]) for e in examples], examples) == 1).all()


def test_every_problem_of_two_terms_exists_once_and_is_in_one_split():
    want: dict[str, int] = {}
    for a, b in itertools.product(range(10), repeat=2):
        want |= {f"{a}+{b}": a + b, f"{a}-{b}": a - b, f"{a}*{b}": a * b}
    train, heldout = everything("train", Options()), everything("heldout", Options())
    generated = train + heldout
    assert len(generated) == len(want) == 300
    assert {e["problem"]: e["answer"] for e in generated} == want
    assert 0.7 < len(train) / 300 < 0.9
    trained = {e["problem"] for e in train}
    for a, b in itertools.combinations(range(10), 2):
        assert (f"{a}+{b}" in trained) == (f"{b}+{a}" in trained)
        assert (f"{a}*{b}" in trained) == (f"{b}*{a}" in trained)
    assert any((f"{a}-{b}" in trained) != (f"{b}-{a}" in trained) for a in range(9) for b in (9,))


def test_problems_have_one_key_exactly_if_they_are_the_same_sum_of_products():
    def signed_products(problem: str) -> tuple:
        terms = problem.replace("-", "+-").split("+")
        return tuple(sorted((t[0] == "-", *sorted(t.strip("-").split("*"))) for t in terms))

    problems = [
        "".join(symbols)
        for symbols in itertools.product("12", "+-*", ["2", "11"], "+-*", "13", "+-*", "2")
    ]
    keys = {problem: arithmetic.key({"problem": problem}) for problem in problems}
    pairs = {(signed_products(problem), key) for problem, key in keys.items()}
    groups = {products for products, _ in pairs}
    assert len(pairs) == len(groups) == len(set(keys.values())) < len(problems)
    for problem, key in keys.items():
        assert expression_oracle.evaluate(problem)[0] == expression_oracle.evaluate(key)[0]


@pytest.mark.smoke
def test_same_seed_same_problems():
    assert arithmetic.generate(2, 0) == [
        {"problem": "8*9", "answer": 72},
        {"problem": "0-1", "answer": -1},
    ]
    assert arithmetic.generate(1, 1, "heldout", Options(0, 99, "-", 3)) == [
        {"problem": "85-93-19", "answer": -27}
    ]
    assert arithmetic.generate(1, 1, "train", Options(0, 9999, "+-*", 4)) == [
        {"problem": "8491*535+3472+7885", "answer": 4554042}
    ]
    assert arithmetic.generate(40, 3) == arithmetic.generate(200, 3)[:40]
    assert arithmetic.generate(40, 3) != arithmetic.generate(40, 4)
    assert arithmetic.generate(0, 3) == []


def test_excluded_keys_never_appear():
    first = arithmetic.generate(200, 5)
    excluded = {arithmetic.key(e) for e in first[:60]}
    kept = [e for e in first if arithmetic.key(e) not in excluded]
    assert 100 < len(kept) < 140
    assert arithmetic.generate(len(kept), 5, exclude=excluded) == kept


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("min_number", (-1, 9)),
        ("max_number", (10, 9)),
        ("max_number", (0, 10_000)),
        *(("operators", (0, 9, operators)) for operators in ("", "++", "+/", "+ -")),
        *(("terms", (0, 9, "+", terms)) for terms in (1, 5)),
    ],
)
def test_bad_options(field, values):
    with pytest.raises(ValueError, match=f"^{field}="):
        Options(*values)


def test_text_of_a_problem():
    assert arithmetic.prompt(EXAMPLE) == "7*8="
    assert arithmetic.prompt({"problem": "10-2*3"}, style="instruct") == (
        "What is 10 - 2 * 3? Answer with the number alone."
    )
    assert arithmetic.demonstration({"problem": "3-4", "answer": -1}) == "-1"
    with pytest.raises(ValueError, match="style='poem'"):
        arithmetic.prompt(EXAMPLE, style="poem")
    written = ""
    for e in arithmetic.generate(200, 0) + arithmetic.generate(50, 0, options=OPTIONS["largest"]):
        written += arithmetic.prompt(e) + arithmetic.demonstration(e) + arithmetic.careless(e)
    assert sorted(set(written)) == sorted(arithmetic.ALPHABET)


def test_the_careless_answer_is_the_first_number():
    examples = everything("train", Options()) + everything("heldout", Options())
    answers = [arithmetic.careless(e) for e in examples]
    assert answers == [e["problem"][0] for e in examples]
    assert arithmetic.score(answers, examples).sum() == 39
    assert arithmetic.careless({"problem": "120-7*3", "answer": 99}) == "120"


RIGHT = [
    "56", " 56\n", "56.", "56.0", "56,", "+56", "$56$", "**56**", "(56)", "56 \u00b2", "56...",
    "7*8=56", "7 * 8 = 56", "7 * 8 = **56**", "7*8 -> 56", "7 * 8 is\n56", "7*8\n---\n56",
    "The answer is 56.", "7 times 8 is 56!", "<answer>56</answer> 57", "<answer> 7*8 = 56",
    "\\boxed{56}", "\\boxed{7 \\times 8 = 56}", "1 + 1 = 2 \\boxed{56} 3", "57, no: 56",
    "x" * 9999 + " 56", "56-", "1. 56",
]  # fmt: skip
WRONG = [
    "", "57", "-56", "56.5", "5.6", ".56", "56,5", "56,000", "5,6", "1,056", "056", "56 57",
    "56 = 7 * 8", "56a", "a56", "0x56", "56e0", "56_", "5 6", "٥٦", "５６", "56٣", "56 ٣", "56²",
    "1+56", "1 + 56", "0-56", "1*56", "1**56", "1^56", "1/56", "1 × 56", "1 \\cdot 56", "0+(56",
    "1\\times56", "1 +\n56", "0--56", "(1)*56", "56 or 5.5", "fifty-six", "56" + "0" * 16,
    "156" + " " * 997 + "x", "= 56" + " " * 999 + "x", "= 56 " + "x" * 10_000_000,
    "<answer></answer>56",
]  # fmt: skip


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("completion", "want"),
    [(c, 1) for c in RIGHT] + [(c, 0) for c in WRONG],
    ids=range(len(RIGHT + WRONG)),
)
def test_rewards(completion, want):
    assert reward_of(completion) == want
    assert arithmetic.score([completion], [EXAMPLE]).tolist() == [want]


INTEGERS = [
    ("-4", -4), ("−4", -4), ("– 4", -4), ("(-4)", -4), ("\\boxed{-4}", -4), ("3-7=-4", -4),
    ("3 - 7 = - 4", -4), ("3 - 7\n-4.0", -4), ("3-4", None), ("3 -4", None), ("(3)-4", None),
    ("3-(-4)", None), ("**-1,024**", -1024), ("-0", 0), ("000", None), ("9" * 18, 10**18 - 1),
    ("1" + "0" * 18, None), ("1" + "0" * 900, None), ("100" + ",000" * 5, 10**17),
    ("1,000" + ",000" * 5, None), ("1234,567", None),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "want"), INTEGERS, ids=range(len(INTEGERS)))
def test_what_the_final_integer_is(completion, want):
    """It is judged right for `want` and for no other reading."""
    readings = {4, -4, 34, 3, 0, 1, 24, 1024, 567, 1234567, 10**17, 10**18 - 1, 10**18, 10**900}
    for answer in readings | {-n for n in readings}:
        assert reward_of(completion, answer) == (answer == want)


PHRASES = [
    "{n}", "{n}.", "{n}.00", "{n:,}", "= {n}\n", "**{n}**", "the answer is ${n}$, you see.",
    "7 * 8 = {n}", "{n} <answer>{n}</answer> 1", "\\boxed{{{n}}} as 2 + 2 = 4",
]  # fmt: skip
NUMBERS = st.one_of(st.integers(-99, 99), st.integers(1 - 10**18, 10**18 - 1))


@given(st.text(), st.sampled_from(PHRASES), NUMBERS, NUMBERS)
@settings(deadline=None, max_examples=500)
def test_the_right_integer_is_accepted_and_no_other(thoughts, phrase, number, other):
    completion = f"{thoughts}\nso " + phrase.format(n=number)
    assert reward_of(completion, number) == 1
    assert reward_of(completion, other) == (number == other)
    assert reward_of(completion, -number) == (number == 0)


@given(st.one_of(st.text(), st.text(alphabet="56-+*().,= \n", max_size=9)))
@settings(deadline=None, max_examples=500)
def test_only_the_last_integer_can_be_right(completion):
    """In any text: what is accepted is what the last digits and commas spell."""
    accepted = [n for n in range(-66, 67) if reward_of(completion, n)]
    assert len(accepted) <= 1
    for number in accepted:
        last = re.findall(r"[0-9]+", re.sub(r"\.0+(?![0-9])", "", completion))[-1]
        assert int(last) == abs(number)
        assert number >= 0 or "-" in completion


def test_rewards_are_batched():
    examples = [EXAMPLE, {"problem": "3-4", "answer": -1}, EXAMPLE]
    rewards = arithmetic.reward(["56", "-1", "-1"], examples)
    assert rewards.dtype == np.float32 and rewards.tolist() == [1, 1, 0]
    assert arithmetic.reward([], []).shape == (0,)


def test_own_files_come_back(tmp_path):
    examples = arithmetic.generate(50, 0) + arithmetic.generate(50, 0, options=OPTIONS["largest"])
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(e) + "\n\n" for e in examples), encoding="utf-8")
    assert arithmetic.load(path) == examples
    path.write_bytes(b'\xef\xbb\xbf{"problem": "3-4", "answer": -1, "level": 1}\r\n')
    assert arithmetic.load(path) == [{"problem": "3-4", "answer": -1}]


MALFORMED = [
    "{", "[" * 100_000, '["7*8", 56]', "{}", '{"problem": "7*8"}',
    *(
        f'{{"problem": "{problem}", "answer": {answer}}}'
        for problem, answer in (
            ("7*8", 57), ("7*8", '"57"'), ("7*8", '"5 6"'), ("7*8", "56.0"),
            ("1*1", "true"), ("7*8", "9" * 5000),
            ("56", 56), ("7*8=", 56), ("7 * 8", 56), ("07*8", 56), ("(7*8)", 56), ("7*16/2", 56),
            ("٧*8", 56), ("1000000000*1", 10**9), ("100000000*100000000*100", 10**18),
            ("1*" * 20 + "1", 1),
        )
    ),
    '{"problem": 56, "answer": 56}',
]  # fmt: skip


@pytest.mark.parametrize("line", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_lines(tmp_path, line):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "7*8", "answer": 56}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2: .*expected .*problem") as error:
        arithmetic.load(path)
    assert len(str(error.value)) < 300 + len(str(path)) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: No such file .*expected lines"):
        arithmetic.load(tmp_path / "none.jsonl")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty, line 1: ''; expected"):
        arithmetic.load(tmp_path / "empty")
