"""The order of problems: whole epochs, shares of processes, positions, workers."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import alive, gone

from ais_jax.train import data

EXAMPLES = [{"i": i} for i in range(10)]


def take(iterator, count):
    return [[x["i"] for x in next(iterator)] for _ in range(count)]


def test_shares_of_processes_make_up_the_batch_of_one():
    whole = take(data.batches(EXAMPLES, 4, seed=3), 7)
    assert sorted(itertools.chain(*whole[:5])) == sorted(2 * list(range(10)))  # two epochs
    shares = [take(data.batches(EXAMPLES, 4, seed=3, part=part, parts=2), 7) for part in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole


def test_only_the_own_share_is_read():
    class Watched(list):
        def __getitem__(self, i):
            read.append(i)
            return super().__getitem__(i)

    read: list[int] = []
    batch = take(data.batches(Watched(EXAMPLES), 4, seed=3, part=1, parts=2), 1)[0]
    assert read == batch and len(read) == 2


def test_a_position_holds_for_any_number_of_processes():
    iterator = data.batches(EXAMPLES, 4, seed=3)
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 4)
    shares = []
    for part in range(4):
        other = data.batches(EXAMPLES, 4, seed=3, part=part, parts=4)
        other.set_state(state)
        shares.append(take(other, 4))
    assert [list(itertools.chain(*batch)) for batch in zip(*shares, strict=True)] == expected


def test_workers_read_the_same_from_any_position():
    expected = take(data.batches(EXAMPLES, 5, seed=1), 9)
    iterator = data.batches(EXAMPLES, 5, seed=1, workers=2)
    assert take(iterator, 5) == expected[:5]
    state = iterator.get_state()
    assert take(iterator, 2) == expected[5:7]
    iterator.set_state(state)
    assert take(iterator, 4) == expected[5:]
    iterator.close()


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="batch_size=5 is not divisible by 2 parts"):
        data.batches(EXAMPLES, 5, seed=0, parts=2)


def test_workers_end_with_a_run_that_is_killed(tmp_path):
    script = tmp_path / "run.py"  # workers import what is run, so it has to be a file
    script.write_text("""
import multiprocessing, time
from ais_jax.train import data

if __name__ == "__main__":
    batches = data.batches([{}] * 8, 2, seed=0, workers=2)
    next(batches), next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(300)
""")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE) as process:
        try:
            workers = [int(pid) for pid in process.stdout.readline().split()]
            assert len(workers) == 2
            for pid in workers:
                os.kill(pid, signal.SIGTERM)  # as preemption does; only the run itself listens
            time.sleep(0.2)
            assert all(map(alive, workers))
        finally:
            process.kill()
    for pid in workers:
        gone(pid)
