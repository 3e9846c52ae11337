"""Whole runs of a very small job: files, resume, a user's reward, options of the loop."""

import concurrent.futures
import dataclasses
import json
import signal
import threading
import time

import jax
import numpy as np
import pytest
from tiny_job import QWEN3

import ais_jax
from ais_jax import config as config_lib
from ais_jax import settings
from ais_jax.errors import UserError
from ais_jax.models.tokenizers import CharTokenizer
from ais_jax.sampling import Rollout
from ais_jax.sampling.prompts import Prompter
from ais_jax.tasks import get_task
from ais_jax.train import checkpoint, data, loop, warmup
from ais_jax.train.collect import Sampled, select_groups
from ais_jax.train.metrics import read_metrics
from ais_jax.train.setup import build_examples, build_run, drop_long, initial_params
from ais_jax.train.warmup import fingerprint

REQUIRED = {
    "step",
    "reward",
    "accuracy",
    "coefficient",
    "reliability",
    "severity",
    "amplification",
    "loss",
    "grad_norm",
    "entropy",
    "completion_length",
    "rollout_seconds",
    "reward_seconds",
    "checkpoint_seconds",
    "score_seconds",
    "train_seconds",
    "quantize_seconds",
    "tokens_per_second",
}
# What the machine decides differs between two runs of the same thing.
CLOCKED = ("_seconds", "_per_second", "_gib")


