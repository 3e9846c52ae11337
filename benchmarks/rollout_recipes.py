"""Parts a and c of rollout.py: recipes beside each other, and beside what the machine can do."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from common import spread, table
from contestants import Entry, Turns, take_turns
from rollout_options import Options, bar, memory
from rollout_shapes import CONFIGS, Work, random_prompts

CEILINGS = "ceilings"
# Rows whose log-probs are compared: scoring more of them says little more and takes longer.
SCORED_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Measured:
    """A contestant's rounds with one number of rows."""

    whole: np.ndarray  # seconds of a rollout, [repeats]
    decode: np.ndarray  # the same without what it takes until the first tokens
    tokens: int
    steps: int  # of `decode`
    peak: float  # MiB

    @property
    def rate(self) -> float:
        """Tokens a second, end to end."""
        return self.tokens / float(np.median(self.whole))

    @property
    def decode_rate(self) -> float:
        """Tokens a second after the first ones."""
        rows = self.tokens // (self.steps + 1)
        return rows * self.steps / float(np.median(self.decode))


def lengths(options: Options, rows: int) -> list[dict]:
    """A rollout, and one that ends with its first tokens."""
    return [{"rows": rows, "new_tokens": n} for n in (options.new_tokens, 1)]


def measured(options: Options, turns: Turns, name: str, rows: int) -> Measured | str:
    """A contestant's rounds, or why there are none."""
    failure = turns.failure(name, rows)
    if failure is not None:
        return failure
    rounds = turns.rounds[name, rows]
    sampled, expected = rounds[0][0]["tokens"], rows * options.new_tokens
    if sampled != expected:
        return f"sampled {sampled} tokens of {expected}"
    whole, first = (np.array([r[i]["seconds"] for r in rounds]) for i in range(2))
    return Measured(
        whole, whole - first, sampled, options.new_tokens - 1, max(memory(r[0]) for r in rounds)
    )


@functools.cache
def measure(options: Options) -> Turns:
    """All recipes with all numbers of rows; the machine's ceilings once a round."""
    prompts = random_prompts(CONFIGS[options.model], max(options.rows), options.prompt_tokens)
    job = {"model": options.model, "dtype": options.dtype, "prompts": prompts.tolist()}
    entries = {
        recipe: Entry("worker_rollout.py", {**job, "recipe": recipe}) for recipe in options.recipes
    }
    scored = min(SCORED_ROWS, max(options.rows))
    compared = {"rows": scored, "new_tokens": options.new_tokens, "mismatch": True, "seed": 1}
    return take_turns(
        {**entries, CEILINGS: Entry("worker_ceilings.py", {})},
        options.rows,
        lambda name, rows: [{}] if name == CEILINGS else lengths(options, rows),
        options.repeats,
        last=lambda name: [] if name == CEILINGS else [compared],
        alone=options.alone,
        timeout=options.timeout,
    )


def speeds(options: Options) -> list[str]:
    """Part a."""
    turns, lines = measure(options), []
    for rows in options.rows:
        base = measured(options, turns, options.recipes[0], rows)
        for recipe in options.recipes:
            one = measured(options, turns, recipe, rows)
            lines.append((rows, recipe, *columns(one, slower=base, faster=one)))
    head = (
        *("rows", "recipe", "s a rollout", "tokens/s", f"times {options.recipes[0]}"),
        *("decode tokens/s", f"times {options.recipes[0]}", "peak MiB"),
    )
    return [
        *(f"{options.setting} {options.memory}", "", *table(head, *lines), ""),
        *mismatches(options, turns),
        *recipe_bars(options, turns),
    ]


def columns(one: Measured | str, slower: Measured | str, faster: Measured | str) -> tuple:
    """Rates of `one`, and the seconds of `slower` by those of `faster`; one of these is `one`."""
    if isinstance(one, str):
        return (one, *[""] * 5)
    times = ("", "")
    if not isinstance(slower, str) and not isinstance(faster, str):
        times = (
            spread(slower.whole / faster.whole, 2),
            spread(slower.decode / faster.decode, 2),
        )
    rates = (f"{one.rate:,.1f}", times[0], f"{one.decode_rate:,.1f}", times[1])
    return (spread(one.whole, 2), *rates, f"{one.peak:,.0f}")


def mismatches(options: Options, turns: Turns) -> list[str]:
    """How far each recipe's log-probs are off the unquantized trainer's."""
    lines = []
    for recipe in options.recipes:
        failure = turns.failure(recipe, "last")
        if failure is not None:
            lines.append((recipe, failure, *[""] * 5))
            continue
        found = turns.last[recipe][0]
        names = ("severity", "reliability", "coefficient", "entropy")
        figures = [f"{found[name]:.4f}" for name in names]
        lines.append((recipe, *figures, f"{found['tokens']:,}", f"{memory(found):,.0f}"))
    head = ("recipe", "severity, nats", "reliability", "coefficient", "entropy, nats", "tokens")
    return [
        "Mismatch of a rollout's recorded log-probs with those of the trainer, whose weights and "
        f"activations are {options.dtype}. The peak is that of the scoring.",
        "",
        *table((*head, "peak MiB"), *lines),
        "",
    ]


