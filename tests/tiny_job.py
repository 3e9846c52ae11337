"""What the tests of whole runs train, a model whose steps take milliseconds, and where they run."""

import importlib.metadata
import os

# Most of the tests' time would go into optimizing programs that then run for milliseconds. Set
# AIS_TEST_OPTIMIZED=1, as `make smoke` does, to run them as users do.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # later ones have no other emitters
    QUICK += " --xla_cpu_use_fusion_emitters=false"
if os.environ.get("AIS_TEST_OPTIMIZED"):
    QUICK = ""

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
