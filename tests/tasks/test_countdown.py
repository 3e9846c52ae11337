"""Countdown: generated problems, judging of answers, and files, against exhaustive search."""

import collections
import itertools
import json
import re

import expression_oracle
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ais_jax.errors import UserError
from ais_jax.tasks import countdown
from ais_jax.tasks.countdown import Options
from ais_jax.tasks.expression import parse

EXAMPLE = {"numbers": [3, 7, 5], "target": 16}
OPTIONS = {
    "default": Options(),
    "in_order": Options(listed_in_order=True, max_number=20),
    "division": Options(operators="+-*/", parentheses=True, max_target=100),
    "one_operator": Options(operators="*", min_number=2, max_number=12, max_target=999),
    "four": Options(numbers=4, max_number=100, max_target=999, operators="*/+-", parentheses=True),
    "four_in_order": Options(numbers=4, max_number=6, listed_in_order=True, operators="+/"),
}


def reward_of(completion, example=EXAMPLE) -> float:
    return float(countdown.reward([completion], [example])[0])


@pytest.mark.parametrize("split", ["train", "heldout"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_problems_have_the_properties_asked_for(options, split):
    count = 100 if options.operators in ("*", "+/") else 400
    examples = countdown.generate(count, seed=7, split=split, options=options)
    assert len(examples) == count
    assert json.loads(json.dumps(examples)) == examples
    assert len({(*e["numbers"], e["target"]) for e in examples}) == count
    for example in examples:
        numbers, solution = example["numbers"], example["solution"]
        assert len(numbers) == options.numbers
        assert all(options.min_number <= n <= options.max_number for n in numbers)
        assert 1 <= example["target"] <= options.max_target
        value, used = expression_oracle.evaluate(solution)
        assert value == example["target"]
        assert sorted(used) == sorted(numbers)
        assert not options.listed_in_order or list(used) == numbers
        assert set(solution) <= set("0123456789" + options.operators) | set(
            "()" if options.parentheses else ""
        )
    written = "".join(e["solution"] for e in examples)
    assert set(options.operators) <= set(written)
    assert options.parentheses == ("(" in written)
    assert (countdown.reward([e["solution"] for e in examples], examples) == 1).all()


def all_problems(options: Options) -> dict[tuple, set[str]]:
    """Solutions of every (listed numbers, target) that chains of three numbers reach."""
    by_target = collections.defaultdict(set)
    span = range(options.min_number, options.max_number + 1)
    for numbers in itertools.product(span, repeat=3):
        for first, second in itertools.product(options.operators, repeat=2):
            text = f"{numbers[0]}{first}{numbers[1]}{second}{numbers[2]}"
            value, _ = expression_oracle.evaluate(text)
            if value.denominator == 1 and 1 <= value <= options.max_target:
                orders = [numbers] if options.listed_in_order else itertools.permutations(numbers)
                for listed in orders:
                    by_target[(*listed, int(value))].add(text)
    return by_target


@pytest.mark.parametrize("listed_in_order", [False, True])
def test_every_problem_exists_once_and_is_in_one_split(listed_in_order):
    options = Options(max_number=4, max_target=9, operators="+-*/", listed_in_order=listed_in_order)
    problems = all_problems(options)
    generated = []
    for split in ("train", "heldout"):
        with pytest.raises(ValueError, match=f"only \\d+ distinct {split} examples exist") as error:
            countdown.generate(100_000, 0, split, options)
        exist = int(str(error.value).split("only ")[1].split()[0])
        generated += countdown.generate(exist, 0, split, options)
    assert len(generated) == len(problems)
    for example in generated:
        solutions = problems.pop((*example["numbers"], example["target"]))
        assert example["solution"] in solutions
    assert not problems


def test_solutions_are_chosen_uniformly():
    options = Options(max_number=3, operators="+*")
    solutions = all_problems(options)[(1, 2, 3, 6)]
    assert len(solutions) == 12
    with pytest.raises(ValueError, match="only") as error:
        countdown.generate(10_000, 0, "train", options)
    count = int(str(error.value).split("only ")[1].split()[0])
    seen = collections.Counter()
    for seed in range(360):
        for example in countdown.generate(count, seed, "train", options):
            if (*example["numbers"], example["target"]) == (1, 2, 3, 6):
                seen[example["solution"]] += 1
    assert seen.keys() == solutions and seen.total() == 360
    chi_square = sum((n - 30) ** 2 / 30 for n in seen.values())
    assert chi_square < 31.3  # 0.1% of uniform samples exceed it, with 11 degrees of freedom


def test_listing_says_nothing_about_the_solution():
    examples = countdown.generate(3000, 1, options=Options(max_number=30))
    ranks = collections.Counter()
    for example in examples:
        numbers = example["numbers"]
        if len(set(numbers)) == 3:
            _, used = expression_oracle.evaluate(example["solution"])
            ranks[tuple(numbers.index(n) for n in used)] += 1
    assert len(ranks) == 6
    assert max(ranks.values()) < 1.25 * min(ranks.values())


def test_parentheses_are_all_needed():
    """Other numbers in the same places give another value without the parentheses."""
    written = set()
    for example in countdown.generate(2000, 2, options=OPTIONS["division"]):
        places = itertools.count()
        written.add(re.sub(r"\d+", lambda _: f"{{{next(places)}}}", example["solution"]))  # noqa: B023
    in_parentheses = [text for text in written if "(" in text]
    assert len(in_parentheses) == 12
    for text in in_parentheses:
        with_them = text.format(17, 31, 53)
        without = with_them.replace("(", "").replace(")", "")
        assert expression_oracle.evaluate(with_them)[0] != expression_oracle.evaluate(without)[0]


@pytest.mark.smoke
def test_same_seed_same_problems():
    assert countdown.generate(1, 0) == [{"numbers": [5, 6, 1], "target": 30, "solution": "1*5*6"}]
    assert countdown.generate(1, 1, "heldout") == [
        {"numbers": [4, 8, 3], "target": 15, "solution": "8+4+3"}
    ]
    assert countdown.generate(
        1, 1, "heldout", Options(4, 1, 100, 100, "+-*/", parentheses=True)
    ) == [{"numbers": [60, 11, 98, 76], "target": 58, "solution": "60+(76-98)/11"}]
    assert countdown.generate(40, 3) == countdown.generate(300, 3)[:40]
    assert countdown.generate(40, 3) != countdown.generate(40, 4)
    assert countdown.generate(0, 3) == []


def test_splits_share_no_problem():
    keys = {
        split: {countdown.key(e) for seed in (0, 1) for e in countdown.generate(n, seed, split)}
        for split, n in (("train", 4000), ("heldout", 1000))
    }
    assert not keys["train"] & keys["heldout"]


def test_excluded_keys_never_appear():
    first = countdown.generate(500, 5)
    excluded = {countdown.key(e) for e in first[::2]}
    second = countdown.generate(500, 5, exclude=excluded)
    assert not excluded & {countdown.key(e) for e in second}
    kept = [e for e in first if countdown.key(e) not in excluded]
    assert second[: len(kept)] == kept


def test_shortage_in_a_space_too_large_to_exhaust():
    options = Options(numbers=4, min_number=300, max_number=600, max_target=10, operators="+")
    with pytest.raises(ValueError, match="count=3: only 0 distinct train examples were found"):
        countdown.generate(3, 0, options=options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "test"}, "split='test' .* train, heldout"),
        ({"count": -1}, "count=-1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        countdown.generate(**({"count": 1, "seed": 0} | arguments))


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("numbers", {"numbers": 2}),
        ("numbers", {"numbers": 5}),
        ("min_number", {"min_number": 0}),
        ("max_number", {"max_number": 1001}),
        ("max_number", {"min_number": 10}),
        ("max_target", {"max_target": 0}),
        ("operators", {"operators": ""}),
        ("operators", {"operators": "++"}),
        ("operators", {"operators": "+^"}),
        ("operators", {"operators": "+ -"}),
    ],
)
def test_bad_options(field, changes):
    with pytest.raises(ValueError, match=f"^{field}="):
        Options(**changes)


