"""Sizes of published models, under their published names."""

from __future__ import annotations

from ais_jax.models.llada import LladaConfig
from ais_jax.models.model import ModelConfig
from ais_jax.models.qwen3 import Qwen3Config
from ais_jax.models.qwen3_5 import Qwen3_5Config


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def _qwen3_5(
    hidden: int, mlp: int, layers: int, heads: int, kv: int, value_heads: int, tied: bool
) -> Qwen3_5Config:
    return Qwen3_5Config(
        vocab_size=248320,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        linear_num_value_heads=value_heads,
        tie_word_embeddings=tied,
    )


_LLADA_8B = LladaConfig(vocab_size=126464)

PUBLISHED: dict[str, ModelConfig] = {
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-14B": _qwen3(5120, 17408, 40, 40, tied=False),
    "Qwen3-32B": _qwen3(5120, 25600, 64, 64, tied=False),
    # Sizes of the text models.
    "Qwen3.5-0.8B": _qwen3_5(1024, 3584, 24, 8, 2, 16, tied=True),
    "Qwen3.5-2B": _qwen3_5(2048, 6144, 24, 8, 2, 16, tied=True),
    "Qwen3.5-4B": _qwen3_5(2560, 9216, 32, 16, 4, 32, tied=True),
    "Qwen3.5-9B": _qwen3_5(4096, 12288, 32, 16, 4, 32, tied=False),
    "Qwen3.5-27B": _qwen3_5(5120, 17408, 64, 24, 4, 48, tied=False),
    "LLaDA-8B-Base": _LLADA_8B,
    "LLaDA-8B-Instruct": _LLADA_8B,
    "SmolLM2-135M-Instruct": Qwen3Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=1e5,
        rms_norm_eps=1e-5,
        qk_norm=False,
        max_position_embeddings=8192,
    ),
}