@pytest.fixture
def job(tmp_path, monkeypatch):
    """(make a config, output folder) of a job of a few seconds, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("AIS_SHARED", str(tmp_path))

    def make(name="run", **changes):
        config = settings.build(
            config_lib.Config,
            {
                "model": {"qwen3": QWEN3},
                "task": {
                    "train_examples": 256,
                    "heldout_examples": 32,
                    "countdown": {"max_number": 12, "listed_in_order": True},
                },
                "warmup": {"steps": 30, "batch_size": 64},
                "rollout": {"max_prompt_tokens": 16, "max_new_tokens": 10},
                "grpo": {"batch_size": 16, "group_size": 4},
                "ais": {"severity_scale": "auto"},
                "train": {"steps": 4, "eval_batch_size": 32, "samples_every": 2},
                "mesh": {"data": 8},
                "output_dir": str(tmp_path / name),
            },
        )
        return settings.replace(config, changes)

    return make, tmp_path


def metrics_of(folder):
    rows = read_metrics(folder / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.endswith(CLOCKED)} for row in rows]


def varied(completions, examples):
    """A reward that differs within most groups of an untrained policy."""
    return [len(set(text)) for text in completions]


@pytest.mark.smoke
def test_a_run_writes_what_it_promises(job, capsys):
    make, folder = job
    summary = ais_jax.train(make())
    run = folder / "run"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert row.keys() >= REQUIRED
        assert 0 <= row["coefficient"] <= 1
        assert 0 < row["severity"] < 1
        assert row["severity_scale"] == pytest.approx(
            np.clip(0.5 * np.mean([r["severity"] for r in rows[: row["step"]]]), 0.005, 0.1)
        )
    for name in ("config.yaml", "curves.png", "samples.jsonl", "summary.json"):
        assert (run / name).stat().st_size > 0
    assert list((run / "tensorboard").glob("events*"))
    assert json.loads((run / "summary.json").read_text()) == summary
    assert 0 <= summary["after"]["heldout_accuracy"] <= 1
    assert settings.load(config_lib.Config, run / "config.yaml") == make()
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "example", "completion", "reward"} <= sample.keys()
    assert "heldout_accuracy" in capsys.readouterr().out


def test_interrupted_and_resumed_equals_uninterrupted(job):
    make, folder = job
    kl = {"grpo.kl_coef": 0.1}  # its reference is the policy before GRPO, also after a restart
    summary = ais_jax.train(make("whole", **kl), varied)
    ais_jax.train(make("parts", **kl, **{"train.steps": 2}), varied)
    again = ais_jax.train(make("parts", **kl), varied)
    assert all(again[name] == summary[name] for name in ("before", "after"))
    whole, parts = (metrics_of(folder / name) for name in ("whole", "parts"))
    assert whole == parts
    assert all(row["codes_changed"] > 0 for row in whole)
    assert all(row["grad_norm"] > 0 for row in whole)

    states = []
    for name in ("whole", "parts"):
        with checkpoint.manager(folder / name / "checkpoints") as manager:
            states.append(manager.restore(4).state)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_run_that_dies_goes_on_from_its_last_checkpoint(job, capsys):
    make, folder = job
    often = {"train.checkpoint_every": 2, "train.eval_every": 2, "train.steps": 6}
    ais_jax.train(make("whole", **often), varied)
    calls = []

    def dies_at_step_6(completions, examples):
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return varied(completions, examples)

    with pytest.raises(KeyboardInterrupt):
        ais_jax.train(make("parts", **often), dies_at_step_6)
    ais_jax.train(make("parts", **often, **{"train.samples_every": 3}), varied)
    text = capsys.readouterr().out
    assert "going on after step 4" in text
    assert "other settings than before: train.samples_every" in text
    whole, parts = (metrics_of(folder / name) for name in ("whole", "parts"))
    assert whole == parts
    assert [row["step"] for row in whole if "eval_accuracy" in row] == [2, 4, 6]


def test_told_to_leave_in_the_middle_of_a_step(job):
    make, folder = job
    ais_jax.train(make("whole"), varied)
    calls = []

    def told_in_step_3(completions, examples):
        calls.append(None)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return varied(completions, examples)

    with pytest.raises(SystemExit) as caught:
        ais_jax.train(make("parts"), told_in_step_3)
    assert caught.value.code == 143
    assert [path.name for path in (folder / "parts" / "checkpoints").glob("[0-9]*")] == ["2"]
    ais_jax.train(make("parts"), varied)
    assert metrics_of(folder / "parts") == metrics_of(folder / "whole")


def test_a_phase_that_hangs_is_named(job, capsys):
    make, _ = job
    said = [""]

    def hangs_until_it_is_named(completions, examples):
        end = time.monotonic() + 60
        while "reward has not ended" not in said[0] and time.monotonic() < end:
            said[0] += capsys.readouterr().out
        return varied(completions, examples)

    config = make(**{"train.steps": 1, "warmup.steps": 0, "train.watchdog_seconds": 0.05})
    ais_jax.train(config, hangs_until_it_is_named)
    assert "warning: reward has not ended for" in said[0]


def test_a_checkpoint_of_another_model_is_refused(job):
    make, folder = job
    ais_jax.train(make())
    config = (folder / "run" / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"checkpoints/4 does not fit .*params.*\[21, 32\] there"):
        ais_jax.train(make(**{"model.qwen3.hidden_size": 64, "train.steps": 6}))
    assert (folder / "run" / "config.yaml").read_text() == config


def test_the_warm_up_is_cached_by_what_it_depends_on(job):
    make, _ = job
    assert not ais_jax.train(make("a"))["warmup_cached"]
    again = ais_jax.train(make("b", **{"optimizer.learning_rate": 0.1}))
    assert again["warmup_cached"]
    assert not ais_jax.train(make("c", **{"warmup.steps": 31}))["warmup_cached"]
    assert not ais_jax.train(make("d", **{"warmup.cache": False}))["warmup_cached"]


def test_a_cache_that_cannot_be_used_costs_a_warm_up(job, capsys, monkeypatch):
    make, folder = job
    first = ais_jax.train(make("a"))
    (kept,) = (p for p in (folder / "cache" / "ais_jax").iterdir() if p.is_dir())
    for part in kept.rglob("d/*"):
        half = part.stat().st_size // 2
        part.write_bytes(part.read_bytes()[:half] + bytes(half))
    again = ais_jax.train(make("b"))
    assert not again["warmup_cached"] and again["before"] == first["before"]
    assert f"warning: the warm-up in {kept} is damaged: " in capsys.readouterr().out
    assert ais_jax.train(make("c"))["warmup_cached"]  # it was replaced
    assert [p for p in (folder / "cache" / "ais_jax").iterdir() if p.is_dir()] == [kept]

    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert not ais_jax.train(make("d"))["warmup_cached"]
    assert "warning: the warm-up is not kept in " in capsys.readouterr().out


def test_of_runs_that_want_a_warm_up_at_once_one_makes_it(job, monkeypatch, tmp_path):
    make, _ = job
    config = make()
    made, waited = [], threading.Event()

    def slow(*arguments):
        made.append(threading.current_thread())
        assert waited.wait(60)  # until the other has asked whether it is to leave
        return original(*arguments)

    def between():
        if made and threading.current_thread() not in made:
            waited.set()

    def warm(_):
        run = build_run(config, tmp_path)
        params, frozen = initial_params(run)
        run = dataclasses.replace(run, frozen=frozen)
        examples = drop_long(build_examples(config), run.prompter).train
        return warmup.warm_up(run, params, examples, tmp_path / "warm", between)

    original = warmup._train
    monkeypatch.setattr(warmup, "_train", slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = list(pool.map(warm, range(2)))
    assert sorted(cached for _, cached in found) == [False, True] and len(made) == 1
    jax.tree.map(np.testing.assert_array_equal, found[0][0], found[1][0])


def test_a_run_that_goes_on_is_warmed_up_only_for_a_reference(job, monkeypatch):
    make, _ = job
    for name, changes in {"plain": {}, "reference": {"grpo.kl_coef": 0.1}}.items():
        changes = {"warmup.cache": False, **changes}
        ais_jax.train(make(name, **changes, **{"train.steps": 2}))
        with monkeypatch.context() as patched:
            if name == "plain":
                patched.setattr("ais_jax.train.run.warm_up", None)
            resumed = ais_jax.train(make(name, **changes))
        whole = ais_jax.train(make(f"{name} whole", **changes))
        assert resumed["after"] == whole["after"]


def test_the_warm_up_depends_on_the_problems_themselves(job):
    """Those are fewer where the real file, whose puzzles are left out, is present."""
    make, folder = job
    config = make(**{"task.eval_file": "real.jsonl"})
    prompter = Prompter(get_task("countdown"), CharTokenizer("01"), 16, 10)
    absent = build_examples(config)
    (folder / "real.jsonl").write_text(json.dumps(absent.train[0]) + "\n")
    present = build_examples(config)
    assert fingerprint(config, prompter, absent.train) == fingerprint(
        config, prompter, list(absent.train)
    )
    assert fingerprint(config, prompter, absent.train) != fingerprint(
        config, prompter, present.train
    )


def test_a_users_reward_is_what_is_learned(job):
    """Rewarding the length of completions changes it; the task's own reward is not asked."""
    make, folder = job

    def length(completions, examples):
        assert len(completions) == len(examples) == 64
        assert "numbers" in examples[0]
        return [float(len(text)) for text in completions]

    config = make(**{"train.steps": 25, "optimizer.learning_rate": 3e-3, "grpo.batch_size": 64})
    ais_jax.train(config, reward_fn=length)
    rows = metrics_of(folder / "run")
    first, last = (
        np.mean([r["completion_length"] for r in part]) for part in (rows[:5], rows[-5:])
    )
    assert last > first + 1