def test_large_quotients_are_exact():
    options = Options(numbers=4, min_number=900, max_number=1000, operators="*/", parentheses=True)
    for example in countdown.generate(50, 0, options=options):
        assert expression_oracle.evaluate(example["solution"])[0] == example["target"]


def test_division_by_zero_stays_invalid():
    """1/(1/0) is not 0, as multiplying out would have it."""
    numbers = np.array([[1, 1, 0], [6, 4, 2]])
    numerators, denominators = countdown._fractions(("/", 0, ("/", 1, 2)), numbers)
    assert denominators[0] == 0
    assert numerators[1] == 3 * denominators[1] != 0


def test_text_of_a_problem():
    example = EXAMPLE | {"solution": "3*7-5"}
    assert countdown.prompt(example) == "3 7 5=16:"
    assert countdown.demonstration(example) == "3*7-5"
    assert countdown.key(example) == "3,5,7=16"
    assert countdown.key({"numbers": [7, 5, 3], "target": 16}) == "3,5,7=16"
    instruct = countdown.prompt(example, style="instruct")
    assert all(part in instruct for part in ("3, 7, 5", "16", "<answer>", "</answer>"))
    assert "3*7-5" not in instruct
    with pytest.raises(ValueError, match="style='poem'"):
        countdown.prompt(example, style="poem")
    with pytest.raises(ValueError, match="3,5,7=16 has no solution"):
        countdown.demonstration(EXAMPLE)


