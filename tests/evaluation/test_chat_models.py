"""Models with a chat template: d1's protocol of a diffusion model, thinking, the command itself."""

import json
import subprocess
import sys

import jax
import pytest
from tiny_job import one_device
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ais_jax.errors import UserError
from ais_jax.evaluation import run
from ais_jax.evaluation.run import Options, evaluate
from ais_jax.mesh import MeshConfig
from ais_jax.models import LladaConfig, Qwen3Config, build, save_pretrained
from ais_jax.sampling import autoregressive
from ais_jax.tasks import d1

SPECIAL = ["<|endoftext|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<think>", "</think>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
VOCABULARY = {token: i for i, token in enumerate([*BYTES, *SPECIAL])}
TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|eot_id|>{% endfor %}<|assistant|>"
    "{% if enable_thinking %}<think>{% endif %}"
)
SIZES = {"vocab_size": 272, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip
QWEN3 = Qwen3Config(**SIZES)
LLADA = LladaConfig(
    vocab_size=272,
    d_model=16,
    mlp_hidden_size=32,
    n_layers=1,
    n_heads=2,
    n_kv_heads=2,
    mask_token_id=271,
)
PUZZLE = {"puzzle": "3102200002100320", "solution": "3142243142131324"}


def saved(sizes, folder):
    model = build(sizes, "float32")
    save_pretrained(model, model.init(jax.random.key(0)), folder)
    backend = Tokenizer(models.BPE(VOCABULARY, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|eot_id|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return saved(QWEN3, tmp_path_factory.mktemp("chat") / "qwen3")


@pytest.fixture(scope="module")
def llada(tmp_path_factory):
    return saved(LLADA, tmp_path_factory.mktemp("chat") / "llada")


@pytest.fixture
def puzzles(tmp_path):
    path = tmp_path / "puzzles.csv"
    path.write_text(f"Puzzle,Solution\n{PUZZLE['puzzle']},{PUZZLE['solution']}\n")
    return str(path)


@pytest.fixture
def posed(monkeypatch):
    """(policies, texts of prompts) of every rollout."""
    seen, inner = [], run.Policy.rollout

    def rollout(self, params, prompts, mask, keys, mesh=None):
        texts = [bytes_of(row[kept]) for row, kept in zip(prompts, mask, strict=True)]
        seen.append((self, texts))
        return inner(self, params, prompts, mask, keys, mesh)

    monkeypatch.setattr(run.Policy, "rollout", rollout)
    return seen


def bytes_of(ids):
    backend = Tokenizer(models.BPE(VOCABULARY, []))
    backend.decoder = decoders.ByteLevel()
    names = {i: token for token, i in VOCABULARY.items()}
    return backend.decoder.decode([names[int(i)] for i in ids])


def test_a_diffusion_model_is_asked_as_d1_asks(llada, puzzles, tmp_path, posed):
    options = Options(("sudoku",), lengths=(32, 64), data=puzzles, batch_size=8)
    folder = evaluate(llada, options, tmp_path / "out")
    settings = json.loads((folder / "eval.json").read_text())
    assert (settings["protocol"], settings["temperature"]) == ("d1", 0.0)
    for (policy, texts), length in zip(posed, (32, 64), strict=True):
        sampling = policy.sampling
        assert (sampling.max_new_tokens, sampling.temperature) == (length, 0.0)
        assert (sampling.settings.block_length, sampling.settings.steps) == (32, length // 2)
        assert sampling.settings.remasking == "low_confidence"
        turn = d1.prompt("sudoku", PUZZLE, evaluation=True)
        assert texts[0] == f"<|user|>{turn}<|eot_id|><|assistant|><reasoning>"
    assert "| Sudoku / 32 | Sudoku / 64 |" in (folder / "table.md").read_text()
    assert "cell accuracy" in (folder / "table.md").read_text()


def test_our_own_protocol_asks_in_our_words(llada, chat, puzzles, tmp_path, posed):
    from ais_jax.tasks import sudoku

    options = Options(("sudoku",), (32,), data=puzzles, batch_size=8, protocol="own")
    for name, model in (("llada", llada), ("chat", chat)):
        evaluate(model, options, tmp_path / name)
        policy, texts = posed.pop()
        turn = sudoku.prompt(PUZZLE, "instruct")
        assert texts[0] == f"<|user|>{turn}<|eot_id|><|assistant|>"
        assert policy.sampling.diffusion is None or policy.sampling.settings.steps is None


@pytest.mark.parametrize(("thinking", "opened"), [(True, "<think>"), (False, ""), (None, "")])
def test_thinking_is_an_argument_of_the_template(chat, puzzles, tmp_path, posed, thinking, opened):
    options = Options(("sudoku",), (8,), data=puzzles, batch_size=8, thinking=thinking)
    evaluate(chat, options, tmp_path / "out")
    assert posed[0][1][0].endswith(f"<|assistant|>{opened}")


def test_what_a_model_thinks_is_no_answer(chat, tmp_path, monkeypatch):
    """A completion is scored by what follows its thoughts; one that never gets there is wrong."""
    data = tmp_path / "problems.jsonl"
    data.write_text('{"question": "Half of 6?", "answer": "#### 3"}\n' * 1)
    texts = {"18</think>\\boxed{3}": 1, "\\boxed{3}": 0, "\\boxed{3}</think>4": 0}
    for i, (text, want) in enumerate(texts.items()):
        monkeypatch.setattr(run.Prompter, "completions", lambda self, rollout, t=text: [t] * 8)
        options = Options(("gsm8k",), (4,), data=str(data), batch_size=8, thinking=True)
        folder = evaluate(chat, options, tmp_path / f"out{i}")
        (result,) = json.loads((folder / "results.json").read_text())["results"]
        assert result["measures"]["accuracy"]["value"] == want


def test_diffusion_settings_are_for_diffusion_models(chat, llada, puzzles, tmp_path):
    options = Options(("sudoku",), (8,), data=puzzles, diffusion={"block_length": 8}, batch_size=8)
    with pytest.raises(UserError, match="--diffusion is for diffusion models"):
        evaluate(chat, options, tmp_path / "out")
    with pytest.raises(UserError, match="--lengths 12: "):
        evaluate(llada, Options(("sudoku",), (12,), data=puzzles, batch_size=8), tmp_path / "out")


def test_rows_are_sampled_in_slots(chat, puzzles, tmp_path, monkeypatch):
    seen, inner = [], autoregressive.rollout

    def rollout(model, params, prompts, mask, keys, config, *args):
        seen.append((len(keys), config.slots))
        return inner(model, params, prompts, mask, keys, config, *args)

    monkeypatch.setattr(autoregressive, "rollout", rollout)
    monkeypatch.setattr(run, "_ROUNDS", {"cpu": 4})
    options = Options(("sudoku",), (4,), data=puzzles, batch_size=8, samples=40, temperature=1.0)
    evaluate(chat, options, tmp_path / "out")
    assert seen == [(32, 8), (8, 8)]


def command(*args):
    return subprocess.run(
        [sys.executable, "-m", "ais_jax", *map(str, args)],
        capture_output=True,
        text=True,
        env=one_device(),
    )


def test_the_command_evaluates_and_scores(chat, tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text(
        "".join(f'{{"question": "{i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(5))
    )
    out = tmp_path / "out"
    asked = ["eval", chat, "--task", "gsm8k", "--data", data, "--lengths", "4,8", "--recipe"]
    result = command(*asked, "none,fp8", "--output", out, "--batch-size", 4, "--limit", 3)
    assert result.returncode == 0, result.stderr
    assert "| rollout | GSM8K / 4 | GSM8K / 8 |" in result.stdout
    assert "| unquantized | 0.00 ± 0.00 |" in result.stdout
    assert f"results: {out}" in result.stdout
    names = {f"gsm8k-{length}-{recipe}.jsonl" for length in (4, 8) for recipe in ("none", "fp8")}
    assert {path.name for path in out.glob("*.jsonl")} == names
    scored = command("score", *sorted(out.glob("*.jsonl")), "--task", "gsm8k", "--data", data)
    assert scored.returncode == 0, scored.stderr
    assert "own, accuracy: 0.00 ± 0.00 % of 12 generations" in scored.stdout
    assert "d1, accuracy: 0.00 ± 0.00 % of 12 generations" in scored.stdout


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["eval", "nowhere", "--task", "gsm8k"], "nowhere"),
        (["eval", "nowhere", "--task", "gsm9k"], "--task 'gsm9k' is unknown"),
        (["eval", "nowhere", "--task", "gsm8k", "--lengths", "a"], "--lengths 'a'"),
        (["eval", "nowhere", "--task", "gsm8k", "--recipe", "fp7"], "--recipe 'fp7'"),
        (["score", "nowhere", "--task", "gsm8k"], "nowhere"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args, part):
    result = command(*args)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert part in result.stderr


def test_a_template_that_opens_a_thought_is_noticed(chat):
    from ais_jax.models.tokenizers import load_tokenizer
    from ais_jax.sampling.prompts import Prompter
    from ais_jax.tasks import sudoku

    tokenizer = load_tokenizer(chat)
    for thinking, thinks in ((True, True), (False, False), (None, False)):
        prompter = Prompter(sudoku, tokenizer, 8, 8, chat=True, enable_thinking=thinking)
        assert prompter.thinks == thinks
        assert prompter.answers(["a</think>b", "c"]) == ["b", "" if thinks else "c"]
    assert Prompter(sudoku, tokenizer, 8, 8).answers(["c"]) == ["c"]


def test_settings_of_diffusion_replace_those_of_d1(llada, puzzles, tmp_path, posed):
    changed = {"block_length": 16}
    options = Options(("sudoku",), (32,), data=puzzles, batch_size=8, diffusion=changed)
    folder = evaluate(llada, options, tmp_path / "out")
    settings = posed[0][0].sampling.settings
    assert (settings.block_length, settings.steps) == (16, 16)
    assert json.loads((folder / "eval.json").read_text())["diffusion"] == changed


@pytest.mark.parametrize(("asked", "opened"), [(None, "<think>"), (False, "")])
def test_a_run_is_asked_as_it_was_trained(
    chat, puzzles, tmp_path, posed, monkeypatch, asked, opened
):
    """In its own words for the system and with its thinking, unless told otherwise."""
    loaded = run.policies.load_policy(chat, "float32", MeshConfig(data=-1))
    trained = tmp_path / "trained"
    (trained / "checkpoints" / "3").mkdir(parents=True)
    task = {"name": "sudoku", "system": "Be brief.", "enable_thinking": True}
    (trained / "config.yaml").write_text(json.dumps({"task": task}))
    monkeypatch.setattr(run.policies, "load_policy", lambda *_: loaded)
    options = Options(("sudoku",), (8,), data=puzzles, batch_size=8, thinking=asked)
    folder = evaluate(str(trained), options, tmp_path / "out")
    text = posed[0][1][0]
    assert text.startswith("<|user|>Be brief.<|eot_id|><|user|>")
    assert text.endswith(f"<|assistant|>{opened}")
    settings = json.loads((folder / "eval.json").read_text())
    assert (settings["thinking"], settings["opens_thought"]) == (asked, asked is None)
    assert settings["weights"][0].startswith("step 3 ")