def test_rewards_are_composed_and_each_is_recorded(job):
    make, folder = job
    config = make(
        **{
            "train.steps": 2,
            "rewards": {"correct": 1.0, "format": 0.5, "d1": 0.25},
            "grpo.overlong_buffer": 10,
            "grpo.overlong_penalty": 0.1,
        }
    )
    ais_jax.train(config)
    for row in metrics_of(folder / "run"):
        assert row["reward/correct"] == pytest.approx(row["accuracy"])
        assert row["reward/overlong"] < 0
        assert row["reward/format"] == 0  # nothing is marked in the compact style
        total = row["reward/correct"] + 0.1 * row["reward/overlong"]
        total += 0.25 * row["reward/d1/equation"]
        assert row["reward"] == pytest.approx(total, abs=1e-6)


def test_a_task_without_other_terms_records_the_reward_alone(job):
    make, folder = job
    ais_jax.train(make(**{"train.steps": 1}))
    (row,) = metrics_of(folder / "run")
    assert not [name for name in row if name.startswith("reward/")]
    assert row["reward"] == pytest.approx(row["accuracy"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (np.zeros(3), "16 numbers.*shape"),
        (np.full(16, np.nan), "nan for completion 0"),
        (None, "16 numbers"),
        (["good"] * 16, "16 numbers"),
    ],
)
def test_a_bad_reward_function_is_told(job, returned, message):
    make, _ = job
    with pytest.raises(UserError, match=message):
        ais_jax.train(make(**{"warmup.steps": 0}), reward_fn=lambda c, e: returned)


