"""The models that are measured, and what one of their decoding steps has to read and do."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from ais_jax.models import Model, Params, Qwen3Config, cast_params, save_pretrained
from ais_jax.models.published import PUBLISHED
from ais_jax.quantize import bytes_of
from ais_jax.sampling import Policy, SamplingConfig


def _small(layers: int, hidden: int, mlp: int, heads: tuple[int, int], vocabulary=32_000):
    return Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=64,
        tie_word_embeddings=False,
    )


CONFIGS: dict[str, Qwen3Config] = {
    "tiny": _small(2, 128, 256, (4, 2), vocabulary=512),
    "71m": _small(12, 512, 1536, (8, 4)),
    "100m": _small(12, 640, 1920, (10, 5)),
    "0.6b": PUBLISHED["Qwen3-0.6B"],  # type: ignore[dict-item]
    "8b": PUBLISHED["Qwen3-8B"],  # type: ignore[dict-item]
}
# Nats a token that a model of random weights is scaled to: like that of text, neither flat nor
# sure, either of which would hide what quantization does to the probabilities.
_ENTROPY = 1.5


def random_params(model: Model) -> Params:
    """Random parameters in the model's dtype, always the same ones.

    As they are initialized, every distribution would be nearly flat and every query would see the
    mean of all keys. Norms' weights are set so that logits and attention scores vary as those of a
    trained model do.
    """
    config: Any = model.config
    # The entropy of a softmax of V normal logits of deviation s is near log V - s^2 / 2.
    deviation = (2 * (math.log(config.vocab_size) - _ENTROPY)) ** 0.5
    factors = {"norm": deviation / (0.02 * config.hidden_size**0.5), "q_norm": 1.3, "k_norm": 1.3}

    def create(key):
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x * factors.get(path[-1].key, 1.0), model.init(key)
        )
        return cast_params(model, params, model.dtype)

    return jax.jit(create)(jax.random.key(0))


def policy_of(model: Model, new_tokens: int, kv_cache: str = "none") -> Policy:
    """Samples at temperature 1, and always `new_tokens` of them."""
    size = model.config.vocab_size
    sampling = SamplingConfig(new_tokens, 1.0, 0, (), token_count=size, kv_cache=kv_cache)
    return Policy(model, endless(sampling, size))


def endless(sampling: SamplingConfig, vocab_size: int) -> SamplingConfig:
    """The same over all ids of a vocabulary but padding and the last, which alone would end it."""
    last = vocab_size - 1
    return dataclasses.replace(sampling, pad_id=0, eos_ids=(last,), token_count=last)


def random_prompts(config: Any, rows: int, length: int) -> np.ndarray:
    """[rows, length] int32 ids, neither padding nor the end token."""
    rng = np.random.default_rng(1)
    return rng.integers(1, config.vocab_size - 2, (rows, length)).astype(np.int32)


def export(name: str, dtype: str, folder: str) -> None:
    """Writes those parameters as a folder that others read."""
    model = Model(CONFIGS[name], dtype)
    save_pretrained(model, random_params(model), folder)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a decoding step needs, whatever a sampler does."""

    weights: int  # bytes that every step reads
    kv_token: float  # bytes of keys and values of a token
    multiplied: int  # parameters that every token is multiplied with
    attended: int  # multiplications of a token with one key and its value

    def bytes_a_step(self, rows: int, keys: float) -> float:
        """Bytes that are read; `keys` tokens of each row are in the cache."""
        return self.weights + rows * keys * self.kv_token

    def operations_a_step(self, rows: int, keys: float) -> float:
        """Multiplications and additions."""
        return 2 * rows * (self.multiplied + keys * self.attended)


def work_of(model: Model, copy: Params, kv_cache: str = "none") -> Work:
    """The work of a sampling copy. An embedding that is not the output layer is not read whole."""
    config: Any = model.config
    looked_up = bytes_of(copy["embed_tokens"]) if "lm_head" in copy else 0
    cache = jax.eval_shape(lambda: model.empty_cache(1, 128, kv_cache))
    shapes = model.abstract_params()["layers"]
    kernels = sum(x.size for x in jax.tree.leaves(shapes) if x.ndim == 3)
    return Work(
        weights=bytes_of(copy) - looked_up,
        kv_token=bytes_of(cache) / 128,
        multiplied=kernels + config.vocab_size * config.hidden_size,
        attended=2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim,
    )


def count(config: Any) -> int:
    """Number of parameters."""
    return sum(x.size for x in jax.tree.leaves(Model(config).abstract_params()))
