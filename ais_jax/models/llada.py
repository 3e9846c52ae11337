"""LLaDA: a Llama block without the causal mask; logits at a position predict that position.

Its published names differ from the usual ones: `ff_proj` gates, `up_proj` is gated, and `ff_out`
names both a block's down projection and the output layer (arXiv 2502.09992).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from flax import nnx

from ais_jax.errors import UserError
from ais_jax.models import hf_config, qwen3
from ais_jax.models.attention import Kernel, Masks, padding_masks
from ais_jax.models.cache import KVCache
from ais_jax.models.naming import Tensor, block_tensors
from ais_jax.models.qwen3 import Qwen3Config
from ais_jax.settings import at_least, positive, setting

MODEL_TYPES = ("llada",)
PREFIXES = ("model.transformer.",)
STORED_DTYPE = ()
# Modules of a block: their names in a published checkpoint, and here.
_MODULES = {
    "attn_norm": "input_layernorm",
    "q_proj": "q_proj",
    "k_proj": "k_proj",
    "v_proj": "v_proj",
    "attn_out": "o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "gate_proj",
    "up_proj": "up_proj",
    "ff_out": "down_proj",
}


@dataclasses.dataclass(frozen=True)
class LladaConfig:
    """Sizes of a LLaDA model, under the names of its published config.json."""

    vocab_size: int = setting(0, "rows of the embedding; 0 takes the tokenizer's size")
    d_model: int = setting(4096, "width of the residual stream")
    mlp_hidden_size: int = setting(12288, "width of the feed-forward layer")
    n_layers: int = setting(32, "number of blocks")
    n_heads: int = setting(32, "query heads; divides d_model")
    n_kv_heads: int = setting(32, "key and value heads; divides the query heads")
    rope_theta: float = setting(5e5, "base of the rotary frequencies")
    rms_norm_eps: float = setting(1e-5, "epsilon of the norms")
    weight_tying: bool = setting(False, "use the embedding as the output layer too")
    max_sequence_length: int = setting(4096, "longest sequence it is meant for; not enforced")
    mask_token_id: int = setting(126336, "the id that stands for a token not yet chosen")

    def __post_init__(self):
        at_least(self, 1, "d_model", "mlp_hidden_size", "n_layers", "n_heads", "n_kv_heads")
        at_least(self, 1, "max_sequence_length")
        at_least(self, 0, "vocab_size", "mask_token_id")
        positive(self, "rope_theta", "rms_norm_eps")
        for part, whole in (("n_heads", "d_model"), ("n_kv_heads", "n_heads")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part}={getattr(self, part)} must divide {whole}={getattr(self, whole)}"
                )
        if self.d_model // self.n_heads % 2:
            raise ValueError(f"d_model / n_heads={self.d_model // self.n_heads} must be even")

    def block_config(self) -> Qwen3Config:
        """The same sizes as those of a Llama-type model."""
        return Qwen3Config(
            vocab_size=self.vocab_size,
            hidden_size=self.d_model,
            intermediate_size=self.mlp_hidden_size,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            num_key_value_heads=self.n_kv_heads,
            head_dim=self.d_model // self.n_heads,
            rope_theta=self.rope_theta,
            rms_norm_eps=self.rms_norm_eps,
            tie_word_embeddings=self.weight_tying,
            qk_norm=False,
            max_position_embeddings=self.max_sequence_length,
        )


class Network(qwen3.Network):
    """The Llama-type network with attention in both directions."""

    def __init__(self, config: LladaConfig, *, rngs: nnx.Rngs):
        super().__init__(config.block_config(), rngs=rngs)

    def masks(self, key_mask, queries: int, cache, index, kernel: Kernel) -> Masks:
        """Every query sees every real key."""
        return padding_masks(key_mask, queries, cache, index, kernel)


CACHE_AXES = qwen3.CACHE_AXES


def empty_cache(config: LladaConfig, rows: int, length: int, dtype, kv_format: str) -> KVCache:
    """A cache of zeros for `rows` rows of up to `length` tokens."""
    return qwen3.empty_cache(config.block_config(), rows, length, dtype, kv_format)


def from_hf(raw: Mapping[str, Any]) -> LladaConfig:
    """The config of a published config.json.

    Raises:
      UserError: it lacks a size, or asks for what is not computed here.
    """
    hf_config.refuse(
        raw,
        "clip_qkv",
        "multi_query_attention",
        "include_bias",
        "include_qkv_bias",
        "attention_layer_norm",
        "alibi",
        "scale_logits",
        "input_emb_norm",
    )
    hf_config.expect(raw, block_type="llama", activation_type="silu", layer_norm_type="rms")
    hf_config.expect(raw, rope=True, rope_full_precision=True)
    heads = hf_config.need(raw, "n_heads")
    config = hf_config.build(
        LladaConfig,
        raw,
        ("d_model", "mlp_hidden_size", "n_layers", "mask_token_id"),
        vocab_size=raw.get("embedding_size") or hf_config.need(raw, "vocab_size"),
        n_kv_heads=raw.get("n_kv_heads") or heads,
        weight_tying=raw.get("weight_tying", False),
    )
    if config.mask_token_id >= config.vocab_size:
        raise UserError(
            f"config.json: mask_token_id={config.mask_token_id} is no row of the embedding, which "
            f"has {config.vocab_size}"
        )
    return config


def to_hf(config: LladaConfig) -> dict[str, Any]:
    """A config.json in the published form."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **dataclasses.asdict(config),
        "embedding_size": config.vocab_size,
        "block_type": "llama",
        "activation_type": "silu",
        "layer_norm_type": "rms",
        "rope": True,
        "rope_full_precision": True,
        "include_bias": False,
        "include_qkv_bias": False,
        "attention_layer_norm": False,
        "alibi": False,
        "use_cache": False,
    }


def tensors(config: LladaConfig, prefix: str) -> Iterator[Tensor]:
    """Every tensor of a checkpoint; `prefix` is one of `PREFIXES`."""
    yield Tensor(f"{prefix}wte.weight", ("embed_tokens",), (), "same")
    yield Tensor(f"{prefix}ln_f.weight", ("norm",), (), "same")
    if not config.weight_tying:
        yield Tensor(f"{prefix}ff_out.weight", ("lm_head",), (), "transposed")
    for i in range(config.n_layers):
        yield from block_tensors(f"{prefix}blocks.{i}.", ("layers",), (i,), _MODULES)
