"""Checkpoints that are damaged, that do not fit on the disk, and those of another mesh."""

import gc
import pathlib
import resource
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ais_jax.errors import UserError
from ais_jax.mesh import MeshConfig, make_mesh
from ais_jax.train import checkpoint
from ais_jax.train.state import Calibration, TrainState

# Orbax writes arrays at the same time, and forgets the others when one of them fails.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def forget_here():
    """What Orbax forgets is found by the garbage collection, here and in no other test."""
    yield
    gc.collect()


def state_of(step: int, rows: int = 16) -> TrainState:
    """A state whose numbers depend on `step`; `rows` x 16 KiB of float32 that do not compress."""
    rng = np.random.default_rng(step)
    params = {
        "kernel": jnp.asarray(rng.integers(0, 2**32, (rows, 4096), np.uint32)).view(jnp.float32),
        "half": jnp.asarray(rng.standard_normal((8, 6)), jnp.bfloat16),
    }
    calibration = Calibration(jnp.float32(step), jnp.int32(step))
    return TrainState(params, {"count": jnp.int32(step)}, calibration, jnp.int32(0))


def saved(step: int, rows: int = 16) -> checkpoint.Saved:
    return checkpoint.Saved(step, state_of(step, rows), {"iterator": {"next": np.int64(step)}})


def bits(tree) -> list[np.ndarray]:
    return [np.asarray(x).reshape(-1).view(np.uint8) for x in jax.tree.leaves(tree)]


