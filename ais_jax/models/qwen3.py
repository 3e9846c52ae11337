"""Qwen3: grouped-query attention with normed queries and keys, rotary positions, SwiGLU.

Llama-type models are the same block without the query and key norms (`qk_norm=False`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from ais_jax.models import layers
from ais_jax.models.layers import KVCache
from ais_jax.quantize import linear
from ais_jax.settings import at_least, setting


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

    def __post_init__(self):
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} must divide "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even")
        at_least(self, 1, "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        at_least(self, 1, "num_attention_heads")
        at_least(self, 0, "vocab_size")


class Blocks(nnx.Module):
    """All blocks, their parameters stacked on a leading axis; a call computes one of them."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = c = config
        n, d, h = c.num_hidden_layers, c.hidden_size, c.head_dim
        q, kv = c.num_attention_heads * h, c.num_key_value_heads * h
        std = 0.02
        self.input_layernorm = layers.scale(rngs, (n, d), ("layers", "norm"))
        self.q_proj = layers.kernel(rngs, n, (d, q), ("embed", "heads"), std)
        self.k_proj = layers.kernel(rngs, n, (d, kv), ("embed", "kv_heads"), std)
        self.v_proj = layers.kernel(rngs, n, (d, kv), ("embed", "kv_heads"), std)
        # Outputs that are added to the residual stream start smaller by the root of their number.
        self.o_proj = layers.kernel(rngs, n, (q, d), ("heads", "embed"), std / (2 * n) ** 0.5)
        if c.qk_norm:
            self.q_norm = layers.scale(rngs, (n, h), ("layers", "norm"))
            self.k_norm = layers.scale(rngs, (n, h), ("layers", "norm"))
        self.post_attention_layernorm = layers.scale(rngs, (n, d), ("layers", "norm"))
        f = c.intermediate_size
        self.gate_proj = layers.kernel(rngs, n, (d, f), ("embed", "mlp"), std)
        self.up_proj = layers.kernel(rngs, n, (d, f), ("embed", "mlp"), std)
        self.down_proj = layers.kernel(rngs, n, (f, d), ("mlp", "embed"), std / (2 * n) ** 0.5)

    def __call__(self, x, angles, mask, cache: KVCache | None, index):
        """One block. x [B, T, D], mask [B, 1, T, S]; returns (x, the layer's new cache)."""
        eps = self.config.rms_norm_eps
        with jax.named_scope("attention"):
            normed = layers.rms_norm(x, self.input_layernorm.get_value(), eps)
            out, cache = self._attention(normed, angles, mask, cache, index)
            x = x + out
        with jax.named_scope("mlp"):
            normed = layers.rms_norm(x, self.post_attention_layernorm.get_value(), eps)
            weights = (p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj))
            return x + layers.swiglu(normed, *weights), cache

    def _attention(self, x, angles, mask, cache, index):
        c = self.config

        def heads(weight, count):
            return linear(x, weight.get_value()).reshape(*x.shape[:2], count, c.head_dim)

        q = heads(self.q_proj, c.num_attention_heads)
        k = heads(self.k_proj, c.num_key_value_heads)
        v = heads(self.v_proj, c.num_key_value_heads)
        if c.qk_norm:
            q = layers.rms_norm(q, self.q_norm.get_value(), c.rms_norm_eps)
            k = layers.rms_norm(k, self.k_norm.get_value(), c.rms_norm_eps)
        q, k = layers.apply_rotary(q, angles), layers.apply_rotary(k, angles)
        if cache is not None:
            cache = layers.write_cache(cache, k, v, index)
            k, v = cache.keys.astype(x.dtype), cache.values.astype(x.dtype)
        out = jax.nn.dot_product_attention(q, k, v, mask=mask, scale=c.head_dim**-0.5)
        return linear(out.reshape(*x.shape[:2], -1), self.o_proj.get_value()), cache


class Qwen3(nnx.Module):
    """Embedding, scanned blocks, final norm and output layer."""

    def __init__(self, config: Qwen3Config, *, rngs: nnx.Rngs):
        self.config = c = config
        init = jax.nn.initializers.normal(0.02)
        shape, axes = (c.vocab_size, c.hidden_size), ("vocab", "embed")
        self.embed_tokens = layers.param(rngs, shape, axes, init)
        self.layers = Blocks(c, rngs=rngs)
        self.norm = layers.scale(rngs, (c.hidden_size,), ("norm",))
        if not c.tie_word_embeddings:
            self.lm_head = layers.param(rngs, shape[::-1], axes[::-1], init)

    def hidden(self, tokens, positions, key_mask, cache: KVCache | None, index, dtype, remat: bool):
        """Final hidden states [B, T, D] of tokens [B, T], and the cache.

        `key_mask` [B, S] marks the real keys, `index` is the key position of the first token.
        """
        x = self.embed_tokens.get_value()[tokens].astype(dtype)
        angles = layers.rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        mask = layers.causal_mask(key_mask, tokens.shape[1], index)
        graphdef, stacked = nnx.split(self.layers)

        def block(x, inputs):
            params, layer_cache = inputs
            return nnx.merge(graphdef, params)(x, angles, mask, layer_cache, index)

        body = jax.checkpoint(block) if remat else block
        x, cache = jax.lax.scan(body, x, (stacked, cache))
        return layers.rms_norm(x, self.norm.get_value(), self.config.rms_norm_eps), cache

    def unembed(self, hidden) -> jax.Array:
        """Logits [..., V] float32 of hidden states [..., D]."""
        if self.config.tie_word_embeddings:
            kernel = self.embed_tokens.get_value().T
        else:
            kernel = self.lm_head.get_value()
        return jnp.matmul(hidden, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)


def empty_cache(config: Qwen3Config, batch: int, length: int, dtype) -> KVCache:
    """A cache of zeros for `batch` rows of up to `length` tokens."""
    c = config
    shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
