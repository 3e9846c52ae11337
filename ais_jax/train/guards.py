"""Watches over a run's metrics and says, once, what looks wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ais_jax.train.state import CALIBRATION_BATCHES, CALIBRATION_RANGE

PATIENCE = 3


@dataclasses.dataclass(frozen=True)
class Watch:
    """Steps in a row at which each guard found something, and which have spoken."""

    ratio: int = 0
    deaf: int = 0
    spoken: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """What JSON can hold of it, for `Watch.of_json`."""
        return {"ratio": self.ratio, "deaf": self.deaf, "spoken": sorted(self.spoken)}

    @classmethod
    def of_json(cls, value: Mapping[str, Any]) -> Watch:
        """The state that `to_json` was asked of."""
        return cls(value["ratio"], value["deaf"], frozenset(value["spoken"]))


def watch(
    state: Watch, metrics: Mapping[str, float], *, calibrating: bool, selected: bool
) -> tuple[Watch, list[str]]:
    """The new state and the warnings to show for one step's metrics.

    `selected` says that rows were chosen by what was sampled (dynamic sampling, truncation masks):
    then E[rho] is not 1 and is not watched. Otherwise it is 1 for tokens sampled from the rollout
    policy, so a mean ratio that stays 4 standard errors away means that sampler and trainer
    disagree about more than precision. A sampling copy that does not change after an update is not
    the policy that learns.
    """
    found: dict[str, str] = {}
    off = not selected and abs(metrics["ratio_mean"] - 1) > 4 * metrics["ratio_sem"] > 0
    ratio = state.ratio + 1 if off else 0
    if ratio >= PATIENCE:
        found["ratio"] = (
            f"the mean importance ratio is {metrics['ratio_mean']:.4f}, more than 4 standard "
            f"errors from 1 for {ratio} steps: check temperature, tokenizer and the sampling copy"
        )
    unchanged = metrics["codes_changed"] == 0 and metrics["grad_norm"] > 0
    deaf = state.deaf + 1 if unchanged else 0
    if deaf >= PATIENCE:
        found["deaf"] = (
            f"no code of the quantized copy changed for {deaf} updates: the learning rate is below "
            "what the recipe resolves"
        )
    _, high = CALIBRATION_RANGE  # at the lower limit there is hardly any mismatch
    calibrated = calibrating and metrics["step"] == CALIBRATION_BATCHES
    if calibrated and metrics["severity_scale"] >= high:
        found["scale"] = (
            f"the calibrated severity scale is at its upper limit, {high} nats: the mismatch "
            "is large from the start"
        )
    messages = [text for name, text in found.items() if name not in state.spoken]
    return Watch(ratio, deaf, state.spoken | found.keys()), messages