def test_a_reward_that_raises_costs_its_row(job, capsys):
    make, folder = job

    def fails_for_the_third(completions, examples):
        if len(completions) > 1:
            calls.clear()
            raise ValueError("no batch")
        calls.append(None)
        if len(calls) == 3:
            raise ValueError("not this one")
        return varied(completions, examples)

    calls = []
    ais_jax.train(make(**{"warmup.steps": 0, "train.steps": 2}), fails_for_the_third)
    assert [row["reward_failures"] for row in metrics_of(folder / "run")] == [1, 1]
    text = "failed for 1 of 16 completions, for completion 2 by ValueError: not this one"
    assert capsys.readouterr().out.count(text) == 2


def test_a_run_that_cannot_learn_stops_with_its_batch(job, monkeypatch):
    """The gradient is not finite from the third step on."""
    make, folder = job
    build_batch, calls = loop.build_batch, []

    def poisoned(*args):
        batch, entropy = build_batch(*args)
        calls.append(None)
        if len(calls) > 2:
            batch = batch._replace(advantages=batch.advantages * np.nan)
        return batch, entropy

    config = make(**{"train.max_skipped_updates": 2, "train.steps": 9, "warmup.steps": 0})
    with monkeypatch.context() as patch:
        patch.setattr(loop, "build_batch", poisoned)
        with pytest.raises(UserError, match=r"step 4: .*last 2 updates .*nonfinite_step_4; lower"):
            ais_jax.train(config, varied)
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["loss"] is None for row in rows] == [False, False, True, True]
    kept = folder / "run" / "nonfinite_step_4"
    texts = json.loads((kept / "rows_0.json").read_text())
    with np.load(kept / "batch_0.npz") as batch:
        assert batch["tokens"].shape == (16, 10)
        np.testing.assert_array_equal(batch["rewards"], [row["reward"] for row in texts])
    np.testing.assert_array_equal(
        [len(set(row["completion"])) for row in texts], [row["reward"] for row in texts]
    )
    # What it had learned before is saved, and goes on to be learned.
    ais_jax.train(settings.replace(config, {"train.steps": 5}), varied)
    rows = read_metrics(folder / "run" / "metrics.jsonl")
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False]


def test_another_mesh_goes_on_from_the_same_numbers(job, capsys):
    make, folder = job
    short = {"warmup.steps": 0, "task.heldout_examples": 8, "train.eval_batch_size": 8}
    ais_jax.train(make("whole", **short, **{"train.steps": 3}), varied)
    ais_jax.train(make("parts", **short, **{"train.steps": 2}), varied)
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    ais_jax.train(make("parts", **short, **mesh, **{"train.steps": 3}), varied)
    assert "going on after step 2" in capsys.readouterr().out
    whole, parts = (metrics_of(folder / name) for name in ("whole", "parts"))
    assert whole[:2] == parts[:2]
    for name in ("reward", "loss", "grad_norm", "severity"):
        assert parts[2][name] == pytest.approx(whole[2][name], rel=1e-2, abs=1e-4)