def assert_same(found: checkpoint.Saved, step: int) -> None:
    assert found.step == step
    assert found.host == {"iterator": {"next": step}}
    for a, b in zip(bits(found.state), bits(state_of(step)), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of steps 1 and 2."""
    path = tmp_path / "checkpoints"
    with checkpoint.manager(path) as manager:
        keeper = checkpoint.Keeper(manager, pytest.fail)
        keeper.save(saved(1))
        keeper.save(saved(2))
        keeper.save(saved(2))  # once is enough
        keeper.finish()
    return path


def restored(folder: pathlib.Path, said: list[str]) -> checkpoint.Saved:
    with checkpoint.manager(folder) as manager:
        return checkpoint.restore(manager, state_of(0), said.append)


@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "float8_e4m3fn"])
def test_a_digest_is_the_sum_it_says(shape, dtype):
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape) * 100, dtype)
    size = x.dtype.itemsize
    flat = np.asarray(x).reshape(-1).view(f"uint{8 * size}").astype(object)
    expected = sum((2 * i + 1) * int(value) for i, value in enumerate(flat)) % 2**32
    assert checkpoint._digests({"x": x}) == {"['x']": expected}


def test_a_digest_is_the_same_on_any_mesh():
    x = jnp.arange(1.0, 513.0).reshape(8, 64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(x, NamedSharding(mesh, P(("data", "fsdp"), "tensor")))
    assert checkpoint._digests({"x": split}) == checkpoint._digests({"x": x})


def test_what_was_saved_comes_back(folder):
    said = []
    assert_same(restored(folder, said), 2)
    assert said == []


def damages(path: pathlib.Path):
    """(name, function) of what may happen to a file."""
    data = path.read_bytes()

    def flip(place):
        changed = bytearray(data)
        changed[place] ^= 0x10
        path.write_bytes(changed)

    yield "deleted", path.unlink
    yield "emptied", lambda: path.write_bytes(b"")
    yield "cut", lambda: path.write_bytes(data[: len(data) // 2])
    for place in (len(data) // 4, len(data) // 2, len(data) - 2):
        yield f"byte {place} flipped", lambda place=place: flip(place)


def test_no_damage_to_the_newest_gives_other_numbers(folder, tmp_path):
    """Whatever file of it is damaged: the newest is still whole, or the one before is taken."""
    files = [p.relative_to(folder) for p in sorted((folder / "2").rglob("*")) if p.is_file()]
    largest = max(files, key=lambda p: (folder / p).stat().st_size)
    taken = {1: 0, 2: 0}
    for file in files:
        for i in range(6):
            copy = tmp_path / "copy"
            shutil.copytree(folder, copy)
            if not (copy / file).read_bytes():
                shutil.rmtree(copy)
                break
            name, damage = list(damages(copy / file))[i]
            damage()
            said = []
            found = restored(copy, said)
            assert_same(found, found.step)
            assert bool(said) == (found.step == 1), (file, name)
            if file == largest and i < 5:  # at its end are numbers that Orbax has written anew
                assert found.step == 1, name
            taken[found.step] += 1
            shutil.rmtree(copy)
    assert taken[1] > 12


def test_a_damaged_checkpoint_is_kept_aside_and_its_step_saved_again(folder):
    for file in (folder / "2").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    said = []
    with checkpoint.manager(folder) as manager:
        assert_same(checkpoint.restore(manager, state_of(0), said.append), 1)
        assert len(said) == 1
        assert f"checkpoint {folder / '2'} is damaged" in said[0]
        assert "2.damaged0" in said[0]
        assert (folder / "2.damaged0").is_dir()
        keeper = checkpoint.Keeper(manager, pytest.fail)
        keeper.save(saved(2))
        keeper.finish()
    assert_same(restored(folder, said), 2)


def test_other_dtypes_are_no_damage(folder):
    """Orbax would convert them, and then no digest would fit."""
    like = state_of(0)
    like = like._replace(params=like.params | {"half": like.params["half"].astype(jnp.float32)})
    with checkpoint.manager(folder) as manager:
        for look in (checkpoint.check, lambda m, x: checkpoint.restore(m, x, pytest.fail)):
            with pytest.raises(UserError, match=r"bfloat16\[8, 6\] there and float32\[8, 6\] here"):
                look(manager, like)
    assert restored(folder, []).step == 2


def test_damage_to_all_is_an_error(folder):
    for step in "12":
        shutil.rmtree(folder / step / "state")
    said = []
    with pytest.raises(UserError, match="can be read; start again with --no-resume"):
        restored(folder, said)
    assert len(said) == 2


def test_parameters_alone_pass_over_damage_too(folder):
    data = max((folder / "2").rglob("*"), key=lambda p: p.stat().st_size)
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    said = []
    params = checkpoint.load_trained(folder, state_of(0).params, said.append)
    for a, b in zip(bits(params), bits(state_of(1).params), strict=True):
        np.testing.assert_array_equal(a, b)
    assert len(said) == 1
    assert (folder / "2").is_dir()  # it may be that of a run that goes on


def test_a_disk_that_is_full_costs_the_save_alone(tmp_path):
    """The limit on file sizes stands in for the disk: writing fails in the same places."""
    said, (soft, hard) = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    with checkpoint.manager(tmp_path, keep=1) as manager:
        keeper = checkpoint.Keeper(manager, said.append)
        keeper.save(saved(1))
        keeper.finish()
        assert said == []
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        try:
            keeper.save(saved(2, rows=256))
            keeper.finish()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (text,) = said
        assert text.startswith("THE CHECKPOINT OF STEP 2 WAS NOT SAVED, the newest is of step 1")
        assert sorted(p.name for p in tmp_path.iterdir() if p.name[0].isdigit()) == ["1"]
        assert_same(checkpoint.restore(manager, state_of(0), pytest.fail), 1)
        keeper.save(saved(3))
        keeper.finish()
        assert_same(checkpoint.restore(manager, state_of(0), pytest.fail), 3)
    assert len(said) == 1


def test_a_save_that_fails_is_told_at_the_next_look(folder, monkeypatch):
    said = []
    with checkpoint.manager(folder) as manager:
        keeper = checkpoint.Keeper(manager, said.append)
        keeper.look()
        monkeypatch.setattr(pathlib.Path, "rename", fail)
        monkeypatch.setattr("os.rename", fail)
        keeper.save(saved(3))
        while manager.is_saving_in_progress():
            pass
        keeper.look()
        assert len(said) == 1
        assert "No space left on device" in said[0]
        keeper.look()
        keeper.finish()
    assert len(said) == 1


def fail(*_, **__):
    raise OSError(28, "No space left on device")


def test_half_written_checkpoints_are_removed(folder):
    half = folder / "3.orbax-checkpoint-tmp"
    shutil.copytree(folder / "2", half)
    assert_same(restored(folder, []), 2)
    with checkpoint.manager(folder) as manager:
        checkpoint.save(manager, saved(3))
    assert not half.exists()
    assert_same(restored(folder, []), 3)


@pytest.mark.parametrize("shape", [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_another_mesh_gets_the_same_numbers(folder, shape):
    mesh = make_mesh(MeshConfig(**shape))
    sharding = NamedSharding(mesh, P(("data", "fsdp"), "tensor"))

    def place(x):
        return jax.device_put(x, sharding if x.shape == (16, 4096) else NamedSharding(mesh, P()))

    like = jax.tree.map(place, state_of(0))
    with checkpoint.manager(folder) as manager:
        found = checkpoint.restore(manager, like, pytest.fail)
    assert_same(found, 2)
    assert found.state.params["kernel"].sharding == sharding


def test_what_goes_away_while_it_is_read_is_not_read_as_zeros(tmp_path, monkeypatch):
    """Another run may replace what runs share."""
    path, said, params = tmp_path / "kept", [], {"a": jnp.arange(4096.0)}
    checkpoint.save_params(path, params, pytest.fail)
    found = checkpoint.load_params(path, params, pytest.fail)
    np.testing.assert_array_equal(found["a"], params["a"])
    opened = checkpoint.ts.open

    def goes_away(spec):
        store = opened(spec).result()
        shutil.rmtree(path)
        return types.SimpleNamespace(result=lambda: store)

    monkeypatch.setattr(checkpoint.ts, "open", goes_away)
    assert checkpoint.load_params(path, params, said.append) is None
    assert "is damaged" in said[0]