def recipe_bars(options: Options, turns: Turns) -> list[str]:
    """What is asked of the recipes on this device, each with its figure."""
    asked = {
        ("cpu", "0.6b"): [("int8", 1.25, (8, 64)), ("int8_head", 1.5, (8, 64))],
        ("gpu", "8b"): [("fp8+fp8_kv", 1.5, (64, 64))],
    }
    lines = []
    for recipe, least, (low, high) in asked.get((options.platform, options.model), []):
        for rows in (r for r in options.rows if low <= r <= high and recipe in options.recipes):
            pair = [measured(options, turns, name, rows) for name in (options.recipes[0], recipe)]
            base, one = pair
            text = f"{recipe} against {options.recipes[0]}, {rows} rows, end to end"
            ratio = None
            if isinstance(base, Measured) and isinstance(one, Measured):
                ratio = float(np.median(base.whole / one.whole))
            lines.append(bar(text, ratio, least))
    return lines


def shares(options: Options) -> list[str]:
    """Part c."""
    turns, lines, bars = measure(options), [], []
    tops = ceilings(options, turns)
    for rows in options.rows:
        for recipe in options.recipes:
            one = measured(options, turns, recipe, rows)
            if isinstance(one, str):
                lines.append((rows, recipe, one, *[""] * 6))
                continue
            work, seconds = Work(**turns.about[recipe]["work"]), float(np.median(one.decode))
            keys = options.prompt_tokens + options.new_tokens / 2
            size, operations = (f(rows, keys) for f in (work.bytes_a_step, work.operations_a_step))
            step, product = seconds / one.steps, product_format(recipe, options.dtype)
            # The faster of reading and copying: how much a copy reads and writes differs.
            fastest = max(tops["read"], tops["copy"])
            share, top = size / step / fastest, tops.get(product, float("nan"))
            lines.append(
                (
                    *(rows, recipe, f"{1e3 * step:,.2f}", f"{size / 1e6:,.0f}"),
                    *(f"{size / step / 1e9:,.1f}", f"{100 * share:.0f} %"),
                    *(f"{operations / step / 1e9:,.0f}", f"{100 * operations / step / top:.0f} %"),
                    f"{one.peak:,.0f}",
                )
            )
            bars += share_bars(options, recipe, rows, share)
    head = (
        "rows",
        "recipe",
        "ms a step",
        "MB read",
        "GB/s",
        "of the memory",
        "Gop/s",
        "of a product",
    )
    text = (
        f"{options.setting} Decoding alone. Bytes are those that a step cannot do without: the "
        "weights once, and the keys and values of the tokens so far. Operations are those of the "
        "products. Both as shares of what the machine reached in the same minutes, below: of "
        "reading or copying, whichever was faster, and of a large product in the same format."
    )
    named = [(k, spread(v, 1)) for k, v in ceiling_figures(options, turns).items()]
    return [
        *(text, "", *table((*head, "peak MiB"), *lines), ""),
        *table(("ceiling", "GB/s or Gop/s"), *named),
        *("", *bars),
    ]


def product_format(recipe: str, dtype: str) -> str:
    """The format in which a recipe multiplies."""
    if recipe.startswith("int8") and "weight_only" not in recipe:
        return "int8"
    return "float8_e4m3fn" if recipe in ("fp8", "fp8_head", "fp8+fp8_kv") else dtype


def ceiling_figures(options: Options, turns: Turns) -> dict[str, np.ndarray]:
    """GB/s and Gop/s of all rounds, by name."""
    rounds = [r[0] for rows in options.rows for r in turns.rounds.get((CEILINGS, rows), [])]
    names = [name for name in rounds[0] if not name.startswith("peak_")] if rounds else []
    return {name: np.array([r[name] for r in rounds]) / 1e9 for name in names}


def ceilings(options: Options, turns: Turns) -> dict[str, float]:
    """Bytes and operations a second; NaN where none were measured."""
    medians = {k: 1e9 * float(np.median(v)) for k, v in ceiling_figures(options, turns).items()}
    return {"read": float("nan"), "copy": float("nan"), **medians}


def share_bars(options: Options, recipe: str, rows: int, share: float) -> list[str]:
    """What is asked of the share of the memory's bandwidth."""
    text = f"{recipe}, {rows} rows: share of the bandwidth"
    if (options.platform, options.model) == ("gpu", "8b") and rows <= 8:
        return [bar(text, share, 0.6)]
    asked = options.platform == "cpu" and options.model in ("71m", "0.6b") and rows == 8
    return [bar(text, share, 0.3)] if asked and recipe == options.recipes[0] else []
