"""A model of two blocks and prompts of unequal length, for tests of autoregressive sampling."""

import jax
import numpy as np

from ais_jax.models import Qwen3Config

EOS, PAD, VOCAB = 1, 0, 24
QWEN3 = Qwen3Config(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=1e4,
    tie_word_embeddings=False,
)


def batch(rows: int, width: int):
    """(prompts, mask, keys), left-padded."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, width + 1, rows)
    mask = np.arange(width)[None] >= width - lengths[:, None]
    prompts = np.where(mask, rng.integers(2, 20, (rows, width)), PAD).astype(np.int32)
    return prompts, mask, jax.random.split(jax.random.key(7), rows)


def enlarged(params, layers: float, head: float):
    """Random parameters, larger than at the start of training: choices differ between prompts."""
    larger = jax.tree.map(lambda x: layers * x if x.ndim >= 3 else x, params["layers"])
    return {**params, "layers": larger, "lm_head": head * params["lm_head"]}
