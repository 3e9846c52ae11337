"""A process in which math-verify compares answers and nothing else, and may hang or die. No JAX.

`ais_jax.tasks.verify` runs it as `python -m ais_jax.verify_worker PID-OF-ITS-USER`. It reads lines
of JSON, [gold, answer, seconds], and writes true or false for each, after a first true when it is
ready.

sympy evaluates what a model wrote: 9^{9^{9^9}} never ends, and 10^{10^{10}} takes all memory. So
this process has little memory, opens no file but Python's own, starts nothing, and is killed by its
user when time is up. Should its user be gone by then, an alarm of its own ends it a second later.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys

from ais_jax import child

_MEMORY = 2 * 2**30  # bytes of address space beyond what imports have taken
_OPEN = 32  # files at a time: modules are imported as they are needed


def main() -> None:
    """Answers until standard input ends."""
    child.live_with(int(sys.argv[1]))
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what a library prints is no answer
    # Not handled: Python runs no handler, and no other thread, while C computes with huge numbers.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    logging.disable(logging.CRITICAL)  # it tells of every formula that it cannot read
    compare = _comparison()
    compare("1", "1")  # the parsers are built at first use
    _limit()
    sys.dont_write_bytecode = True
    sys.addaudithook(_forbid)
    print("true", file=answers, flush=True)
    for line in sys.stdin:
        gold, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            found = compare(gold, answer)
        except Exception:  # among them MemoryError and RecursionError
            found = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(bool(found)), file=answers, flush=True)


def _comparison():
    """A function (gold, answer) -> whether math-verify takes one for the other."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # The boxed answer before any other, as the answer is put below.
    extraction = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]

    def read(text: str) -> list:
        # Its own limits of time are signals, which do not end what sympy does in C.
        return parse(text, extraction_config=extraction, parsing_timeout=None)

    def compare(gold: str, answer: str) -> bool:
        right, given = read(f"\\boxed{{{gold}}}"), read(f"\\boxed{{{answer}}}")
        return bool(right) and bool(given) and verify(right, given, timeout_seconds=None)

    return compare


def _limit() -> None:
    """Takes away what no comparison needs: memory without end, files that grow, core dumps."""
    with open("/proc/self/statm", encoding="ascii") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    limits = {
        resource.RLIMIT_AS: taken + _MEMORY,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: _OPEN,
        resource.RLIMIT_CORE: 0,
    }
    for limit, most in limits.items():
        _, hard = resource.getrlimit(limit)
        allowed = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(limit, (allowed, allowed))


# Of the standard library and of packages, but not of the folder that somebody works in.
_LIBRARIES = tuple(
    {
        os.path.realpath(path) + os.sep
        for path in (sys.prefix, sys.base_prefix, *sys.path)
        if path and os.path.realpath(path) != os.getcwd()
    }
)
_STARTING = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
)

_CHANGING = (
    *("os.remove", "os.rmdir", "os.mkdir", "os.rename", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.kill", "os.killpg", "os.utime", "shutil.rmtree", "shutil.move"),
)


def _forbid(event: str, args: tuple) -> None:
    """An audit hook: nothing is started, and nothing opened but to read what Python imports."""
    if event in _STARTING or event in _CHANGING:
        raise PermissionError(f"{event} has no place in a comparison")
    if event == "open":
        path, mode, flags = args
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        reads = not set(mode) & set("wax+") if mode else not (flags or 0) & writing
        known = isinstance(path, str) and os.path.realpath(path).startswith(_LIBRARIES)
        if not (reads and known):
            raise PermissionError(f"{path} has no place in a comparison")


if __name__ == "__main__":
    main()
