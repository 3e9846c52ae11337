"""Qwen3.5: groups of blocks with linear attention (gated DeltaNet), each closed by a block with
gated full attention. Norms multiply by 1 + weight.

Masked positions change nothing: they write no state, and the convolution's window holds each row's
last real inputs. Real positions of a row must be consecutive.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from ais_jax.errors import UserError
from ais_jax.linear import linear
from ais_jax.models import cache as cache_lib
from ais_jax.models import deltanet, hf_config, layers
from ais_jax.models.attention import Kernel, Masks, attention, causal_masks
from ais_jax.models.blocks import Schedule, call_block, run_blocks
from ais_jax.models.naming import Tensor, block_tensors
from ais_jax.settings import at_least, positive, setting

MODEL_TYPES = ("qwen3_5", "qwen3_5_text")
PREFIXES = ("model.", "model.language_model.")
# Computed with in float32, and stored so in part.
STORED_DTYPE = ("A_log", "dt_bias", "linear_norm")
# Modules of a block: their names in a published checkpoint, and here.
_SHARED = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "post_attention_layernorm",
    **{f"mlp.{p}_proj": f"{p}_proj" for p in ("gate", "up", "down")},
}
_LINEAR = _SHARED | {
    **{f"linear_attn.in_proj_{p}": f"in_proj_{p}" for p in ("qkv", "z", "b", "a")},
    "linear_attn.conv1d": "conv1d",
    "=linear_attn.A_log": "A_log",
    "=linear_attn.dt_bias": "dt_bias",
    "linear_attn.norm": "linear_norm",
    "linear_attn.out_proj": "out_proj",
}
_FULL = _SHARED | {
    **{f"self_attn.{p}_proj": f"{p}_proj" for p in "qkvo"},
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
}


@dataclasses.dataclass(frozen=True)
class Qwen3_5Config:
    """Sizes of a Qwen3.5 text model, under the names of its published text_config."""

    vocab_size: int = setting(0, "rows of the embedding; 0 takes the tokenizer's size")
    hidden_size: int = setting(1024, "width of the residual stream")
    intermediate_size: int = setting(3584, "width of the feed-forward layer")
    num_hidden_layers: int = setting(24, "number of blocks")
    full_attention_interval: int = setting(4, "every so many blocks one has full attention")
    num_attention_heads: int = setting(8, "query heads of full attention")
    num_key_value_heads: int = setting(2, "its key and value heads; divides the query heads")
    head_dim: int = setting(256, "size of one of its heads")
    linear_num_key_heads: int = setting(16, "query and key heads of linear attention")
    linear_num_value_heads: int = setting(16, "its value heads; a multiple of the key heads")
    linear_key_head_dim: int = setting(128, "size of one of its key heads")
    linear_value_head_dim: int = setting(128, "size of one of its value heads")
    linear_conv_kernel_dim: int = setting(4, "width of its convolution")
    rope_theta: float = setting(1e7, "base of the rotary frequencies")
    partial_rotary_factor: float = setting(0.25, "share of a head's dimensions that rotate")
    rms_norm_eps: float = setting(1e-6, "epsilon of the norms")
    tie_word_embeddings: bool = setting(True, "use the embedding as the output layer too")
    max_position_embeddings: int = setting(262144, "longest sequence it is meant for; not enforced")

    def __post_init__(self):
        at_least(self, 1, "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim")
        at_least(self, 1, "num_attention_heads", "num_key_value_heads", "linear_num_key_heads")
        at_least(self, 1, "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
        at_least(self, 1, "max_position_embeddings")
        at_least(self, 2, "linear_conv_kernel_dim", "full_attention_interval")
        at_least(self, 0, "vocab_size")
        for part, whole in (
            ("num_key_value_heads", "num_attention_heads"),
            ("linear_num_key_heads", "linear_num_value_heads"),
            ("full_attention_interval", "num_hidden_layers"),
        ):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(
                    f"{part}={getattr(self, part)} must divide {whole}={getattr(self, whole)}"
                )
        positive(self, "rope_theta", "rms_norm_eps")
        if not 2 <= self.rotary_dim <= self.head_dim or self.rotary_dim % 2:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor} of head_dim={self.head_dim} "
                f"makes {self.rotary_dim} rotating dimensions: not even, or beyond head_dim"
            )

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def groups(self) -> int:
        """Groups of blocks."""
        return self.num_hidden_layers // self.full_attention_interval

    @property
    def conv_channels(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        return 2 * keys + self.linear_num_value_heads * self.linear_value_head_dim


class HybridCache(NamedTuple):
    """What is kept of the tokens before: G groups, I blocks in each, B rows."""

    conv: Any  # [G, I - 1, B, width - 1, channels], the last real inputs
    state: Any  # [G, I - 1, B, value heads, key size, value size] float32
    attention: Any  # KVCache, [G, B, key heads, S, h]


_BLOCKS = ("layers", "layers", "rows")
CACHE_AXES = HybridCache(
    (*_BLOCKS, "width", "channels"), (*_BLOCKS, "heads", "key", "value"), cache_lib.KV_AXES
)


class _Context(NamedTuple):
    """What every block needs besides its input."""

    angles: tuple[jax.Array, jax.Array]
    masks: Masks
    token_mask: jax.Array  # [B, T]


class _Block(nnx.Module):
    """Norms and feed-forward layer around a mixer; subclasses have `mix`."""

    def __init__(self, config: Qwen3_5Config, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        self.config = c = config
        zeros, d, f = jax.nn.initializers.zeros, c.hidden_size, c.intermediate_size
        self.input_layernorm = layers.scale(rngs, stack, d, zeros)
        self.post_attention_layernorm = layers.scale(rngs, stack, d, zeros)
        self.gate_proj = layers.kernel(rngs, stack, (d, f), ("embed", "mlp"))
        self.up_proj = layers.kernel(rngs, stack, (d, f), ("embed", "mlp"))
        self.down_proj = layers.kernel(rngs, stack, (f, d), ("mlp", "embed"), _small(c))

    def __call__(self, x, cache, context: _Context):
        """One block. x [B, T, D]; returns (x, what is new of the block's cache)."""
        with jax.named_scope("attention"):
            out, cache = self.mix(self.norm(x, self.input_layernorm), cache, context)
            x = x + out
        with jax.named_scope("mlp"):
            normed = self.norm(x, self.post_attention_layernorm)
            weights = (p.get_value() for p in (self.gate_proj, self.up_proj, self.down_proj))
            return x + layers.swiglu(normed, *weights), cache

    def norm(self, x, weight):
        return layers.rms_norm_zero_centred(x, weight.get_value(), self.config.rms_norm_eps)

    def mix(self, x, cache, context: _Context):
        raise NotImplementedError


def _small(config: Qwen3_5Config) -> float:
    return 0.02 / (2 * config.num_hidden_layers) ** 0.5


class FullBlocks(_Block):
    """Blocks with gated full attention, stacked; a call computes one of them."""

    def __init__(self, config: Qwen3_5Config, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        super().__init__(config, stack, rngs=rngs)
        c, d, h, zeros = config, config.hidden_size, config.head_dim, jax.nn.initializers.zeros
        q, kv = c.num_attention_heads * h, c.num_key_value_heads * h
        self.q_proj = layers.kernel(rngs, stack, (d, 2 * q), ("embed", "heads"))
        self.k_proj = layers.kernel(rngs, stack, (d, kv), ("embed", "kv_heads"))
        self.v_proj = layers.kernel(rngs, stack, (d, kv), ("embed", "kv_heads"))
        self.o_proj = layers.kernel(rngs, stack, (q, d), ("heads", "embed"), _small(c))
        self.q_norm = layers.scale(rngs, stack, h, zeros)
        self.k_norm = layers.scale(rngs, stack, h, zeros)

    def mix(self, x, cache, context: _Context):
        """Attention whose output is gated by the input; each head's rows are query, then gate."""
        c, shape = self.config, x.shape[:2]
        counts = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        sizes = [2 * counts[0] * c.head_dim, *(n * c.head_dim for n in counts[1:])]
        kernels = [p.get_value() for p in (self.q_proj, self.k_proj, self.v_proj)]
        outs = layers.products(x, kernels, sizes)
        queries, k, v = (out.reshape(*shape, n, -1) for out, n in zip(outs, counts, strict=True))
        q, gate = jnp.split(queries, 2, axis=-1)
        q = self._rotate(self.norm(q, self.q_norm), context.angles)
        k = self._rotate(self.norm(k, self.k_norm), context.angles)
        out, cache = attention(q, k, v, context.masks, cache)
        gate = jax.nn.sigmoid(gate.reshape(*shape, -1))
        return linear(out * gate, self.o_proj.get_value()), cache

    def _rotate(self, x, angles):
        rotated, rest = jnp.split(x, [self.config.rotary_dim], axis=-1)
        return jnp.concatenate([layers.apply_rotary(rotated, angles), rest], axis=-1)


class LinearBlocks(_Block):
    """Blocks with a gated DeltaNet, stacked; a call computes one of them."""

    def __init__(self, config: Qwen3_5Config, stack: tuple[int, ...], *, rngs: nnx.Rngs):
        super().__init__(config, stack, rngs=rngs)
        c, d, heads = config, config.hidden_size, config.linear_num_value_heads
        values = heads * c.linear_value_head_dim
        lead, init = ("layers",) * len(stack), jax.nn.initializers
        self.in_proj_qkv = layers.kernel(rngs, stack, (d, c.conv_channels), ("embed", "heads"))
        self.in_proj_z = layers.kernel(rngs, stack, (d, values), ("embed", "heads"))
        self.in_proj_b = layers.kernel(rngs, stack, (d, heads), ("embed", "few"))
        self.in_proj_a = layers.kernel(rngs, stack, (d, heads), ("embed", "few"))
        width = c.linear_conv_kernel_dim
        self.conv1d = layers.param(
            rngs,
            (*stack, c.conv_channels, width),
            (*lead, "channels", "width"),
            init.normal(width**-0.5),
        )
        self.A_log = layers.param(rngs, (*stack, heads), (*lead, "few"), _initial_decay)
        self.dt_bias = layers.param(rngs, (*stack, heads), (*lead, "few"), init.ones)
        self.linear_norm = layers.scale(rngs, stack, c.linear_value_head_dim)
        self.out_proj = layers.kernel(rngs, stack, (values, d), ("heads", "embed"), _small(c))

    def mix(self, x, cache, context: _Context):
        """The gated delta rule over convolved queries, keys and values, normed and gated."""
        c, mask = self.config, context.token_mask
        x = x * mask[..., None].astype(x.dtype)
        window, state = cache if cache is not None else self._start(x)
        kernels = [self.in_proj_qkv.get_value(), self.in_proj_z.get_value()]
        sizes = [c.conv_channels, c.linear_num_value_heads * c.linear_value_head_dim]
        mixed, z = layers.products(x, kernels, sizes)
        mixed, window = self._convolve(mixed, window, mask)
        q, k, v = self._heads(mixed)
        beta = jax.nn.sigmoid(linear(x, self.in_proj_b.get_value())).astype(jnp.float32)
        rate = jax.nn.softplus(
            linear(x, self.in_proj_a.get_value()).astype(jnp.float32)
            + self.dt_bias.get_value().astype(jnp.float32)
        )
        g = -jnp.exp(self.A_log.get_value().astype(jnp.float32)) * rate
        live = mask[..., None]
        rule = deltanet.recurrent if x.shape[1] == 1 else deltanet.chunked
        out, state = rule(q, k, v, jnp.where(live, g, 0.0), jnp.where(live, beta, 0.0), state)
        normed = layers.rms_norm(out.astype(x.dtype), self.linear_norm.get_value(), c.rms_norm_eps)
        z = z.reshape(normed.shape).astype(jnp.float32)
        gated = normed.astype(jnp.float32) * jax.nn.silu(z)
        out = linear(gated.astype(x.dtype).reshape(*x.shape[:2], -1), self.out_proj.get_value())
        return out, None if cache is None else (window, state)

    def _start(self, x):
        c, rows = self.config, x.shape[0]
        sizes = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        window = jnp.zeros((rows, c.linear_conv_kernel_dim - 1, c.conv_channels), x.dtype)
        return window, jnp.zeros((rows, *sizes), jnp.float32)

    def _convolve(self, u, window, mask):
        """Causal convolution of inputs [B, T, C] after a window of those before, and silu.

        Returns the output [B, T, C] and the window after each row's last real input.
        """
        kernel = self.conv1d.get_value().astype(u.dtype).astype(jnp.float32)
        width, length = kernel.shape[1], u.shape[1]
        inputs = jnp.concatenate([window.astype(u.dtype), u], axis=1)
        out = sum(
            inputs[:, j : j + length].astype(jnp.float32) * kernel[:, j] for j in range(width)
        )
        places = jnp.arange(1, length + 1)
        end = jnp.max(jnp.where(mask, places, 0), axis=1)
        window = jax.vmap(lambda row, i: jax.lax.dynamic_slice_in_dim(row, i, width - 1, axis=0))(
            inputs, end
        )
        return jax.nn.silu(out.astype(u.dtype)), window

    def _heads(self, mixed):
        """Queries, keys and values in float32, [B, T, value heads, size]; a key head serves
        consecutive value heads."""
        c, shape = self.config, mixed.shape[:2]
        keys = c.linear_num_key_heads * c.linear_key_head_dim
        q, k, v = jnp.split(mixed.astype(jnp.float32), [keys, 2 * keys], axis=-1)
        repeat = c.linear_num_value_heads // c.linear_num_key_heads
        q, k = (
            jnp.repeat(_unit(x.reshape(*shape, c.linear_num_key_heads, -1)), repeat, axis=2)
            for x in (q, k)
        )
        v = v.reshape(*shape, c.linear_num_value_heads, -1)
        return q * c.linear_key_head_dim**-0.5, k, v


def _unit(x):
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _initial_decay(key, shape, dtype):
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))


