"""Every architecture against transformers: logits, cached steps, gradients, files both ways."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity")

import reference
import transformers
from reference import CASES, PADDING, STEPS, VOCAB, WIDTH, our_logits, tensor, their_logits

from ais_jax.models import build, from_pretrained, positions_of, save_pretrained
from ais_jax.models.checkpoint import leaf, tensors_of

pytestmark = [pytest.mark.parity]


def close(ours, theirs, atol=1e-4):
    """Equal to float32 noise, on logits that are large enough to tell."""
    assert np.std(theirs) > 1
    error = np.abs(np.asarray(ours) - theirs).max()
    print("ERR", error, np.std(theirs))
    assert error <= atol


@pytest.mark.parametrize("name", CASES)
def test_logits(pairs, name):
    pair = pairs(name)
    ids, _ = reference.batch()
    close(
        our_logits(pair.ours.structure, pair.ours.params, ids),
        their_logits(pair.theirs, ids),
    )


@pytest.mark.parametrize("name", CASES)
def test_left_padded_logits(pairs, name):
    pair = pairs(name)
    ids, mask = reference.batch(1)
    ours = our_logits(pair.ours.structure, pair.ours.params, ids, mask)
    theirs = their_logits(pair.theirs, ids, mask)
    close(ours[mask], theirs[mask])
    alone = their_logits(pair.theirs, ids[-1:, PADDING[-1] :])
    close(ours[-1:, PADDING[-1] :], alone)


@torch.no_grad()
def their_steps(model, ids, mask):
    """Logits [B, V] after the prompt and after each of the steps."""
    positions = tensor(positions_of(mask))
    cache, rows, start = None, [], 0
    for end in range(WIDTH, WIDTH + STEPS + 1):
        out = model(
            input_ids=tensor(ids[:, start:end]),
            attention_mask=tensor(mask[:, :end]),
            position_ids=positions[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache, start = out.past_key_values, end
        rows.append(out.logits[:, -1].numpy())
    return np.stack(rows)


def our_steps(model, params, ids, mask):
    @jax.jit
    def forward(ids, positions, cache, index):
        hidden, cache = model.hidden(params, ids, positions, mask, cache, index)
        return model.unembed(params, hidden[:, -1]), cache

    positions = positions_of(mask)
    cache, rows, start = model.empty_cache(len(ids), WIDTH + STEPS), [], 0
    for end in range(WIDTH, WIDTH + STEPS + 1):
        logits, cache = forward(ids[:, start:end], positions[:, start:end], cache, start)
        rows.append(logits)
        start = end
    return np.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_cached_steps(pairs, name):
    pair = pairs(name)
    ids, mask = reference.batch(2)
    ours = our_steps(pair.ours.structure, pair.ours.params, ids, jnp.asarray(mask))
    theirs = their_steps(pair.theirs, ids, mask)
    close(ours, theirs)
    whole = their_logits(pair.theirs, ids, mask)[:, WIDTH - 1 :].transpose(1, 0, 2)
    close(theirs, whole)  # the reference agrees with itself


def other_params(params, seed=0):
    """Random parameters of the same size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x * jnp.asarray(rng.normal(1, 0.3, x.shape), x.dtype), params
    )


@pytest.mark.parametrize("name", CASES)
def test_transformers_reads_what_is_saved_from_sizes_alone(pairs, tmp_path, name):
    pair = pairs(name)
    model = build(pair.ours.config, "float32")
    params = other_params(pair.ours.params)
    save_pretrained(model, params, tmp_path / "saved")
    theirs = reference.load_theirs(tmp_path / "saved")
    assert type(theirs) is type(pair.theirs)
    ids, mask = reference.batch(3)
    ours = our_logits(model, params, ids, mask)
    close(ours[mask], their_logits(theirs, ids, mask)[mask])


def stored(folder):
    """Tensors of a checkpoint by name, and how many files they are in."""
    files = sorted(folder.glob("*.safetensors"))
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors, len(files)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