def test_a_run_that_begins_again_keeps_what_was_there(job, capsys):
    make, folder = job
    config = make(**{"train.steps": 1, "warmup.steps": 0})
    ais_jax.train(config, varied)
    before = (folder / "run" / "metrics.jsonl").read_bytes()
    ais_jax.train(config, varied, resume=False)
    assert (folder / "run-2" / "metrics.jsonl").read_bytes() == before
    assert "is now" in capsys.readouterr().out
    assert len(metrics_of(folder / "run")) == 1


def test_options_of_the_loop(job):
    """Inner epochs, minibatches, micro-batches, KL, truncation and dynamic sampling together."""
    make, folder = job
    changes = {
        "grpo.inner_epochs": 2,
        "grpo.minibatches": 2,
        "grpo.micro_batch_size": 4,
        "grpo.kl_coef": 0.1,
        "grpo.mask_truncated": True,
        "grpo.dynamic_sampling": True,
        "grpo.advantages": "leave_one_out",
        "ais.policy_ratio": "sequence",
        "ais.aggregation": "sequence_mean",
        "mesh.data": 2,
        "mesh.fsdp": 2,
        "mesh.tensor": 2,
    }
    ais_jax.train(make("kl", **changes), varied)
    rows = metrics_of(folder / "kl")
    assert rows[-1]["kl"] > 0
    assert all(row["sequences"] <= 16 for row in rows)
    ais_jax.train(make("free", **{**changes, "grpo.kl_coef": 0.0}), varied)
    assert all(row["kl"] == 0 for row in metrics_of(folder / "free"))


def test_runs_of_different_seeds_may_begin_at_one_policy(job):
    make, folder = job
    both = {"warmup.seed": 3, "warmup.cache": False, "train.steps": 1, "optimizer.learning_rate": 0}
    found = [ais_jax.train(make(f"s{seed}", **both, **{"train.seed": seed})) for seed in (0, 1)]
    # Greedy decoding shows the policy, samples the seed.
    assert found[0]["before"]["heldout_accuracy"] == found[1]["before"]["heldout_accuracy"]
    rewards = [read_metrics(folder / f"s{seed}" / "samples.jsonl")[0] for seed in (0, 1)]
    assert rewards[0]["example"] != rewards[1]["example"]
    other = ais_jax.train(make("other", **{**both, "warmup.seed": None, "train.seed": 3}))
    assert other["before"]["heldout_accuracy"] == found[0]["before"]["heldout_accuracy"]
    run = [build_run(make(**both, **{"train.seed": seed}), folder) for seed in (0, 1)]
    one, same = (initial_params(r)[0] for r in run)
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), one, same)))
    different = initial_params(build_run(make(**{"warmup.seed": 4}), folder))[0]
    assert not all(jax.tree.leaves(jax.tree.map(lambda a, b: (a == b).all(), one, different)))


def test_evaluations_between_take_a_part_and_several_samples(job):
    make, folder = job
    changes = {"eval_every": 2, "eval_examples": 8, "eval_samples": 3, "eval_before": False}
    summary = ais_jax.train(make(**{f"train.{key}": value for key, value in changes.items()}))
    assert summary["before"] == {}
    assert set(summary["after"]) == {"heldout_accuracy", "heldout_sampled_accuracy"}
    for row in read_metrics(folder / "run" / "metrics.jsonl"):
        if row["step"] % 2:
            assert "eval_accuracy" not in row
            continue
        assert (row["eval_accuracy"] * 8) % 1 == 0
        mean, any_of_three = row["eval_sampled_accuracy"], row["eval_pass_at_3"]
        assert (mean * 24) % 1 == pytest.approx(0, abs=1e-6) or (mean * 24) % 1 > 1 - 1e-6
        assert mean <= any_of_three <= min(3 * mean, 1) + 1e-9
        assert row["accuracy"] <= row["group_accuracy"] <= min(4 * row["accuracy"], 1) + 1e-9


