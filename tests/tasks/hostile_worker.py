"""Judges hostile completions by every scorer and prints what happened, for test_hostile.py."""

import itertools
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np

from ais_jax import tasks
from ais_jax.tasks import d1, rewards, verify

BUDGET = 60
"""Seconds a completion may take at most: each scorer is asked, math-verify among them."""

EXAMPLES = {
    "countdown": {"numbers": [3, 7, 5], "target": 16},
    "sudoku": {"puzzle": "3102200002100320", "solution": "3142243142131324"},
    "arithmetic": {"problem": "7*8", "answer": 56},
    "gsm8k": {"question": "How many is 9 x 2?", "answer": "It is 9*2=18.\n#### 18"},
    "math": {"problem": "What is half of 36?", "answer": "18"},
    "amc": {"problem": "What is half of 36?", "answer": "18"},
    "aime25": {"problem": "What is half of 36?", "answer": "18"},
}
ANSWERS = {  # of each example one that is right, and one that is wrong
    "countdown": ("3*7-5", "3*7+5"),
    "sudoku": ("3142243142131324", "3142243142131342"),
    "arithmetic": ("56", "65"),
    "gsm8k": ("18", "81"),
    "math": ("18", "81"),
    "amc": ("18", "81"),
    "aime25": ("18", "81"),
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
REPEATED = [
    "1", "9", "(", "{", "}", "<answer>", "</answer>", " ", "\n", "\\boxed{", "\\boxed{}", "\\boxed",
    "#### ", "####\n", "\\frac{", "\\sqrt", "\\text{a}", "=1", "-", "1,", "1/", "1 ", "a ", "1a",
    "(1", "</reasoning>", "```1", "1234123412341234 ", "\ud800", "\x00", "٣",
]  # fmt: skip
FORMS = [
    "{}", "so {}.", "\\boxed{{{}}}", "<answer>{}</answer>", "<answer>\\boxed{{{}}}</answer>",
    "#### {}", "<reasoning>\nso\n</reasoning>\n<answer>\n{}\n</answer>\n", "```{}```", "x = {}",
]  # fmt: skip
NO_TEXT = [None, 3, 2.5, float("nan"), b"18", ["18"], {"18": 18}, True, 10**4000, ("18",)]
DIGITS = set("0123456789")
OWN = tuple(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, *sys.path) if p)
STARTING = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.startfile", "socket.connect")


