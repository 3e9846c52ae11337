"""Settings of the adaptive importance sampling correction and of the clipped loss."""

from __future__ import annotations

import dataclasses
import math

LEVELS = ("token", "sequence_product", "sequence_geomean")
COEFFICIENTS = ("gated", "shrinkage", "fixed")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum_norm")
POLICY_RATIOS = ("token", "sequence")


def _setting(default, doc: str, choices: tuple[str, ...] | None = None):
    return dataclasses.field(default=default, metadata={"doc": doc, "choices": choices})


@dataclasses.dataclass(frozen=True)
class AISConfig:
    """Settings of the correction and of the clipped loss. Frozen and hashable: a static argument.

    Raises:
      ValueError: a value is out of range, or two settings contradict each other.
    """

    level: str = _setting("token", "what one weight is taken over", LEVELS)
    cap: float | None = _setting(2.0, "upper bound C of the weights; null leaves them uncapped")
    coefficient: str | None = _setting(
        None,
        "how alpha is set; null takes gated, and shrinkage for level sequence_product",
        COEFFICIENTS,
    )
    reliability_power: float = _setting(1.0, "p in gated: alpha is proportional to R^p")
    amplification_gain: float = _setting(1.0, "kappa in gated: alpha ~ 1 / (1 + kappa (V - 1)+)")
    fixed_alpha: float = _setting(1.0, "alpha of coefficient=fixed: 0 is plain GRPO, 1 is TIS")
    severity_scale: float | str = _setting(
        0.03,
        "D0 in nats, the mismatch that is tolerated; auto lets the trainer calibrate it",
    )
    severity_factor: float = _setting(
        0.5, "of auto: D0 is this many times the mean severity of the first rollout batches"
    )
    clip_low: float = _setting(0.2, "the policy ratio is clipped below at 1 - clip_low")
    clip_high: float = _setting(0.2, "the policy ratio is clipped above at 1 + clip_high")
    dual_clip: float | None = _setting(
        None, "bound c > 1 on the loss of negative advantages (dual-clip PPO); null is off"
    )
    policy_ratio: str = _setting(
        "token", "of the clip: per token, or GSPO's length-normalised sequence ratio", POLICY_RATIOS
    )
    aggregation: str = _setting("token_mean", "how the loss is averaged", AGGREGATIONS)
    max_length: int | None = _setting(
        None, "tokens a row is divided by with aggregation=sequence_sum_norm"
    )
    mask_low: float | None = _setting(
        None, "weight 0 where the raw ratio is below this (IcePop, masked IS)"
    )
    mask_high: float | None = _setting(None, "weight 0 where the raw ratio is above this")
    geometric_low: float | None = _setting(
        None, "weight 0 for rows whose geometric-mean ratio is below this"
    )
    geometric_high: float | None = _setting(
        None, "weight 0 for rows whose geometric-mean ratio is above this"
    )
    veto: float | None = _setting(
        None, "weight 0 for rows that hold a token ratio below this, such as 1e-4"
    )

    def __post_init__(self):
        if self.coefficient is None:
            default = "shrinkage" if self.level == "sequence_product" else "gated"
            object.__setattr__(self, "coefficient", default)
        _check_choice("level", self.level, LEVELS)
        _check_choice("coefficient", self.coefficient, COEFFICIENTS)
        _check_choice("aggregation", self.aggregation, AGGREGATIONS)
        _check_choice("policy_ratio", self.policy_ratio, POLICY_RATIOS)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "float" in str(field.type) and isinstance(value, float):
                _check_range(field.name, value, math.isfinite(value), "finite")
        _check_range("cap", self.cap, self.cap is None or self.cap > 0, "above 0, or null")
        _check_range("fixed_alpha", self.fixed_alpha, 0 <= self.fixed_alpha <= 1, "in [0, 1]")
        _check_range(
            "amplification_gain",
            self.amplification_gain,
            self.amplification_gain >= 0,
            "at least 0",
        )
        _check_range(
            "severity_scale",
            self.severity_scale,
            self.severity_scale == "auto"
            if isinstance(self.severity_scale, str)
            else self.severity_scale > 0,
            "above 0, or 'auto'",
        )
        _check_range("severity_factor", self.severity_factor, self.severity_factor > 0, "above 0")
        _check_range("clip_low", self.clip_low, 0 <= self.clip_low <= 1, "in [0, 1]")
        _check_range("clip_high", self.clip_high, self.clip_high >= 0, "at least 0")
        _check_range(
            "dual_clip",
            self.dual_clip,
            self.dual_clip is None or self.dual_clip > 1,
            "above 1, or null",
        )
        needs_length = self.aggregation == "sequence_sum_norm"
        _check_range(
            "max_length",
            self.max_length,
            not needs_length if self.max_length is None else self.max_length > 0,
            "a positive count of tokens where aggregation is sequence_sum_norm",
        )
        for low, high in (("mask_low", "mask_high"), ("geometric_low", "geometric_high")):
            a, b = getattr(self, low), getattr(self, high)
            _check_range(high, b, a is None or b is None or a < b, f"above {low}={a}")


def _check_choice(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


def _check_range(name: str, value, ok: bool, what: str) -> None:
    if not ok:
        raise ValueError(f"{name}={value!r} must be {what}")


PRESETS: dict[str, AISConfig] = {
    "ais": AISConfig(),
    "none": AISConfig(coefficient="fixed", fixed_alpha=0.0),
    "tis": AISConfig(coefficient="fixed"),
    "tis_sequence": AISConfig(coefficient="fixed", level="sequence_product"),
    "tis_geomean": AISConfig(coefficient="fixed", level="sequence_geomean"),
    "icepop": AISConfig(coefficient="fixed", cap=None, mask_low=0.5, mask_high=5.0),
    "geometric_rejection": AISConfig(
        coefficient="fixed", geometric_low=0.999, geometric_high=1.001
    ),
}
"""The corrections of other frameworks as settings of the same functions, at their thresholds."""
