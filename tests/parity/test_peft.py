"""Adapters as peft reads them: the same logits, and the same kernels when merged."""
# ruff: noqa: E402

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity")
peft = pytest.importorskip("peft", reason="needs peft: make parity")

import reference

from ais_jax import lora
from ais_jax.lora import LoraConfig
from ais_jax.models import save_pretrained
from ais_jax.peft import save_adapter

pytestmark = [
    pytest.mark.parity,
    # peft still asks transformers by the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SOME = ("k_proj", "in_proj_qkv", "in_proj_a", "up_proj")
# arguments of `pairs`, targets, how many linears of the model they are
CASES = {
    "qwen3-all": (("qwen3-3-on-1",), (), 2 * 7),
    "qwen3-some": (("qwen3-6-on-2",), ("q_proj", "down_proj"), 2 * 2),
    "qwen3_5-all": (("qwen3_5-values-2x",), (), 6 * 8 + 2 * 7),
    "qwen3_5-multimodal": (("qwen3_5-values-1x", True), SOME, 2 + 6 + 6 + 8),
}


def random_adapters(config, model):
    """Both factors random, so that each counts."""
    rng = np.random.default_rng(0)
    like = lora.init(config, model, jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(0.7 * rng.normal(size=x.shape) * x.shape[-2] ** -0.5, jnp.float32),
        like,
    )


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(pairs, tmp_path, name):
    case, targets, count = CASES[name]
    pair = pairs(*case)
    model = pair.ours
    config = LoraConfig(rank=3, alpha=4.5, targets=targets)
    adapters = random_adapters(config, model.structure)
    save_adapter(model, adapters, config, str(pair.folder), tmp_path / "adapter")

    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(pair.theirs), tmp_path / "adapter")
    loaded = peft.get_peft_model_state_dict(theirs)
    reference.assert_same(loaded, reference.stored(tmp_path / "adapter")[0])
    assert len(loaded) == 2 * count

    joined = lora.join(adapters, model.params, config.scale)
    ids, mask = reference.batch(6)
    ours = np.asarray(reference.our_logits(model.structure, joined, ids, mask))
    reference.close(ours[mask], reference.their_logits(theirs, ids, mask)[mask], pair.name)
    plain = reference.their_logits(pair.theirs, ids, mask)
    assert np.abs(ours - plain)[mask].max() > 1  # the adapters do something

    save_pretrained(model, lora.merge(joined), tmp_path / "merged")
    kernels, _ = reference.stored(tmp_path / "merged")
    merged, before = theirs.merge_and_unload().state_dict(), pair.theirs.state_dict()
    for key, kernel in kernels.items():
        torch.testing.assert_close(merged[key], kernel, rtol=0, atol=2e-6)
    assert sum(not torch.equal(kernel, before[key]) for key, kernel in kernels.items()) == count