def test_the_alphabet_holds_all_compact_text():
    for options in OPTIONS.values():
        for e in countdown.generate(50, 0, options=options):
            text = countdown.prompt(e) + countdown.demonstration(e)
            assert set(text) <= set(countdown.ALPHABET)
    assert len(set(countdown.ALPHABET)) == len(countdown.ALPHABET)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("completion", "want"),
    [
        ("3*7-5", 1),
        ("-5+7*3", 1),
        ("(3)*7 - 5\n", 1),
        ("3×7−5", 1),
        ("3 \\times 7 - 5", 1),
        ("3*7-5=16", 1),
        ("3*7-5 = 16 ", 1),
        ("3*7-5=17", 0),
        ("3*7-5=", 0),
        ("3*7-5=16=16", 0),
        ("3*7-5=20-4", 0),
        ("16=3*7-5", 0),
        ("3*7-5+0", 0),
        ("3*7-5+5-5", 0),
        ("3*7", 0),
        ("3+7+5", 0),
        ("3*7*5", 0),
        ("37-5", 0),
        ("16", 0),
        ("3*7-5 is the answer", 1),
        ("I think it is (3*7)-5.", 1),
        ("Hence 3 \\times 7 - 5 = 16", 1),
        ("So:\n#### 3*7-5", 1),
        ("first 3*7-5, then 3+7+5", 0),
        ("it is 3*7-5 = 17", 0),
        ("it is 3*7-5+0", 0),
        ("<answer>it is 3*7-5</answer>", 0),
        ("", 0),
        ("so <answer>3*7-5</answer>", 1),
        ("so <answer> 3*7-5 = 16 </answer> done", 1),
        ("so <answer>3*7-5", 1),
        ("<answer>1</answer> no: <answer>3*7-5</answer>", 1),
        ("<answer>3*7-5</answer> no: <answer>1</answer>", 0),
        ("3*7-5 <answer></answer>", 0),
        ("so \\boxed{3*7-5}", 1),
        ("\\boxed{1} no: $\\boxed{3 \\cdot 7 - 5}$.", 1),
        ("\\boxed{3*7-5} no: \\boxed{1}", 0),
        ("\\boxed{3*7-5} cut: \\boxed{3*", 1),
        ("\\boxed{{3*7-5}}", 0),
        ("<answer>\\boxed{3*7-5}</answer>", 1),
        ("\\boxed{3*7-5} <answer>1</answer>", 0),
        ("<answer>1</answer> \\boxed{3*7-5}", 0),
        ("\\boxed{3*7-5", 1),
    ],
)
def test_rewards(completion, want):
    assert reward_of(completion) == want


def test_reward_is_exact_and_batched():
    examples = [
        {"numbers": [3, 3, 8, 8], "target": 24},
        {"numbers": [3, 3, 8, 8], "target": 24},
        {"numbers": [1, 3, 3], "target": 1},
        {"numbers": [0, 0], "target": 0},
        {"numbers": [1, 2], "target": -1},
    ]
    completions = ["8/(3-8/3)", "8/(3-8/8)", "1/3*3", "0-0=0", "1-2 = -1"]
    rewards = countdown.reward(completions, examples)
    assert rewards.dtype == np.float32 and rewards.shape == (5,)
    assert rewards.tolist() == [1, 0, 1, 1, 1]
    assert countdown.score(completions, examples).tolist() == rewards.tolist()
    assert countdown.reward([], []).shape == (0,)


LEAVES = st.text(alphabet="357+-*/()= ", max_size=12)


@given(st.one_of(st.text(), LEAVES, st.builds("<answer>{}</answer>".format, LEAVES)))
@settings(deadline=None, max_examples=500)
def test_reward_agrees_with_python_syntax(completion):
    got = reward_of(completion)
    assert got in (0.0, 1.0)
    text = completion.removeprefix("<answer>").removesuffix("</answer>").strip()
    if "=" not in text and completion.isascii():
        try:
            value, used = expression_oracle.evaluate(text)
        except (ValueError, RecursionError, MemoryError):
            value, used = None, ()
        assert got == (value == 16 and sorted(used) == [3, 5, 7])