class Groups(nnx.Module):
    """All groups, stacked; a call computes one of them."""

    def __init__(self, config: Qwen3_5Config, *, rngs: nnx.Rngs):
        groups, interval = config.groups, config.full_attention_interval
        self.linear = LinearBlocks(config, (groups, interval - 1), rngs=rngs)
        self.full = FullBlocks(config, (groups,), rngs=rngs)

    def __call__(self, x, cache: HybridCache | None, context: _Context, schedule: Schedule):
        """x [B, T, D]; returns (x, what is new of the group's cache)."""

        def call(block, x, block_cache):
            return block(x, block_cache, context)

        states = None if cache is None else (cache.conv, cache.state)
        x, states = run_blocks(self.linear, call, x, states, schedule)
        attention = None if cache is None else cache.attention
        x, attention = call_block(self.full, call, x, attention, schedule)
        if states is None:
            return x, None
        return x, HybridCache(states[0], states[1], attention)


class Network(layers.LanguageModel):
    """Embedding, scanned groups, final norm and output layer."""

    def __init__(self, config: Qwen3_5Config, *, rngs: nnx.Rngs):
        super().__init__(config, Groups, rngs=rngs, norm_init=jax.nn.initializers.zeros)

    def hidden(
        self,
        tokens,
        positions,
        key_mask,
        cache: HybridCache | None,
        index,
        dtype,
        schedule: Schedule,
    ):
        """Final hidden states [B, T, D] of tokens [B, T], and what is new of the cache."""
        c, length = self.config, tokens.shape[1]
        context = _Context(
            layers.rotary_angles(positions, c.rotary_dim, c.rope_theta),
            causal_masks(key_mask, length, cache, index, Kernel.of(schedule)),
            jax.lax.dynamic_slice_in_dim(key_mask, index, length, axis=1),
        )
        x, cache = run_blocks(
            self.layers,
            lambda group, x, group_cache: group(x, group_cache, context, schedule),
            self.embed(tokens, dtype),
            cache,
            schedule._replace(remat=False),  # blocks are recomputed one by one, not groups
        )
        return layers.rms_norm_zero_centred(x, self.norm.get_value(), c.rms_norm_eps), cache