def completions(seed: int, count: int) -> Iterator[object]:
    """`count` completions: the same first, then those of the seed."""
    rng = random.Random(seed)
    fixed = [piece * (1_000_000 // len(piece)) for piece in REPEATED]
    yield from itertools.islice([*NO_TEXT, *fixed], count)
    for _ in range(count - len(NO_TEXT) - len(fixed)):
        yield _completion(rng)


def _completion(rng: random.Random) -> object:
    kind = rng.random()
    if kind < 0.01:
        return rng.choice(NO_TEXT)
    if kind < 0.04:  # up to a megabyte of one thing
        piece = rng.choice(PIECES)
        size = rng.choice([10_000, 1_000_000])
        return rng.choice(["", "\\boxed{", "<answer>"]) + piece * (size // len(piece))
    if kind < 0.1:  # deep
        opening, closing = rng.choice(
            [("(", ")"), ("{", "}"), ("\\sqrt{", "}"), ("\\frac{1}{", "}")]
        )
        depth = rng.choice([50, 500, 5000])
        return "\\boxed{" + opening * depth + "18" + closing * depth + "}"
    if kind < 0.4:  # right answers that are cut, mixed and changed
        return _changed(rng)
    if kind < 0.5:  # what looks like an answer
        return rng.choice(FORMS).format("".join(rng.choices(PIECES, k=rng.randint(1, 4))))
    return "".join(rng.choices(PIECES, k=rng.randint(1, 25)))


def _changed(rng: random.Random) -> str:
    rights = [right for right, _ in ANSWERS.values()]
    first, second = (rng.choice(FORMS).format(rng.choice(rights)) for _ in range(2))
    text = first[: rng.randint(0, len(first))] + second[rng.randint(0, len(second)) :]
    for _ in range(rng.randint(0, 6)):
        i, j = sorted(rng.choices(range(len(text) + 1), k=2))
        part = text[i:j]
        change = rng.choice(
            ["", part * 2, part[::-1], part.upper(), rng.choice(PIECES), rng.choice("0189-.,/ \n")]
        )
        text = text[:i] + change + text[j:]
    return text


def surely_wrong(name: str, text: object) -> bool:
    """Whether a completion lacks what every right answer has."""
    if not isinstance(text, str):
        return True
    digits = "".join(c for c in text if c in DIGITS)
    if name == "countdown":
        return not set("375") <= set(digits)
    if name == "sudoku":
        return len(digits) < 16
    if name == "arithmetic":
        return "56" not in digits
    if name == "gsm8k":
        return "18" not in digits and "/" not in text and "frac" not in text
    return not set(digits) - {"0", "1"}  # math-verify computes: 9*2 would be right


def scorers(name: str) -> dict:
    task = tasks.get_task(name)
    found = {"reward": task.reward, "score": task.score, "format": rewards.marked_once}
    if hasattr(task, "extract"):
        found["extract"] = lambda c, e: [len(task.extract(c[0]) or "") * 0.0]
    for measure, function in getattr(task, "MEASURES", {}).items():
        found[measure] = lambda c, e, function=function: [function(c, e)]
    if name in d1.TASKS:
        found["d1"] = lambda c, e: d1.score(name, c, e)
        for compat in (True, False):
            found |= {f"d1 {k} {compat}": f for k, f in d1.rewards(name, compat).items()}
    return found


def in_range(name: str, scorer: str, value: float) -> bool:
    if scorer.startswith("d1 xml_count"):  # a thousandth is taken away for each character
        return -100 <= value <= 0.5
    if scorer in ("score", "format") or (scorer == "reward" and name != "sudoku"):
        return value in (0, 1)
    return 0 <= value <= (2 if scorer.startswith("d1 ") else 1)


def watch(found: list[str]) -> None:
    """Has every file noted that is not Python's own, and all that is started, reached or run."""

    def hook(event: str, args: tuple) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            path = os.fsdecode(args[0])
            if not os.path.realpath(path).startswith(OWN) and path != "/dev/null":
                found.append(f"open {path!r}")
        elif event in STARTING or (event == "subprocess.Popen" and "ais_jax" not in str(args)):
            found.append(f"{event} {args}"[:300])
        elif event == "exec" and args[0].co_filename == "<string>":
            found.append(f"exec {args[0].co_names}"[:300])

    sys.addaudithook(hook)


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    verify.TIMEOUT = 1.0
    judged = dict.fromkeys(EXAMPLES, 0)
    wrong: list[list] = []
    seen: list[str] = []
    slowest, slowest_text, certain = 0.0, "", 0
    verify.equal(["1/2"], ["0.5"])  # its process is started before anything is watched
    everything = {name: scorers(name) for name in EXAMPLES}
    watch(seen)
    # Not handled: Python runs no handler while C is at work.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number, text in enumerate(completions(seed, count)):
        print(number, flush=True)
        signal.alarm(BUDGET)
        began = time.monotonic()
        for name, example in EXAMPLES.items():
            for scorer, function in everything[name].items():
                (value,) = function([text], [example])
                rejected = scorer == "score" and surely_wrong(name, text)
                certain += rejected
                bad = not np.isfinite(value) or not in_range(name, scorer, value)
                if bad or (rejected and value):
                    wrong.append([name, scorer, repr(text)[:300], float(value)])
            if isinstance(text, str):  # whatever stands before the answer
                ends = [f"{text}<answer>\\boxed{{{answer}}}</answer>" for answer in ANSWERS[name]]
                values = tasks.get_task(name).score(ends, [example] * 2).tolist()
                if values != [1, 0]:
                    wrong.append([name, "end", repr(text)[:300], values])
            judged[name] += 1
        signal.alarm(0)
        taken = time.monotonic() - began
        if taken > slowest:
            slowest, slowest_text = taken, repr(text)[:300]
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    result = {
        "judged": judged, "wrong": wrong[:20], "seen": seen[:20], "slowest": slowest,
        "slowest_text": slowest_text, "grown": grown, "certain": certain,
        "lost": verify._process.lost,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
