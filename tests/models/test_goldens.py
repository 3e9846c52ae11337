"""Every architecture against the reference logits of a small published-format checkpoint."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ais_jax.models import from_pretrained, positions_of

CACHED = ["qwen3_tiny", "llama_tiny", "qwen3_5_tiny"]
TOLERANCE = {"qwen3_5_tiny": 3e-4}  # float32 noise of the reference itself is 2e-4


@pytest.fixture
def golden(shared_file, tmp_path):
    """(folder of the checkpoint, its reference inputs and outputs)."""

    def make(name):
        config = shared_file(f"goldens/{name}.config.json")
        tensors = load_file(shared_file(f"goldens/{name}.safetensors"))
        weights = {k: v for k, v in tensors.items() if not k.startswith("ref.")}
        shutil.copy(config, tmp_path / "config.json")
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        return tmp_path, {k[4:]: v for k, v in tensors.items() if k.startswith("ref.")}

    return make


def close(actual, desired, name):
    np.testing.assert_allclose(actual, desired, rtol=0, atol=TOLERANCE.get(name, 2e-5))


@pytest.mark.smoke
@pytest.mark.parametrize("name", [*CACHED, "llada_tiny"])
def test_logits_equal_the_reference(golden, name):
    folder, ref = golden(name)
    model = from_pretrained(folder, "float32")
    close(model.logits(model.params, ref["input_ids"]), ref["logits"], name)


@pytest.mark.parametrize("name", CACHED)
def test_left_padded_logits_equal_the_reference(golden, name):
    folder, ref = golden(name)
    model = from_pretrained(folder, "float32")
    mask = ref["left_pad_mask"].astype(bool)
    logits = model.logits(model.params, ref["left_pad_ids"], mask)
    close(logits[mask], ref["left_pad_logits"][mask], name)


@pytest.mark.parametrize("name", CACHED)
def test_a_cached_step_equals_the_reference(golden, name):
    folder, ref = golden(name)
    model = from_pretrained(folder, "float32")
    ids, mask = ref["left_pad_ids"], jnp.asarray(ref["left_pad_mask"].astype(bool))
    rows, width = ids.shape
    key_mask = jnp.concatenate([mask, jnp.ones((rows, 2), bool)], axis=1)
    cache = model.empty_cache(rows, width + 2)
    _, cache = model.hidden(model.params, ids, positions_of(mask), key_mask, cache, 0)
    position = mask.sum(axis=1, dtype=jnp.int32)[:, None]
    hidden, _ = model.hidden(model.params, ref["decode_token"], position, key_mask, cache, width)
    logits = model.unembed(model.params, hidden)[:, 0]
    close(logits, ref["decode_logits"].reshape(rows, -1), name)


def test_llada_sees_both_ways_and_ignores_padding(golden):
    folder, ref = golden("llada_tiny")
    model = from_pretrained(folder, "float32")
    ids = ref["input_ids"][:1]
    plain = model.logits(model.params, ids)
    other = np.array(ids)
    other[0, -1] = (other[0, -1] + 1) % model.config.vocab_size
    assert np.abs(model.logits(model.params, other)[0, 0] - plain[0, 0]).max() > 1e-4
    width = ids.shape[1]
    for left, right in ((3, 0), (0, 3), (2, 2)):
        padded = np.pad(ids, ((0, 0), (left, right)), constant_values=7)
        mask = np.pad(np.ones_like(ids, bool), ((0, 0), (left, right)))
        logits = model.logits(model.params, padded, mask)[:, left : left + width]
        np.testing.assert_allclose(logits, plain, rtol=0, atol=2e-5)


def test_a_bfloat16_model_stays_near(golden):
    folder, ref = golden("qwen3_tiny")
    model = from_pretrained(folder)
    assert {str(x.dtype) for x in jax.tree.leaves(model.params)} == {"bfloat16"}
    logits = model.logits(model.params, ref["input_ids"])
    assert logits.dtype == jnp.float32
    error = np.abs(logits - ref["logits"]).max()
    assert 1e-4 < error < 0.1, json.dumps(float(error))