def empty_cache(
    config: Qwen3_5Config, rows: int, length: int, dtype, kv_format: str
) -> HybridCache:
    """A cache of zeros for `rows` rows of up to `length` tokens."""
    c = config
    blocks = (c.groups, c.full_attention_interval - 1, rows)
    sizes = (c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
    keys = (c.groups, rows, c.num_key_value_heads, length, c.head_dim)
    return HybridCache(
        jnp.zeros((*blocks, c.linear_conv_kernel_dim - 1, c.conv_channels), dtype),
        jnp.zeros((*blocks, *sizes), jnp.float32),
        cache_lib.empty(keys, dtype, kv_format),
    )


def from_hf(raw: Mapping[str, Any]) -> Qwen3_5Config:
    """The config of a published config.json, of a text model or a multimodal one.

    Raises:
      UserError: it lacks a size, or asks for what is not computed here.
    """
    text = hf_config.section(raw, "text_config") or raw
    hf_config.refuse(text, "attention_bias")
    hf_config.expect(text, attn_output_gate=True)
    interval = _interval(text)
    rope = hf_config.section(text, "rope_parameters")
    return hf_config.build(
        Qwen3_5Config,
        text,
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_conv_kernel_dim",
        ),
        full_attention_interval=interval,
        rope_theta=hf_config.rope_theta(text),
        partial_rotary_factor=rope.get(
            "partial_rotary_factor", text.get("partial_rotary_factor", 0.25)
        ),
        tie_word_embeddings=raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
    )


