"""Eight fake CPU devices for the sharding tests, and where the shared files are."""

import atexit
import gc
import itertools
import os
import pathlib
import shutil
import tempfile

import tiny_job

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(  # of two that differ, the last one counts
    ["--xla_force_host_platform_device_count=8", tiny_job.QUICK, os.environ.get("XLA_FLAGS", "")]
)

# Many tests compile the same programs. Compiled ones are kept for the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="ais_jax_xla_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import hypothesis
import jax
import pytest

# A busy machine is no bug: no example has a time limit.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Every compiled program takes dozens of memory mappings, of which Linux gives a process 65,530
# (vm.max_map_count): beyond them it crashes. Thousands of tests would get there.
MAPPINGS = pathlib.Path("/proc/self/maps")
MOST_MAPPINGS = 30_000
TESTS = itertools.count(1)

SHARED = pathlib.Path(
    os.environ.get("AIS_SHARED", pathlib.Path(__file__).parents[1] / ".." / "shared")
)


@pytest.fixture(autouse=True)
def room_for_programs():
    """Forgets compiled programs once they are many; those still needed come from the disk."""
    yield
    if next(TESTS) % 16 or not MAPPINGS.exists():
        return  # counting takes its time
    if MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def shared_file():
    """Path of a file in the shared folder; skips the test where it is absent."""

    def find(name: str) -> pathlib.Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"{name} is not in {SHARED}: set AIS_SHARED to the folder that holds it")
        return path

    return find