def test_real_problems(shared_file):
    examples = countdown.load(shared_file("data/countdown/countdown_cd3_test.jsonl"))
    assert len(examples) == 256
    assert examples[0] == {"numbers": [30, 100, 93], "target": 23}
    solutions = [expression_oracle.solve(e["numbers"], e["target"]) for e in examples]
    assert None not in solutions
    assert (countdown.reward(solutions, examples) == 1).all()
    assert (countdown.reward([f"<answer>{s}</answer>" for s in solutions], examples) == 1).all()
    off_by_one = [e | {"target": e["target"] + 1} for e in examples]
    assert not countdown.reward(solutions, off_by_one).any()
    other_numbers = [e | {"numbers": [e["numbers"][0] + 1, *e["numbers"][1:]]} for e in examples]
    assert not countdown.reward(solutions, other_numbers).any()
    excluded = {countdown.key(e) for e in examples}
    generated = countdown.generate(
        2000, 0, options=Options(max_number=100, max_target=100), exclude=excluded
    )
    assert not excluded & {countdown.key(e) for e in generated}


def test_own_files_come_back(tmp_path):
    examples = countdown.generate(20, 0)
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(e) + "\n\n" for e in examples), encoding="utf-8")
    assert countdown.load(path) == examples
    path.write_bytes(b'\xef\xbb\xbf{"input": "1, 2,3", "output": 6}\r\n')
    assert countdown.load(path) == [{"numbers": [1, 2, 3], "target": 6}]


def test_rows_of_tables_lack_values(tmp_path):
    """A table has a column wherever one of its rows has a value."""
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"input": null, "output": null, "numbers": [1, 2], "nums": null, "target": 3}\n'
        '{"input": null, "numbers": null, "nums": [1, 2], "target": 3, "solution": "1+2"}\n'
        '{"numbers": [1, 2], "target": 3, "solution": null}\n'
    )
    example = {"numbers": [1, 2], "target": 3}
    assert countdown.load(path) == [example, {**example, "solution": "1+2"}, example]
    path = tmp_path / "problems.csv"
    path.write_text('nums,target,solution\n"[1, 2]",3,1+2\n[1  2],3,\n')
    assert countdown.load(path) == [{**example, "solution": "1+2"}, example]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[" * 100_000,
        "[1, 2]",
        "{}",
        '{"input": "1,x,3", "output": "6"}',
        '{"input": "", "output": "6"}',
        '{"input": "1,2,3"}',
        '{"input": "1,2,3", "output": "6.5"}',
        '{"input": "1,2,3", "output": true}',
        '{"numbers": [], "target": 6}',
        '{"numbers": "123", "target": 6}',
        '{"numbers": [1, 2.5], "target": 6}',
        '{"numbers": [1, true], "target": 1}',
        '{"numbers": [1, -2], "target": 1}',
        '{"numbers": [1, 2], "target": null}',
        '{"numbers": [1, 2], "target": ' + "9" * 5000 + "}",
        '{"numbers": [1, 2], "target": 3, "solution": "1*2"}',
        '{"numbers": "[1, 2", "target": 3}',
        '{"numbers": "[1, -2]", "target": 3}',
    ],
    ids=range(19),
)
def test_malformed_lines(tmp_path, line):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"input": "1,2,3", "output": "6"}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"problems\.jsonl, line 2: .*expected .*numbers") as error:
        countdown.load(path)
    assert len(str(error.value)) < 400 + len(str(path)) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: No such file .*expected"):
        countdown.load(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="expected lines"):
        countdown.load(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8 text"):
        countdown.load(tmp_path / "binary")
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UserError, match="empty, line 1: ''; expected"):
        countdown.load(tmp_path / "empty")


def test_oracle_search_is_complete():
    assert expression_oracle.solve([3, 3, 8, 8], 24) is not None
    assert expression_oracle.solve([1, 1], 5) is None
    assert expression_oracle.evaluate("2-3*4") == (-10, (2, 3, 4))


def test_the_careless_answer_has_the_form_but_looks_at_no_target():
    examples = countdown.generate(200, seed=5)
    answers = [countdown.careless(example) for example in examples]
    for text, example in zip(answers, examples, strict=True):
        parsed = parse(text)
        assert sorted(parsed.numbers) == sorted(example["numbers"])
        assert parsed.value == sum(example["numbers"])
    assert 0 < countdown.reward(answers, examples).mean() < 0.3
