"""Part b of rollout.py: this package beside what else samples and trains."""

from __future__ import annotations

import multiprocessing
import pathlib
import tempfile

import numpy as np
from common import spread, table
from contestants import Entry, Turns, take_turns
from rollout_options import Options, bar, memory
from rollout_recipes import Measured, columns, lengths, measured
from rollout_shapes import CONFIGS, export, random_prompts

SAMPLERS = {
    "transformers": ("peers/transformers_generate.py", 2.0),
    "tunix": ("peers/tunix_sampler.py", 1.5),
}
TRL, TRL_BAR = "trl", 2.0
OURS = "ais_jax"
STEP_ROWS, STEP_PROMPT, STEP_TOKENS = 8, 64, 128


def peers(options: Options) -> list[str]:
    """Part b."""
    lines = []
    if {name for name, _ in options.peers} & SAMPLERS.keys():
        lines += samplers(options)
    if TRL in dict(options.peers):
        lines += [*([""] if lines else []), *steps(options)]
    return lines or ["No --peer was given."]


def folder_of(model: str, dtype: str, parent: str) -> str:
    """A model folder, written by a process whose memory ends with it."""
    folder = str(pathlib.Path(parent) / f"{model}-{dtype}")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=export, args=(model, dtype, folder))
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{folder} could not be written")
    return folder


def samplers(options: Options) -> list[str]:
    """Rollouts of one and the same model."""
    prompts = random_prompts(CONFIGS[options.model], max(options.peer_rows), options.prompt_tokens)
    job = {
        **{"model": options.model, "dtype": options.dtype, "recipe": "none"},
        **{"prompts": prompts.tolist(), "new_tokens": options.new_tokens},
    }
    with tempfile.TemporaryDirectory() as parent:
        job["folder"] = folder_of(options.model, options.dtype, parent)
        entries = {OURS: Entry("worker_rollout.py", job)}
        for name, python in options.peers:
            if name in SAMPLERS:
                entries[name] = Entry(SAMPLERS[name][0], job, python)
        turns = take_turns(
            entries,
            options.peer_rows,
            lambda name, rows: lengths(options, rows),
            options.repeats,
            alone=options.alone,
            timeout=options.timeout,
        )
    lines, bars = [], []
    for rows in options.peer_rows:
        ours = measured(options, turns, OURS, rows)
        for name in entries:
            one = measured(options, turns, name, rows)
            lines.append((rows, _label(turns, name), *columns(one, slower=one, faster=ours)))
            asked = (options.platform, options.dtype, rows) == ("cpu", "bfloat16", 8)
            if name in SAMPLERS and asked and options.model in ("71m", "0.6b"):
                text = f"ours against {name}, {rows} rows, {options.dtype}"
                bars.append(bar(text, _times(ours, one), SAMPLERS[name][1]))
    head = ("rows", "", "s a rollout", "tokens/s", "ours is times as fast", "decode tokens/s")
    text = (
        f"{options.setting} The same weights in {options.dtype}, nothing quantized; all sample "
        f"from the whole distribution. Only ours also records log-probs. {options.memory}"
    )
    return [text, "", *table((*head, "times", "peak MiB"), *lines), "", *bars]


def _label(turns: Turns, name: str) -> str:
    return turns.about.get(name, {}).get("about", name)


def _times(ours: Measured | str, one: Measured | str) -> float | None:
    if isinstance(ours, str) or isinstance(one, str):
        return None
    return float(np.median(one.whole / ours.whole))


def steps(options: Options) -> list[str]:
    """GRPO steps of one and the same model."""
    model = "tiny" if options.model == "tiny" else "71m"
    prompts = random_prompts(CONFIGS[model], STEP_ROWS, STEP_PROMPT)
    job = {
        **{"model": model, "dtype": "float32", "recipe": "none", "rows": STEP_ROWS},
        **{"prompts": prompts.tolist(), "new_tokens": STEP_TOKENS},
    }
    with tempfile.TemporaryDirectory() as parent:
        job["folder"] = folder_of(model, "float32", parent)
        turns = take_turns(
            {
                OURS: Entry("worker_step.py", job),
                TRL: Entry("peers/trl_step.py", job, dict(options.peers)[TRL]),
            },
            ["step"],
            lambda name, case: [{}],
            options.repeats,
            alone=options.alone,
            timeout=options.timeout,
        )
    seconds, lines = {}, []
    for name in (OURS, TRL):
        failure = turns.failure(name, "step")
        if failure is not None:
            lines.append((_label(turns, name), failure, "", ""))
            continue
        answers = [r[0] for r in turns.rounds[name, "step"]]
        seconds[name] = np.array([a["seconds"] for a in answers])
        times = spread(seconds[name] / seconds[OURS], 2) if OURS in seconds else ""
        peak = f"{max(memory(a) for a in answers):,.0f}"
        lines.append((_label(turns, name), spread(seconds[name], 2), times, peak))
    ratio = float(np.median(seconds[TRL] / seconds[OURS])) if len(seconds) == 2 else None
    text = (
        f"A GRPO step of the {model} model in float32: a prompt of {STEP_PROMPT} tokens, "
        f"{STEP_ROWS} completions of {STEP_TOKENS}, one update of AdamW."
    )
    bars = [bar("a step against TRL's", ratio, TRL_BAR)] if model == "71m" else []
    head = ("", "s a step", "ours is times as fast", "peak MiB")
    return [text, "", *table(head, *lines), "", *bars]