def test_dynamic_sampling_refills_with_groups_that_differ(job):
    make, folder = job
    calls = []

    def rare(completions, examples):
        """In the first round of a step only the first group has any variance."""
        calls.append(len(completions))
        rewards = np.zeros(len(completions), np.float32)
        rewards[0] = 1
        return rewards

    config = make(**{"grpo.dynamic_sampling": True, "train.steps": 1, "warmup.steps": 0})
    ais_jax.train(config, reward_fn=rare)
    assert calls == [16, 16, 16, 16]
    row = metrics_of(folder / "run")[0]
    # Reward and shares are of all that was sampled, not of the groups that were kept.
    assert row["reward"] == pytest.approx(1 / 16)
    assert row["zero_variance_fraction"] == pytest.approx(0.75)
    assert row["grad_norm"] > 0


def test_groups_that_differ_are_selected_row_by_row():
    """Every array and list of a selected row is that row's, from whichever round it came."""

    def sampled(first, rewards):
        ids = np.arange(first, first + 4)
        mask = np.ones((4, 3), bool)
        rollout = Rollout(ids[:, None], mask, ids[:, None] * 10, mask, ids[:, None] / 2, mask[:, 0])
        texts = [str(i) for i in ids]
        rewards = np.array(rewards, np.float32)
        examples, terms = [{"i": i} for i in ids], {"format": float(first)}
        return Sampled(rollout, examples, texts, rewards, 0, 0, 0, 0.5, 12, 0.5, 0.25, terms)

    rounds = [sampled(0, [1, 1, 0, 1]), sampled(4, [2, 2, 3, 0])]
    chosen = select_groups(rounds, group_size=2, groups=3)
    rows = [2, 3, 6, 7, 0, 1]  # the two groups that differ, then the first that does not
    np.testing.assert_array_equal(chosen.rollout.prompts[:, 0], rows)
    np.testing.assert_array_equal(chosen.rollout.tokens[:, 0], np.multiply(rows, 10))
    np.testing.assert_array_equal(chosen.rollout.logps[:, 0], np.divide(rows, 2))
    assert [example["i"] for example in chosen.examples] == rows
    assert chosen.completions == [str(i) for i in rows]
    np.testing.assert_array_equal(chosen.rewards, [0, 1, 3, 0, 1, 1])
    assert (chosen.reward, chosen.informative) == (10 / 8, 2 / 4)
    assert (chosen.count, chosen.seconds, chosen.solved) == (24, 1.0, 0.5)


def test_iteration_order_is_saved_and_differs_between_epochs():
    examples = [{"i": i} for i in range(10)]
    iterator = data.batches(examples, 5, seed=3)
    epochs = [[x["i"] for _ in range(2) for x in next(iterator)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    state = json.loads(json.dumps(iterator.get_state(), default=int))
    expected = [next(iterator) for _ in range(4)]
    other = data.batches(examples, 5, seed=3)
    other.set_state(state)
    assert [next(other) for _ in range(4)] == expected


def test_real_puzzles_are_never_trained_on(job):
    make, folder = job
    plain = build_examples(make())
    stolen = [plain.train[0], plain.train[7]]
    path = folder / "real.jsonl"
    path.write_text("".join(json.dumps(example) + "\n" for example in stolen))
    examples = build_examples(make(**{"task.eval_file": "real.jsonl"}))
    assert len(examples.real) == 2

    def keys(rows):
        return {(tuple(sorted(row["numbers"])), row["target"]) for row in rows}

    assert not keys(stolen) & keys(examples.train)
    assert not keys(examples.train) & keys(examples.heldout)
