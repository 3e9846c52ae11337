"""A contestant's side of a benchmark: it loads once, then answers each request with one run.

Job and requests come from `contestants.py`: the job in the file that the command line names, then
requests and answers as lines of JSON. Between two requests the process waits for its input. Needs
nothing but Python, so that it runs in any environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any


class Channel:
    """Requests on the standard input, answers on the standard output."""

    def __init__(self):
        self.job: dict = json.loads(pathlib.Path(sys.argv[1]).read_text())
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what libraries print is no answer

    def ready(self, **values: Any) -> None:
        """Says that everything is loaded."""
        self._answer(values)

    def requests(self) -> Iterator[dict]:
        """Requests as they come. The peak of resident memory starts anew with each."""
        for line in sys.stdin:
            _reset_peak()
            yield json.loads(line)

    def done(self, **values: Any) -> None:
        """What the run that was asked for has given."""
        self._answer({"peak_rss_mib": _peak_rss_mib(), **values})

    def failed(self, error: Exception) -> None:
        """The same, where it gave an error."""
        traceback.print_exc()
        lines = str(error).splitlines()
        self._answer({"error": f"{type(error).__name__}: {lines[0] if lines else ''}"})

    def _answer(self, values: dict) -> None:
        self._answers.write(json.dumps(values) + "\n")
        self._answers.flush()


def serve(load: Callable[[dict], tuple[Callable[[dict], dict], dict]]) -> None:
    """Answers until the input ends.

    `load(job)` gives a function from a request to what its run has given, and what there is to say
    of what was loaded.
    """
    channel = Channel()
    try:
        run, about = load(channel.job)
    except Exception as error:
        channel.failed(error)
        return
    channel.ready(**about)
    for request in channel.requests():
        try:
            channel.done(**run(request))
        except Exception as error:
            channel.failed(error)


def _reset_peak() -> None:
    # Where that is refused, the peak is that of the whole process.
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/clear_refs").write_text("5")


def _peak_rss_mib() -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    kibibytes = re.search(r"VmHWM:\s+(\d+)", status)
    return int(kibibytes[1]) / 1024 if kibibytes else float("nan")
