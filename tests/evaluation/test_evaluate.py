"""Evaluations of tiny models: what is written, what goes on, what must not depend on the batch."""

import json

import jax
import numpy as np
import pytest

from ais_jax import tasks
from ais_jax.errors import UserError
from ais_jax.evaluation import benchmarks, rescore
from ais_jax.evaluation.run import Options, evaluate
from ais_jax.models import LladaConfig, Qwen3Config, build, save_pretrained
from ais_jax.models.tokenizers import CharTokenizer, save_char_tokenizer
from ais_jax.sampling.prompts import after_thinking

ALPHABET = "0123456789+-*="
QWEN3 = Qwen3Config(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)
LLADA = LladaConfig(
    vocab_size=17,
    d_model=16,
    mlp_hidden_size=32,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    mask_token_id=16,
)


def saved(sizes, folder):
    model = build(sizes, "float32")
    # Large enough that answers vary from problem to problem.
    params = jax.tree.map(lambda x: 4 * x, model.init(jax.random.key(0)))
    save_pretrained(model, params, folder)
    save_char_tokenizer(CharTokenizer(ALPHABET), folder)
    return str(folder)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    return saved(QWEN3, tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return saved(LLADA, tmp_path_factory.mktemp("models") / "llada")


def options(**changes):
    base = {"lengths": (4,), "data": "generated:24", "batch_size": 8}
    return Options(("arithmetic",), **{**base, **changes})


def lines(folder, recipe="none", length=4):
    text = (folder / f"arithmetic-{length}-{recipe}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def sorted_lines(folder, **which):
    return sorted(lines(folder, **which), key=lambda row: (row["index"], row["sample"]))


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def test_every_generation_is_written_and_scored(qwen3, tmp_path):
    folder = evaluate(qwen3, options(recipes=("none", "int4"), lengths=(4, 6)), tmp_path / "out")
    examples = tasks.get_task("arithmetic").generate(24, 0, "heldout")
    found = results(folder)
    assert [(r["recipe"], r["length"]) for r in found] == [
        ("none", 4), ("none", 6), ("int4", 4), ("int4", 6)
    ]  # fmt: skip
    for result in found:
        rows = lines(folder, result["recipe"], result["length"])
        assert [(row["index"], row["sample"]) for row in rows] == [(i, 0) for i in range(24)]
        scores = tasks.get_task("arithmetic").score([row["completion"] for row in rows], examples)
        np.testing.assert_array_equal(scores, [row["counts"]["accuracy"][0] for row in rows])
        assert result["measures"]["accuracy"]["value"] == pytest.approx(scores.mean())
        assert result["mean_tokens"] == np.mean([row["tokens"] for row in rows])
        assert all(row["tokens"] == result["length"] for row in rows if row["truncated"])
        assert result["truncated"] == np.mean([row["truncated"] for row in rows])
    table = (folder / "table.md").read_text()
    assert "| rollout | Arithmetic / 4 | Arithmetic / 6 |" in table
    assert "\n| unquantized | " in table and "\n| int4 | " in table
    texts = {
        recipe: [r["completion"] for r in lines(folder, recipe)] for recipe in ("none", "int4")
    }
    assert len(set(texts["none"])) > 3
    assert texts["none"] != texts["int4"]


def test_an_evaluation_goes_on_where_it_was_stopped(qwen3, tmp_path):
    sampled = {"samples": 2, "temperature": 1.0}
    whole = evaluate(qwen3, options(**sampled), tmp_path / "whole")
    parts = evaluate(qwen3, options(**sampled, limit=7), tmp_path / "parts")
    assert len(lines(parts)) == 14
    path = parts / "arithmetic-4-none.jsonl"
    path.write_bytes(path.read_bytes()[:-10])  # killed while it wrote
    first = path.read_bytes().splitlines()[:13]
    evaluate(qwen3, options(**sampled), parts)
    assert path.read_bytes().splitlines()[:13] == first
    assert sorted_lines(parts) == sorted_lines(whole)
    assert results(parts)[0]["measures"] == results(whole)[0]["measures"]
    before = path.read_bytes()
    evaluate(qwen3, options(**sampled), parts)
    assert path.read_bytes() == before


def test_completions_do_not_depend_on_the_batch(qwen3, llada, tmp_path):
    for name, model in (("qwen3", qwen3), ("llada", llada)):
        found = [
            sorted_lines(
                evaluate(
                    model, options(temperature=1.0, batch_size=size), tmp_path / f"{name}{size}"
                )
            )
            for size in (8, 24)
        ]
        assert found[0] == found[1]
        assert len({row["completion"] for row in found[0]}) > 3


def test_samples_are_independent_and_measured(qwen3, tmp_path):
    folder = evaluate(qwen3, options(samples=4, temperature=1.5), tmp_path / "out")
    rows = sorted_lines(folder)
    assert len(rows) == 96
    texts = np.array([row["completion"] for row in rows]).reshape(24, 4)
    assert any(len(set(of_one)) > 1 for of_one in texts.tolist())
    right = np.array([row["counts"]["accuracy"][0] for row in rows]).reshape(24, 4)
    (result,) = results(folder)
    values = {name: value["value"] for name, value in result["measures"].items()}
    assert values["accuracy, avg@4"] == pytest.approx(right.mean())
    assert values["pass@1"] == pytest.approx(right.mean())
    assert values["pass@4"] == pytest.approx(right.max(axis=1).mean())
    assert values["pass@2"] <= values["pass@4"]


def test_other_settings_are_refused(qwen3, tmp_path):
    folder = evaluate(qwen3, options(limit=2), tmp_path / "out")
    with pytest.raises(UserError, match=r"temperature=0.0, not 1.0: take another --output"):
        evaluate(qwen3, options(limit=2, temperature=1.0), folder)
    path = folder / "arithmetic-4-none.jsonl"
    row = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**row, "problem": "other"}) + "\n")
    with pytest.raises(UserError, match="of other problems"):
        evaluate(qwen3, options(limit=2), folder)
    path.write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no generation"):
        evaluate(qwen3, options(limit=2), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 2}, "--samples 2 at temperature 0"),
        ({"recipes": ("fp7",)}, "--recipe 'fp7' is unknown"),
        ({"lengths": (0,)}, "--lengths 0"),
        ({"top_k": 4}, "--top-k and --top-p change nothing"),
        ({"batch_size": 4}, "--batch-size 4 is not divisible by the 8 devices"),
        ({"thinking": True}, "--thinking needs a chat template"),
        ({"data": "generated:x"}, "generated:x must end with how many"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl is no file.*--data FILE, or --data generated:N"),
        ({"protocol": "d1"}, "d1's protocol has no Arithmetic"),
    ],
)
def test_mistakes_are_told(qwen3, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        evaluate(qwen3, options(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_benchmark_is_told():
    with pytest.raises(UserError, match="--task 'gsm' is unknown; choose of gsm8k"):
        benchmarks.get_benchmark("gsm")


@pytest.mark.parametrize(
    ("text", "opened", "read"),
    [
        ("so 3</think>\n\\boxed{4}", True, "\n\\boxed{4}"),
        ("<think>3</think>4", False, "4"),
        ("still at 3", True, ""),
        ("<think>maybe 3", False, ""),
        ("\\boxed{4}", False, "\\boxed{4}"),
    ],
)
def test_only_what_follows_the_thinking_is_read(text, opened, read):
    assert after_thinking(text, opened) == read


def test_published_files_are_whole(shared_file, monkeypatch):
    monkeypatch.setenv("AIS_SHARED", str(shared_file("data").parent))
    rows = {
        "gsm8k": 1319, "math500": 500, "amc": 83, "amc23": 40, "aime25": 30, "aime24": 30,
        "countdown": 256, "sudoku": 500, "sudoku_spg": 256,
    }  # fmt: skip
    found = {
        name: len(benchmarks.load_examples(benchmarks.get_benchmark(name), None, "own"))
        for name in rows
    }
    assert found == rows
    sudoku = benchmarks.get_benchmark("sudoku")
    drawn = benchmarks.load_examples(sudoku, None, "d1")
    assert len({x["puzzle"] for x in drawn}) == 256
    # The first that d1's published generations are of.
    assert {
        *("4320004330100004", "0204032001400402", "0104000214003041", "2030042043101000"),
        *("0430102002103100", "1042040300313000", "1002031030004023", "0420230000414030"),
    } <= {x["puzzle"] for x in drawn}


def test_own_generations_are_scored_again(qwen3, tmp_path):
    folder = evaluate(qwen3, options(), tmp_path / "out")
    path = folder / "arithmetic-4-none.jsonl"
    (scored,) = rescore.rescore([str(path)], "arithmetic", "generated:24")
    assert scored.scorer == "own, accuracy"
    assert scored.generations == 24
    assert scored.estimate.value == results(folder)[0]["measures"]["accuracy"]["value"]


def test_published_generations_are_scored_by_every_protocol(tmp_path):
    rows = [
        {
            "question": "Half of 6?",
            "generations": "\\boxed{3}<|eot_id|>\\boxed{4}",
            "ground_truth": 3.0,
        },
        {"question": "Half of 8?", "generations": "It is 4.", "ground_truth": 4.0},
        {"question": "Half of 9?", "generations": "<answer>4.5</answer>", "ground_truth": 4.5},
        {"question": "Half of 2?", "generations": "\\boxed{2}", "ground_truth": 1.0},
    ]
    path = tmp_path / "gsm8k_generations.json"
    path.write_text(json.dumps({"generations": rows, "gen_length": 256}))
    own, d1 = rescore.rescore([str(path)], "gsm8k")
    assert (own.scorer, own.estimate.value) == ("own, accuracy", 0.75)
    assert (d1.scorer, d1.estimate.value) == ("d1, accuracy", 0.5)  # it reads no prose


@pytest.mark.parametrize(
    "text", ["", "{}", '{"generations": [{}]}', '{"generations": 3}', "[]", "x"]
)
def test_what_is_no_generations_is_told(text, tmp_path, monkeypatch, shared_file):
    monkeypatch.setenv("AIS_SHARED", str(shared_file("data").parent))
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"file\.json"):
        rescore.rescore([str(path)], "gsm8k")
    with pytest.raises(UserError, match="absent"):
        rescore.rescore([str(tmp_path / "absent")], "gsm8k")


def test_d1_is_shown_whether_a_completion_has_ended():
    texts = benchmarks.with_ends(["a", "b"], [True, False], "d1")
    assert texts == ["a", "b<|endoftext|>"]
    assert benchmarks.with_ends(["a", "b"], [True, False], "own") == ["a", "b"]


def test_generations_that_were_cut_are_scored_as_such(tmp_path):
    example = {"puzzle": "3102200002100320", "solution": "3142243142131324"}
    data = tmp_path / "puzzles.csv"
    data.write_text(f"Puzzle,Solution\n{example['puzzle']},{example['solution']}\n")
    path = tmp_path / "generations.jsonl"
    row = {"index": 0, "completion": "<answer>31422431"}
    for cut, want in ((False, 0.5), (True, 0.0)):
        path.write_text(json.dumps({**row, "truncated": cut}) + "\n")
        scored = {
            x.scorer: x.estimate.value for x in rescore.rescore([str(path)], "sudoku", str(data))
        }
        assert scored == {"own, accuracy": 0, "own, cell accuracy": 0.5, "d1, cell accuracy": want}


def test_the_table_keeps_the_cells_of_before(qwen3, tmp_path):
    folder = evaluate(qwen3, options(limit=4), tmp_path / "out")
    evaluate(qwen3, options(limit=4, recipes=("int4",)), folder)
    evaluate(qwen3, options(limit=4, lengths=(6,)), folder)
    cells = [(r["recipe"], r["length"]) for r in results(folder)]
    assert cells == [("none", 4), ("int4", 4), ("none", 6)]
    assert "| rollout | Arithmetic / 4 | Arithmetic / 6 |" in (folder / "table.md").read_text()
    (folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"results\.json is damaged"):
        evaluate(qwen3, options(limit=4), folder)


def test_another_decoding_or_model_is_not_gone_on_with(llada, qwen3, tmp_path):
    folder = evaluate(llada, options(limit=2), tmp_path / "out")
    with pytest.raises(UserError, match=r"diffusion=None, not \{'steps': 2\}"):
        evaluate(llada, options(limit=2, diffusion={"steps": 2}), folder)
    with pytest.raises(UserError, match="holds an evaluation with model="):
        evaluate(qwen3, options(limit=2), folder)
    with pytest.raises(UserError, match="stepps: unknown key"):
        evaluate(llada, options(limit=2, diffusion={"stepps": 2}), tmp_path / "other")


@pytest.mark.parametrize("row", [{"index": "a"}, {"counts": {}}, {"tokens": "x"}, {"truncated": 1}])
def test_rows_of_wrong_types_are_told(qwen3, tmp_path, row):
    folder = evaluate(qwen3, options(limit=2), tmp_path / "out")
    path = folder / "arithmetic-4-none.jsonl"
    first = json.loads(path.read_text().splitlines()[0])
    path.write_text(json.dumps({**first, **row}) + "\n")
    with pytest.raises(UserError, match="line 1 is no generation"):
        evaluate(qwen3, options(limit=2), folder)


@pytest.mark.parametrize("changes", [{"seed": 2**31}, {"temperature": float("nan")},
                                     {"temperature": float("inf")}])  # fmt: skip
def test_numbers_out_of_range_are_told(changes):
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"--{name}"):
        options(**changes)


def test_samples_of_a_problem_are_not_independent(tmp_path):
    data, path = tmp_path / "problems.jsonl", tmp_path / "generations.jsonl"
    problems = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(10)]
    data.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    rows = [{"index": i, "completion": "\\boxed{3}"} for i in range(10)]
    errors = []
    for samples in (1, 16):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows * samples))
        own, _ = rescore.rescore([str(path)], "gsm8k", str(data))
        assert own.generations == 10 * samples
        assert own.estimate.value == 0.1
        errors.append(own.estimate.error)
    assert errors[0] == errors[1]


