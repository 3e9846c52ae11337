"""Freed memory that is kept: a process of its own counts the pages that it is given."""

import os
import subprocess
import sys

import pytest

COUNT = """
import resource
from ais_jax import memory
kept = memory.keep_freed() if {keep} else None
import jax, jax.numpy as jnp
# 64 MiB of temporaries, more than malloc ever keeps by itself.
run = jax.jit(lambda x: jnp.outer(x, x) @ jnp.stack([x, x + 1], axis=1))
x = jnp.arange(4096.0)
for _ in range(60):  # until small blocks that lie in between leave large enough holes
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    run(x).block_until_ready()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def kept_and_faults(keep: bool, **environment: str) -> tuple[str, int]:
    own = ("MALLOC_", "GLIBC_", "XLA_FLAGS")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    out = subprocess.run(
        [sys.executable, "-c", COUNT.format(keep=keep)],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    kept, faults = out.split()
    return kept, int(faults)


@pytest.mark.skipif(
    sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"), reason="needs glibc"
)
def test_a_program_that_runs_again_is_given_no_new_pages():
    pages = 3 * 64 * 2**20 // os.sysconf("SC_PAGE_SIZE")
    _, usual = kept_and_faults(False)
    kept, faults = kept_and_faults(True)
    assert kept == "True"
    assert usual > pages / 2, "nothing to be saved here: the test cannot fail"
    assert faults < usual / 20


@pytest.mark.parametrize(
    "environment", [{"MALLOC_ARENA_MAX": "4"}, {"JAX_PLATFORMS": "cuda,cpu"}], ids=str
)
def test_a_setting_of_the_users_and_accelerators_are_left_alone(environment, monkeypatch):
    from ais_jax import memory

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert memory.keep_freed() is False
