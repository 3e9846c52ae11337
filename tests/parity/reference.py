"""Tiny random models of transformers, and this library's reading of them."""
# ruff: noqa: E402

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs PyTorch: make parity")

import transformers
from safetensors import safe_open

from ais_jax.models import Model, from_pretrained, positions_of
from ais_jax.models.pretrained import PretrainedModel

# Of logits, by family: rounding the embedding once moves Qwen3.5's by 1e-4.
NOISE = {"qwen3": 1e-4, "llama": 1e-4, "qwen3_5": 5e-4, "smollm2": 5e-4}
VOCAB, STEPS = 61, 3
# More than the 64 tokens that gated delta nets take in one piece.
WIDTH = 70
PADDING = (0, 5, 66)


def _attention(heads: int, kv_heads: int, head_dim: int, tied: bool, layers: int = 2) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 60,
        "intermediate_size": 76,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 512,
        # Large enough to be seen; and with a small one, the norm of a nearly empty linear state
        # would amplify float32 noise a thousand times.
        "rms_norm_eps": 1e-2,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _qwen3(*sizes, theta: float = 1e6):
    rope = {"rope_type": "default", "rope_theta": theta}
    return transformers.Qwen3Config(**_attention(*sizes), rope_parameters=rope)


def _llama(*sizes, theta: float = 1e4):
    rope = {"rope_type": "default", "rope_theta": theta}
    return transformers.LlamaConfig(**_attention(*sizes), rope_parameters=rope)


def _qwen3_5(*sizes, linear: tuple[int, int, int, int]):
    """Two groups of three linear layers and a full one; key heads, value heads, their sizes."""
    keys, values, key_dim, value_dim = linear
    return transformers.Qwen3_5TextConfig(
        **_attention(*sizes, layers=8),
        linear_num_key_heads=keys,
        linear_num_value_heads=values,
        linear_key_head_dim=key_dim,
        linear_value_head_dim=value_dim,
        linear_conv_kernel_dim=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [1, 1, 0],
            "mrope_interleaved": True,
        },
    )


# query heads, key heads, their size (never hidden size / heads), tied
CASES = {
    "qwen3-untied": lambda: _qwen3(4, 4, 6, False, theta=1e4),
    "qwen3-5-heads": lambda: _qwen3(5, 5, 18, False),
    "qwen3-6-on-2": lambda: _qwen3(6, 2, 8, True),
    "qwen3-3-on-1": lambda: _qwen3(3, 1, 14, False),
    "llama-untied": lambda: _llama(4, 4, 6, False, theta=5e5),
    "llama-5-heads": lambda: _llama(5, 5, 18, True),
    "llama-6-on-2": lambda: _llama(6, 2, 8, False),
    "llama-3-on-1": lambda: _llama(3, 1, 14, False),
    "qwen3_5-values-1x": lambda: _qwen3_5(4, 2, 16, False, linear=(3, 3, 8, 8)),
    "qwen3_5-values-2x": lambda: _qwen3_5(3, 1, 16, True, linear=(2, 4, 8, 6)),
    "qwen3_5-values-3x": lambda: _qwen3_5(5, 5, 16, False, linear=(1, 3, 6, 10)),
}
VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 60,
    "num_position_embeddings": 4,
    "patch_size": 4,
}


@torch.no_grad()
def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of a size at which every part matters: logits spread over a few units."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape)
        if name.endswith("A_log"):
            parameter.copy_(noise - 1)  # states that last for several tokens
        elif parameter.ndim == 1:
            parameter.add_(0.3 * noise)  # norms and biases, around where they begin
        elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
            parameter.copy_(3 * noise / parameter.shape[1] ** 0.5)
        else:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
    return model.eval()


@dataclasses.dataclass(frozen=True)
class Pair:
    """A float32 model in transformers, the folder it was saved to, and the same read from it."""

    name: str
    theirs: transformers.PreTrainedModel
    folder: pathlib.Path
    ours: PretrainedModel