def test_thoughts_are_left_out_of_what_is_scored_again(tmp_path):
    data, path = tmp_path / "problems.jsonl", tmp_path / "generations.jsonl"
    data.write_text('{"question": "2 + 1?", "answer": "#### 3"}\n')
    path.write_text('{"index": 0, "completion": "so 3, or", "truncated": true}\n')
    for thinking, want in ((False, 1.0), (True, 0.0)):
        (tmp_path / "eval.json").write_text(json.dumps({"thinking": thinking}))
        own, _ = rescore.rescore([str(path)], "gsm8k", str(data))
        assert own.estimate.value == want


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("gsm8k", {"question": "?", "generations": None, "ground_truth": 3.0}),
        ("math500", {"question": "?", "generations": "", "ground_truth": None}),
        ("countdown", {"question": "?", "generations": "", "ground_truth": [["a", 2], 3]}),
        ("sudoku", {"question": "0" * 16, "generations": "", "ground_truth": "12"}),
    ],
)
def test_malformed_generations_of_d1s_layout_are_told(tmp_path, task, row):
    path = tmp_path / "generations.json"
    path.write_text(json.dumps({"generations": [row]}))
    with pytest.raises(UserError, match="is malformed"):
        rescore.rescore([str(path)], task)
    if task == "gsm8k":
        path.write_text('{"index": -1, "completion": ""}\n')
        (tmp_path / "data.jsonl").write_text('{"question": "?", "answer": "#### 3"}\n')
        with pytest.raises(UserError, match="is malformed"):
            rescore.rescore([str(path)], task, str(tmp_path / "data.jsonl"))