def _interval(text: Mapping[str, Any]) -> int:
    """Blocks a group; their kinds must follow the regular pattern."""
    kinds = text.get("layer_types")
    interval = text.get("full_attention_interval") or 4
    if not kinds:
        return interval
    if not isinstance(kinds, list | tuple):
        raise UserError(f"config.json: layer_types is {kinds!r}, not a list")
    if "full_attention" in kinds:
        interval = kinds.index("full_attention") + 1
    group = ["linear_attention"] * (interval - 1) + ["full_attention"]
    if list(kinds) != group * (hf_config.need(text, "num_hidden_layers") // interval):
        raise UserError(
            f"config.json: layer_types={kinds!r} is not supported; every {interval}th layer, and "
            "the last, must be 'full_attention', the others 'linear_attention'"
        )
    return interval


def to_hf(config: Qwen3_5Config) -> dict[str, Any]:
    """A config.json of a text model, which transformers reads."""
    sizes = dataclasses.asdict(config)
    rope = {
        "rope_type": "default",
        "rope_theta": sizes.pop("rope_theta"),
        "partial_rotary_factor": sizes.pop("partial_rotary_factor"),
    }
    group = ["linear_attention"] * (config.full_attention_interval - 1) + ["full_attention"]
    return {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        **sizes,
        "rope_parameters": rope,
        "layer_types": group * config.groups,
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "mamba_ssm_dtype": "float32",
    }


def tensors(config: Qwen3_5Config, prefix: str) -> Iterator[Tensor]:
    """Every tensor of the text model; `prefix` is one of `PREFIXES`."""
    yield Tensor(f"{prefix}embed_tokens.weight", ("embed_tokens",), (), "same")
    yield Tensor(f"{prefix}norm.weight", ("norm",), (), "same")
    if not config.tie_word_embeddings:
        yield Tensor("lm_head.weight", ("lm_head",), (), "transposed")
    for i in range(config.num_hidden_layers):
        group, place = divmod(i, config.full_attention_interval)
        full = place == config.full_attention_interval - 1
        path = ("layers", "full" if full else "linear")
        index = (group,) if full else (group, place)
        yield from block_tensors(f"{prefix}layers.{i}.", path, index, _FULL if full else _LINEAR)