def make_pair(name: str, folder: pathlib.Path) -> Pair:
    """The model of a case, saved by transformers and read here."""
    torch.manual_seed(sorted(CASES).index(name))
    theirs = transformers.AutoModelForCausalLM.from_config(
        CASES[name](), dtype=torch.float32, attn_implementation="eager"
    )
    randomize(theirs).save_pretrained(folder)
    return Pair(name, theirs, folder, from_pretrained(folder, "float32"))


def make_multimodal(name: str, folder: pathlib.Path) -> Pair:
    """The same with a vision part, and names as published."""
    text = CASES[name]()
    config = transformers.Qwen3_5Config(
        text_config=text.to_dict(),
        vision_config=VISION,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    torch.manual_seed(7)
    kind = transformers.Qwen3_5ForConditionalGeneration
    theirs = randomize(kind._from_config(config, attn_implementation="eager"))
    theirs.save_pretrained(folder)
    return Pair(name, theirs, folder, from_pretrained(folder, "float32"))


def batch(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [3, WIDTH + STEPS] and their mask: rows padded on the left as `PADDING` says."""
    ids = np.random.default_rng(seed).integers(0, VOCAB, (len(PADDING), WIDTH + STEPS))
    return ids, np.arange(WIDTH + STEPS) >= np.array(PADDING)[:, None]


def tensor(x) -> torch.Tensor:
    """As integers, which transformers wants masks to be as well."""
    return torch.tensor(np.asarray(x), dtype=torch.long)


@torch.no_grad()
def their_logits(model, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits [B, T, V] of whole sequences."""
    if mask is None:
        return model(input_ids=tensor(ids), use_cache=False).logits.numpy()
    return model(
        input_ids=tensor(ids),
        attention_mask=tensor(mask),
        position_ids=tensor(positions_of(mask)),
        use_cache=False,
    ).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def our_logits(model: Model, params, ids, mask) -> jax.Array:
    """The same here."""
    return model.logits(params, ids, mask)


def load_theirs(folder: pathlib.Path, kind=transformers.AutoModelForCausalLM, dtype=torch.float32):
    """A folder as transformers reads it; nothing is missing, too much or of another shape."""
    model, info = kind.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def close(ours, theirs, name: str) -> None:
    """Equal up to float32 noise, on logits that are large enough to tell."""
    assert np.std(theirs) > 1
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=NOISE[name.partition("-")[0]])


@functools.partial(jax.jit, static_argnums=0)
def our_gradients(model: Model, params, ids, mask):
    """Of the sum of the log-probs of all real tokens that follow a real one."""

    def total(params):
        logps = jax.nn.log_softmax(model.logits(params, ids, mask)[:, :-1])
        chosen = jnp.take_along_axis(logps, ids[:, 1:, None], axis=-1)[..., 0]
        return jnp.sum(chosen, where=mask[:, 1:] & mask[:, :-1])

    return jax.grad(total)(params)


def their_gradients(model, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The same by torch's autograd, by name."""
    model.zero_grad()
    positions = tensor(positions_of(mask))
    logits = model(
        input_ids=tensor(ids),
        attention_mask=tensor(mask),
        position_ids=positions,
        use_cache=False,
    ).logits
    logps = torch.log_softmax(logits[:, :-1], -1)
    chosen = torch.take_along_dim(logps, tensor(ids)[:, 1:, None], dim=-1)[..., 0]
    chosen[torch.tensor(mask[:, 1:] & mask[:, :-1])].sum().backward()
    return {name: p.grad.numpy() for name, p in model.named_parameters()}


def stored(folder: pathlib.Path) -> tuple[dict[str, torch.Tensor], int]:
    """Tensors of a checkpoint by name, and how many files they are in."""
    tensors: dict[str, torch.Tensor] = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors, len(files)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Names, dtypes and bits."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name
