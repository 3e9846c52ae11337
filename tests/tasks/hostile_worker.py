"""Judges hostile completions by every scorer and prints what happened, for test_hostile.py."""

import json
import os
import random
import resource
import sys
import time

import numpy as np

from ais_jax import tasks
from ais_jax.tasks import d1, rewards, verify

EXAMPLES = {
    "countdown": {"numbers": [3, 7, 5], "target": 16},
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    "arithmetic": {"problem": "7*8", "answer": 56},
    "gsm8k": {"question": "How many is 9 x 2?", "answer": "It is 9*2=18.\n#### 18"},
    "math": {"problem": "What is half of 36?", "answer": "18"},
    "amc": {"problem": "What is half of 36?", "answer": "18"},
    "aime25": {"problem": "What is half of 36?", "answer": "18"},
}
PIECES = [
    "9**9**9", "9^{9^{9}}", "99^{99^{99}}", "10^{10^{10}}!", "(", ")", "((((", "{", "}", "{{{{",
    "[", "\\boxed{", "\\boxed", "\\boxed ", "\\fbox{", "<answer>", "</answer>", "<reasoning>",
    "####", "```", "\\frac{", "\\frac", "\\sqrt{", "\\sqrt", "\\text{ ", "\\left(",
    "\\begin{matrix}", "\\def\\x{\\x\\x}\\x", "\\input{/etc/passwd}", "\\write18{touch touched}",
    "$", "\\(", "\\[", "%", "\\%", "^", "_", "&", "#", "NaN", "nan", "inf", "-Infinity", "1e999",
    "1e-999", "0x10", "1_000", "1,000,000", "٣", "１８", "²", "½",
    "−", "\u202e", "\u200b", "\ufeff",
    "\x00", "\x1b[2J", "\ud800", "\U0001f600", "e\u0301" * 5, "\n", "\r", "\t", " ", "%s%n",
    "{0.__class__}", "{}", "__import__('os').system('touch touched')", "eval('1')", "lambda: 0",
    "open('touched','w')", "/etc/passwd", "../../touched", "file:///etc/passwd", "; touch touched",
    "`touch touched`", "3*7-5", "3142243142131324", "56", "18", "1/0", "0/0", "-", "+", "*", "/",
    "=", ".", ",", "//", "**", "1", "0", "<|eot_id|>", "<|endoftext|>", "</think>",
    "\\int_0^1 x^x dx", "\\sum_{n=1}^{99999999}", "\\lim_{x\\to 0}",
]  # fmt: skip
RIGHT = {"3*7-5", "3142243142131324", "56", "18"}
OWN = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if p]


def completion(rng: random.Random) -> object:
    kind = rng.random()
    if kind < 0.02:
        return rng.choice([None, 3, 2.5, float("nan"), b"18", ["18"], {"18": 18}, True])
    if kind < 0.06:  # up to a megabyte of one thing
        piece = rng.choice(PIECES)
        size = rng.choice([10_000, 1_000_000])
        return rng.choice(["", "\\boxed{", "<answer>"]) + piece * (size // len(piece))
    if kind < 0.12:  # deep
        opening, closing = rng.choice(
            [("(", ")"), ("{", "}"), ("\\sqrt{", "}"), ("\\frac{1}{", "}")]
        )
        depth = rng.choice([50, 500, 5000])
        return "\\boxed{" + opening * depth + "18" + closing * depth + "}"
    if kind < 0.2:  # what looks like an answer
        return rng.choice(["\\boxed{%s}", "<answer>%s</answer>", "#### %s", "%s"]).replace(
            "%s", "".join(rng.choices(PIECES, k=rng.randint(1, 4)))
        )
    return "".join(rng.choices(PIECES, k=rng.randint(1, 25)))


def scorers(name: str) -> dict:
    task = tasks.get_task(name)
    found = {"reward": task.reward, "score": task.score, "format": rewards.marked_once}
    if hasattr(task, "extract"):
        found["extract"] = lambda c, e: [len(task.extract(c[0]) or "") * 0.0]
    if name in d1.TASKS:
        found["d1"] = lambda c, e: d1.score(name, c, e)
        for compat in (True, False):
            found |= {f"d1 {k} {compat}": f for k, f in d1.rewards(name, compat).items()}
    return found


def in_range(scorer: str, value: float) -> bool:
    if scorer.startswith("d1 xml_count"):  # a thousandth is taken away for each character
        return -100 <= value <= 0.5
    return 0 <= value <= (2 if scorer.startswith("d1 ") else 1)


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    verify.TIMEOUT = 1.0
    rng = random.Random(seed)
    judged, wrong, opened = dict.fromkeys(EXAMPLES, 0), [], []
    slowest, slowest_text = 0.0, ""
    verify.equal(["1/2"], ["0.5"])  # its process is started before anything is watched
    everything = {name: scorers(name) for name in EXAMPLES}

    def watch(event, args):
        if event == "open" and isinstance(args[0], str):
            path = os.path.realpath(args[0])
            if not any(path.startswith(own) for own in OWN) and path != "/dev/null":
                opened.append(args[0])

    sys.addaudithook(watch)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        text = completion(rng)
        began = time.monotonic()
        for name, example in EXAMPLES.items():
            for scorer, function in everything[name].items():
                (value,) = function([text], [example])
                if not np.isfinite(value) or not in_range(scorer, value):
                    wrong.append([name, scorer, repr(text)[:300], float(value)])
                # A right answer may have been put together by chance; without its characters not.
                solved = scorer == "score" and value == 1
                if solved and not (isinstance(text, str) and any(x in text for x in RIGHT)):
                    wrong.append([name, scorer, repr(text)[:300], float(value)])
            judged[name] += 1
        taken = time.monotonic() - began
        if taken > slowest:
            slowest, slowest_text = taken, repr(text)[:300]
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    result = {
        "judged": judged, "wrong": wrong, "opened": opened[:10], "slowest": slowest,
        "slowest_text": slowest_text, "grown": grown,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
