"""How well a step uses its devices: tokens per device, model FLOP/s, memory."""

from __future__ import annotations

import dataclasses
import functools
import math
import resource
import sys
from typing import Any

import jax
import numpy as np

from ais_jax.models import Model
from ais_jax.quantize import EMBEDDING_NAME
from ais_jax.sampling import Policy, Rollout

GIB = 2**30

# Dense bfloat16 FLOP/s of a device by what its `device_kind` holds; the first that fits counts.
# From the makers' data sheets. A TPU7x chip is two devices.
PEAKS = (
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("TPU7x", 2307e12 / 2),
    ("TPU v6", 918e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a GRPO step multiplies: products of the linears and of the output layer.

    Attention's own products and what `remat` computes again are left out, so utilization is a
    lower bound.

    Attributes:
      model: parameters of products in the policy.
      trained: those that get a gradient of their own; adapters alone with LoRA.
      frozen: whether the model itself gets none.
      scores: times that a batch is scored.
      epochs: times that it is trained on.
    """

    model: int
    trained: int
    frozen: bool
    scores: int
    epochs: int

    def sample(self, prompts: int, completions: int) -> float:
        """FLOPs of reading and sampling so many tokens."""
        return 2.0 * self.model * (prompts + completions)

    def score(self, tokens: int) -> float:
        """FLOPs of all scoring of a batch."""
        return 2.0 * self.model * tokens * self.scores

    def train(self, tokens: int) -> float:
        """FLOPs of all forward and backward passes of a batch."""
        passes = 2 * self.model + 2 * self.model + 2 * self.trained
        if self.frozen:  # adapters are multiplied beside the model's kernels
            passes += 4 * self.trained
        return float(passes) * tokens * self.epochs


@functools.cache
def work_of(policy: Policy, *, scores: int, epochs: int) -> Work | None:
    """The work of a policy's steps; None for diffusion models, whose passes are not by token."""
    if policy.sampling.diffusion is not None:
        return None
    model = _products(policy.model)
    if policy.lora is None:
        return Work(model, model, False, scores, epochs)
    adapters = jax.eval_shape(policy.init_trainable, jax.random.key(0))
    trained = sum(math.prod(x.shape) for x in jax.tree.leaves(adapters))
    return Work(model, trained, True, scores, epochs)


def _products(model: Model) -> int:
    shapes, axes = model.abstract_params(), model.param_axes()
    if not model.tied:  # an embedding is looked up, not multiplied with
        shapes, axes = (
            {name: x for name, x in tree.items() if name != EMBEDDING_NAME}
            for tree in (shapes, axes)
        )
    sizes = jax.tree.map(
        lambda names, x: math.prod(x.shape) if len(set(names) - {"layers"}) >= 2 else 0,
        axes,
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return sum(jax.tree.leaves(sizes))


def peak_flops(device: Any) -> float | None:
    """Dense bfloat16 FLOP/s of a device; None where unknown, as of a CPU."""
    return next((peak for name, peak in PEAKS if name in device.device_kind), None)


def measure(
    work: Work | None,
    rollout: Rollout,
    sampled: int,
    group_size: int,
    clock: dict[str, float],
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Rates and memory of a step, by the names they are logged under.

    Args:
      work: None leaves utilization out.
      rollout: what is trained on, on the host, groups in consecutive rows.
      sampled: tokens of all that was sampled for it.
      group_size: completions of a prompt, which is read once.
      clock: seconds by phase, "step_seconds" and "train_seconds" among them.
      mesh: the devices.
    """
    metrics = {"tokens_per_device_per_second": sampled / clock["rollout_seconds"] / mesh.size}
    peak = peak_flops(mesh.devices.flat[0])
    if work is not None and peak is not None:
        prompts = np.asarray(rollout.prompt_mask)
        tokens = int(prompts.sum() + np.asarray(rollout.mask).sum())
        train = work.train(tokens)
        read = int(prompts[::group_size].sum())
        total = work.sample(read, sampled) + work.score(tokens) + train
        metrics["mfu"] = total / (clock["step_seconds"] * mesh.size * peak)
        metrics["train_mfu"] = train / (clock["train_seconds"] * mesh.size * peak)
    return metrics | memory()


def memory() -> dict[str, float]:
    """High-water marks since the start, GiB: of this process, and of the fullest of its devices."""
    unit = 1 if sys.platform == "darwin" else 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    metrics = {"host_peak_gib": most / GIB}
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    used = [x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x]
    if used:
        metrics["device_peak_gib"] = max(used) / GIB
    return metrics
