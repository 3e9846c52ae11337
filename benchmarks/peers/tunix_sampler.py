"""The sampler of Tunix on a model folder: a contestant, see worker.py.

Without log-probs, which it would return for more time.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import time

import jax
import jax.numpy as jnp
from tunix.generate.sampler import CacheConfig, Sampler
from tunix.models.qwen3.model import ModelConfig
from tunix.models.qwen3.params import create_model_from_safe_tensors
from worker import serve

NO_TOKEN = -1


class Ids:
    """A tokenizer whose text is ids with spaces between."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self) -> int:
        return NO_TOKEN

    def pad_id(self) -> int:
        return 0


def load(job: dict):
    sizes = json.loads((pathlib.Path(job["folder"]) / "config.json").read_text())
    dtype = jnp.dtype(job["dtype"])
    config = ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=int(sizes["rope_theta"]),
        norm_eps=sizes["rms_norm_eps"],
        use_tied_embedding=sizes["tie_word_embeddings"],
        dtype=dtype,
        param_dtype=dtype,
    )
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    model = create_model_from_safe_tensors(job["folder"], config, mesh, dtype)
    width = len(job["prompts"][0])
    cache = CacheConfig(
        width + job["new_tokens"], config.num_layers, config.num_kv_heads, config.head_dim
    )
    sampler = Sampler(model, Ids(), cache)
    texts = [" ".join(map(str, row)) for row in job["prompts"]]

    def run(request: dict) -> dict:
        began = time.perf_counter()
        with mesh:
            out = sampler(
                texts[: request["rows"]],
                max_generation_steps=request["new_tokens"],
                max_prompt_length=width,
                eos_tokens=[NO_TOKEN],
                temperature=1.0,
                top_p=1.0,
                seed=0,
            )
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "tokens": sum(len(row) for row in out.tokens)}

    version = importlib.metadata.version("google-tunix")
    return run, {"about": f"google-tunix {version}, jax {jax.__version__}"}


if __name__ == "__main__":
    serve(load)
