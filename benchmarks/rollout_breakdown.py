"""Part d of rollout.py: where the time of a GRPO step goes."""

from __future__ import annotations

import numpy as np
from common import spread, table
from contestants import Entry, take_turns
from rollout_options import Options, bar, memory
from rollout_peers import STEP_PROMPT, STEP_ROWS, STEP_TOKENS
from rollout_shapes import CONFIGS, random_prompts

# Short steps vary more.
STEPS_A_ROUND = 5
QUANTIZE_BAR = 0.02
PHASES = ("quantize", "prefill", "decode", "score", "train", "host")


def breakdown(options: Options) -> list[str]:
    """Part d."""
    model = "tiny" if options.model == "tiny" else "71m"
    prompts = random_prompts(CONFIGS[model], STEP_ROWS, STEP_PROMPT).tolist()
    shape = {"model": model, "rows": STEP_ROWS, "prompts": prompts, "new_tokens": STEP_TOKENS}
    entries = {path: Entry("worker_step.py", {"config": path}) for path in options.configs}
    for dtype, recipe in (("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8")):
        job = {**shape, "dtype": dtype, "recipe": recipe}
        entries[f"{model}, {dtype}, {recipe}"] = Entry("worker_step.py", job)
    turns = take_turns(
        entries,
        ["step"],
        lambda name, case: [{}] * (STEPS_A_ROUND if name in options.configs else 1),
        options.repeats,
        alone=options.alone,
        timeout=options.timeout,
    )
    lines, bars = [], []
    for name in entries:
        failure = turns.failure(name, "step")
        if failure is not None:
            lines.append((name, failure, *[""] * (len(PHASES) + 1)))
            continue
        answers = [answer for round_ in turns.rounds[name, "step"] for answer in round_]
        seconds = np.array([a["seconds"] for a in answers])
        whole, phases = float(np.median(seconds)), phases_of(answers)
        figures = [f"{1e3 * s:,.1f} ({100 * s / whole:.1f} %)" for s in phases.values()]
        peak = max(memory(a) for a in answers)
        lines.append((name, spread(1e3 * seconds, 0), *figures, f"{peak:,.0f}"))
        if name in options.configs:
            bars.append(
                bar(f"{name}: quantize", phases["quantize"] / whole, QUANTIZE_BAR, most=True)
            )
    text = (
        "Milliseconds of a step (share of the whole), medians, as the trainer writes them down. "
        "Prefill is the time of a rollout of one token of the same prompts and decode the rest of "
        f"the rollout; host is what no phase accounts for. The {model} model: a prompt of "
        f"{STEP_PROMPT} tokens, {STEP_ROWS} completions of {STEP_TOKENS}."
    )
    head = ("job: trainer, rollout", "step, ms", *PHASES, "peak MiB")
    return [text, "", *table(head, *lines), "", *bars]


def phases_of(answers: list[dict]) -> dict[str, float]:
    """Median seconds of each of `PHASES`."""
    columns = {k: np.array([a["phases"][k] for a in answers]) for k in answers[0]["phases"]}
    columns["decode"] = columns["rollout"] - columns["prefill"]
    named = sum(columns[k] for k in ("quantize", "rollout", "score", "train"))
    columns["host"] = np.array([a["seconds"] for a in answers]) - named
    return {name: float(np.median(columns[name])) for name in PHASES}
