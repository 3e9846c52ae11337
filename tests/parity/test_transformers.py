"""Every architecture against transformers: logits, cached steps, gradients, files both ways."""
# ruff: noqa: E402

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity")

import reference
from reference import CASES, PADDING, STEPS, WIDTH, close, our_logits, tensor, their_logits

from ais_jax.models import build, from_pretrained, positions_of, save_pretrained
from ais_jax.models.checkpoint import leaf, tensors_of

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("name", CASES)
def test_logits(pairs, name):
    pair = pairs(name)
    ids, _ = reference.batch()
    close(
        our_logits(pair.ours.structure, pair.ours.params, ids, np.ones_like(ids, bool)),
        their_logits(pair.theirs, ids),
        name,
    )


@pytest.mark.parametrize("name", CASES)
def test_left_padded_logits(pairs, name):
    pair = pairs(name)
    ids, mask = reference.batch(1)
    ours = our_logits(pair.ours.structure, pair.ours.params, ids, mask)
    theirs = their_logits(pair.theirs, ids, mask)
    close(ours[mask], theirs[mask], name)
    alone = their_logits(pair.theirs, ids[-1:, PADDING[-1] :])
    close(ours[-1:, PADDING[-1] :], alone, name)


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

    positions = np.asarray(positions_of(mask))
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
    close(ours, theirs, name)
    whole = their_logits(pair.theirs, ids, mask)[:, WIDTH - 1 :].transpose(1, 0, 2)
    close(theirs, whole, name)  # the reference agrees with itself


def other_params(params, seed=0):
    """Random parameters of the same size."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x * jnp.asarray(rng.normal(1, 0.3, x.shape), x.dtype), params)


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
    close(ours[mask], their_logits(theirs, ids, mask)[mask], name)


# One of each kind: tied and not, and the family whose small parameters may be float32.
KINDS = ["qwen3-3-on-1", "llama-5-heads", "qwen3_5-values-1x", "qwen3_5-values-2x"]


@pytest.mark.parametrize("name", KINDS)
def test_a_bfloat16_checkpoint_keeps_its_bits(pairs, tmp_path, name):
    theirs = copy.deepcopy(pairs(name).theirs).to(torch.bfloat16)
    for key, parameter in theirs.named_parameters():
        if key.endswith(("A_log", "linear_attn.norm.weight")):
            parameter.data = parameter.data.float()  # as published
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    model = from_pretrained(tmp_path / "theirs")
    save_pretrained(model, model.params, tmp_path / "ours", shard_bytes=30_000)
    a, their_files = reference.stored(tmp_path / "theirs")
    b, our_files = reference.stored(tmp_path / "ours")
    assert their_files > 2 and our_files > 2
    reference.assert_same(a, b)
    again = reference.load_theirs(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    same = reference.load_theirs(tmp_path / "theirs", dtype="auto")
    reference.assert_same(again.state_dict(), same.state_dict())


@pytest.mark.parametrize("name", ["qwen3-6-on-2", "qwen3_5-values-3x"])
def test_gradients(pairs, name):
    pair = pairs(name)
    ids, mask = reference.batch(4)
    model = build(pair.ours.config, "float32", remat=True)  # which also compiles sooner
    ours = reference.our_gradients(model, pair.ours.params, ids, mask)
    theirs = reference.their_gradients(pair.theirs, ids, mask)
    tensors = tensors_of(pair.ours.config)
    assert {x.name for x in tensors} == theirs.keys()
    for x in tensors:
        gradient = np.asarray(leaf(ours, x.path)[x.index])
        if x.layout == "transposed":
            gradient = gradient.T
        elif x.layout == "conv":
            gradient = gradient[:, None]
        expected = theirs[x.name]
        size = np.abs(expected).max()
        assert size > 1e-2
        assert np.abs(gradient - expected).max() <= 2e-4 * size, x.name


@pytest.mark.parametrize("name", ["qwen3_5-values-1x", "qwen3_5-values-2x"])
def test_a_multimodal_folder_keeps_its_vision_part(pairs, tmp_path, name):
    pair = pairs(name, multimodal=True)
    theirs, model = pair.theirs, pair.ours
    assert model.config == pairs(name).ours.config
    ids, mask = reference.batch(5)
    logits = their_logits(theirs, ids, mask)
    close(our_logits(model.structure, model.params, ids, mask)[mask], logits[mask], name)

    save_pretrained(model, model.params, tmp_path / "ours", shard_bytes=100_000)
    a, _ = reference.stored(pair.folder)
    b, files = reference.stored(tmp_path / "ours")
    assert files > 2 and sum(".visual." in key for key in a) > 10
    reference.assert_same(a, b)
    again = reference.load_theirs(tmp_path / "ours", type(theirs))
    np.testing.assert_array_equal(their_logits(again, ids, mask), logits)
