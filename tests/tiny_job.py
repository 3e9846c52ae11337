"""What the tests of whole runs train, a model whose steps take milliseconds, and where they run."""

import os

# Most of their time would go into optimizing programs.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


QWEN3 = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def one_device() -> dict[str, str]:
    """The environment of a process that has one device, where the tests' own has eight."""
    return os.environ | {"XLA_FLAGS": QUICK}
