"""Qwen3: grouped-query attention with normed queries and keys, rotary positions, SwiGLU.

Llama-type models are the same block without the query and key norms (`qk_norm=False`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from ais_jax.linear import linear
from ais_jax.models import cache as cache_lib
from ais_jax.models import hf_config, layers
from ais_jax.models.attention import Kernel, Masks, attention, causal_masks
from ais_jax.models.blocks import Schedule, run_blocks
from ais_jax.models.cache import KVCache
from ais_jax.models.naming import Tensor, block_tensors
from ais_jax.settings import at_least, positive, setting

MODEL_TYPES = ("qwen3", "llama")
PREFIXES = ("model.",)
STORED_DTYPE = ()
# Modules of a block: their names in a published checkpoint, and here.
_MODULES = {
    "input_layernorm": "input_layernorm",
    **{f"self_attn.{p}_proj": f"{p}_proj" for p in "qkvo"},
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "post_attention_layernorm",
    **{f"mlp.{p}_proj": f"{p}_proj" for p in ("gate", "up", "down")},
}


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Sizes of a Qwen3 model, under the names of its published config.json."""

    vocab_size: int = setting(0, "rows of the embedding; 0 takes the tokenizer's size")
    hidden_size: int = setting(1024, "width of the residual stream")
    intermediate_size: int = setting(3072, "width of the feed-forward layer")
    num_hidden_layers: int = setting(28, "number of blocks")
    num_attention_heads: int = setting(16, "query heads")
    num_key_value_heads: int = setting(8, "key and value heads; divides the query heads")
    head_dim: int = setting(128, "size of one head, even")
    rope_theta: float = setting(1e6, "base of the rotary frequencies")
    rms_norm_eps: float = setting(1e-6, "epsilon of the norms")
    tie_word_embeddings: bool = setting(True, "use the embedding as the output layer too")
    qk_norm: bool = setting(True, "norm queries and keys per head; false for Llama-type models")
    max_position_embeddings: int = setting(40960, "longest sequence it is meant for; not enforced")

    def __post_init__(self):
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        at_least(self, 1, "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        at_least(self, 1, "num_attention_heads", "max_position_embeddings")
        at_least(self, 0, "vocab_size")
        positive(self, "rope_theta", "rms_norm_eps")


class Blocks(nnx.Module):
    """All blocks, their parameters stacked on a leading axis; a call computes one of them."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = c = config
        n, d, h = (c.num_hidden_layers,), c.hidden_size, c.head_dim
        q, kv, f = c.num_attention_heads * h, c.num_key_value_heads * h, c.intermediate_size
        # Outputs that are added to the residual stream start smaller by the root of their number.
        small = 0.02 / (2 * c.num_hidden_layers) ** 0.5
        self.input_layernorm = layers.scale(rngs, n, d)
        self.q_proj = layers.kernel(rngs, n, (d, q), ("embed", "heads"))
        self.k_proj = layers.kernel(rngs, n, (d, kv), ("embed", "kv_heads"))
        self.v_proj = layers.kernel(rngs, n, (d, kv), ("embed", "kv_heads"))
        self.o_proj = layers.kernel(rngs, n, (q, d), ("heads", "embed"), small)
        if c.qk_norm:
            self.q_norm = layers.scale(rngs, n, h)
            self.k_norm = layers.scale(rngs, n, h)
        self.post_attention_layernorm = layers.scale(rngs, n, d)
        self.gate_proj = layers.kernel(rngs, n, (d, f), ("embed", "mlp"))
        self.up_proj = layers.kernel(rngs, n, (d, f), ("embed", "mlp"))
        self.down_proj = layers.kernel(rngs, n, (f, d), ("mlp", "embed"), small)

    def __call__(self, x, angles, masks: Masks, cache: KVCache | None):
        """One block. x [B, T, D]; returns (x, what is new of the block's cache)."""
        eps = self.config.rms_norm_eps
        with jax.named_scope("attention"):
            normed = layers.rms_norm(x, self.input_layernorm.get_value(), eps)
            out, cache = self._attention(normed, angles, masks, cache)
            x = x + out
        with jax.named_scope("mlp"):
            normed = layers.rms_norm(x, self.post_attention_layernorm.get_value(), eps)
            weights = (p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj))
            return x + layers.swiglu(normed, *weights), cache

    def _attention(self, x, angles, masks, cache):
        c = self.config

        counts = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        kernels = [p.get_value() for p in (self.q_proj, self.k_proj, self.v_proj)]
        outs = layers.products(x, kernels, [n * c.head_dim for n in counts])
        q, k, v = (
            out.reshape(*x.shape[:2], n, c.head_dim) for out, n in zip(outs, counts, strict=True)
        )
        if c.qk_norm:
            q = layers.rms_norm(q, self.q_norm.get_value(), c.rms_norm_eps)
            k = layers.rms_norm(k, self.k_norm.get_value(), c.rms_norm_eps)
        q, k = layers.apply_rotary(q, angles), layers.apply_rotary(k, angles)
        out, cache = attention(q, k, v, masks, cache)
        return linear(out, self.o_proj.get_value()), cache


class Network(layers.LanguageModel):
    """Embedding, scanned blocks, final norm and output layer."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        super().__init__(config, Blocks, rngs=rngs)

    def masks(self, key_mask, queries: int, cache, index, kernel: Kernel) -> Masks:
        """Which keys each query may see: those up to its own place."""
        return causal_masks(key_mask, queries, cache, index, kernel)

    def hidden(
        self, tokens, positions, key_mask, cache: KVCache | None, index, dtype, schedule: Schedule
    ):
        """Final hidden states [B, T, D] of tokens [B, T], and what is new of the cache."""
        angles = layers.rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        masks = self.masks(key_mask, tokens.shape[1], cache, index, Kernel.of(schedule))
        x, new = run_blocks(
            self.layers,
            lambda block, x, block_cache: block(x, angles, masks, block_cache),
            self.embed(tokens, dtype),
            cache,
            schedule,
        )
        return layers.rms_norm(x, self.norm.get_value(), self.config.rms_norm_eps), new


CACHE_AXES = cache_lib.KV_AXES


def empty_cache(config: Qwen3Config, rows: int, length: int, dtype, kv_format: str) -> KVCache:
    """A cache of zeros for `rows` rows of up to `length` tokens."""
    c = config
    shape = (c.num_hidden_layers, rows, c.num_key_value_heads, length, c.head_dim)
    return cache_lib.empty(shape, dtype, kv_format)


def from_hf(raw: Mapping[str, Any]) -> Qwen3Config:
    """The config of a published config.json.

    Raises:
      UserError: it lacks a size, or asks for what is not computed here.
    """
    llama = raw.get("model_type") == "llama"
    hf_config.refuse(raw, "attention_bias", "mlp_bias", "use_sliding_window")
    heads = hf_config.need(raw, "num_attention_heads")
    own_head_dim = hf_config.need(raw, "hidden_size") // heads if llama else 128
    return hf_config.build(
        Qwen3Config,
        raw,
        ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or own_head_dim,
        rope_theta=hf_config.rope_theta(raw),
        tie_word_embeddings=raw.get("tie_word_embeddings", False),
        qk_norm=not llama,
    )


def to_hf(config: Qwen3Config) -> dict[str, Any]:
    """A config.json that transformers reads."""
    kind, name = ("qwen3", "Qwen3") if config.qk_norm else ("llama", "Llama")
    sizes = {k: v for k, v in dataclasses.asdict(config).items() if k != "qk_norm"}
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": kind,
        **sizes,
        "hidden_act": "silu",
        "attention_bias": False,
    }


def tensors(config: Qwen3Config, prefix: str) -> Iterator[Tensor]:
    """Every tensor of a checkpoint; `prefix` is one of `PREFIXES`."""
    yield Tensor(f"{prefix}embed_tokens.weight", ("embed_tokens",), (), "same")
    yield Tensor(f"{prefix}norm.weight", ("norm",), (), "same")
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("lm_head",), (), "transposed")
    names = {k: v for k, v in _MODULES.items() if config.qk_norm or v not in ("q_norm", "k_norm")}
    for i in range(config.num_hidden_layers):
        yield from block_tensors(f"{prefix}layers.{i}.", ("layers",), (i,), names)
