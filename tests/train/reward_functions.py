"""Reward functions that a worker process can be told by name. Some of them are bad."""

import multiprocessing
import os
import pathlib
import sys
import time


def varied(completions, examples):
    """A reward that differs within most groups of an untrained policy."""
    return [len(set(text)) for text in completions]


def slowly(completions, examples):
    """The same, so slowly that a step can be told from the next."""
    time.sleep(0.02)
    return varied(completions, examples)


def length(completions, examples):
    print("not an answer")
    return [len(text) for text in completions]


def has_jax(completions, examples):
    return [float("jax" in sys.modules)] * len(completions)


def bad(completions, examples):
    """Fails as the completion says; a good one has the reward 2."""
    for text in completions:
        if text == "raise":
            raise RuntimeError("no answer\nin it")
        if text == "die":
            os._exit(3)
        if text == "hang":
            while True:
                pass
        if text == "fork":  # the child has all that is open here
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
            process.start()
            pathlib.Path("pid").write_text(str(process.pid))
            process.join()
        if text == "end":  # what it has started listens to SIGTERM
            process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(300,))
            process.start()
            process.join(1)  # as one does with a limit of time
            process.terminate()
            process.join()
        if text == "exit":
            sys.exit(3)
    return [2.0] * len(completions)


def words(completions, examples):
    return ["good"] * len(completions)


def one(completions, examples):
    return [1.0]


def nan(completions, examples):
    return [0.0] + [float("nan")] * (len(completions) - 1)


NOT_A_FUNCTION = 3
