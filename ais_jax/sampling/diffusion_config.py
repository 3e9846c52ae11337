"""How a masked diffusion model is sampled, and how what it sampled is scored."""

from __future__ import annotations

import dataclasses

from ais_jax.settings import at_least, positive, setting


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Settings of diffusion models alone; docs/diffusion.md says what each choice means."""

    block_length: int = setting(32, "positions that are filled before the next ones are begun")
    steps: int | None = setting(
        None, "forwards of the static schedule, an equal share a block; null commits one token each"
    )
    remasking: str = setting(
        "low_confidence",
        "which tokens a step commits: the most probable, random ones, or from left to right (ar)",
        choices=("low_confidence", "random", "ar"),
    )
    schedule: str = setting(
        "static",
        "how many a step commits: an equal share, all whose probability is at least `threshold`, "
        "or the n best while the n-th has at least 1 - factor / (n + 1)",
        choices=("static", "threshold", "factor"),
    )
    threshold: float = setting(0.9, "least probability to be committed, of the threshold schedule")
    factor: float = setting(1.0, "of the factor schedule")
    cfg_scale: float = setting(
        0.0, "classifier-free guidance against the masked prompt; 0 is off and costs one forward"
    )
    cache: str = setting(
        "none",
        "keys and values kept within a block: of what stands before it (prefix) or of everything "
        "else too (dual). Both approximate the model",
        choices=("none", "prefix", "dual"),
    )
    estimator: str = setting(
        "trajectory",
        "at which canvases tokens are scored: those they were committed at (trajectory), the fully "
        "masked one (one_step, as in d1), left to right (ar_order), random ones (elbo)",
        choices=("trajectory", "one_step", "ar_order", "elbo"),
    )
    segments: int = setting(
        8, "trajectory: canvases that the steps are merged into; 0 replays every step"
    )
    canvases: int | None = setting(
        None, "score the tokens of that many canvases, drawn at random; null takes all"
    )
    prompt_masking: float = setting(0.15, "one_step: probability that a prompt token is masked")
    elbo_samples: int = setting(1, "elbo: pairs of complementary masks")
    draws: int = setting(
        1, "sets of random masks a rollout batch; the inner epochs take turns with them"
    )
    selection: bool = setting(
        False,
        "count the probability that low_confidence chose these positions; trajectory with "
        "segments=0 and the static schedule only",
    )

    def __post_init__(self):
        at_least(self, 1, "block_length", "steps", "canvases", "elbo_samples", "draws")
        at_least(self, 0, "cfg_scale", "segments", "prompt_masking")
        positive(self, "factor")
        for field in dataclasses.fields(self):
            choices, value = field.metadata.get("choices"), getattr(self, field.name)
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r} must be one of {', '.join(choices)}")
        for name in ("threshold", "prompt_masking"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be from 0 to 1")
        if self.schedule != "static" and self.remasking != "low_confidence":
            raise ValueError(
                f"schedule={self.schedule!r} goes by confidence: remasking={self.remasking!r} must "
                "be low_confidence, or the schedule static"
            )
        if self.estimator == "elbo" and self.canvases is not None:
            raise ValueError(
                f"canvases={self.canvases} would leave a part of the bound out: with "
                "estimator=elbo lower elbo_samples instead"
            )
        drawn = {"elbo": True, "one_step": self.prompt_masking > 0}
        if self.draws > 1 and not drawn.get(self.estimator, self.canvases is not None):
            raise ValueError(
                f"draws={self.draws}: with estimator={self.estimator} nothing is drawn and all are "
                "the same; take 1, or set canvases (one_step: prompt_masking)"
            )
        if self.selection and not (
            self.recorded
            and self.schedule == "static"
            and self.remasking == "low_confidence"
            and self.cache == "none"
        ):
            raise ValueError(
                "selection=true needs remasking=low_confidence, estimator=trajectory, segments=0, "
                "schedule=static and cache=none: the probability of a choice is known at the "
                "canvas it was made at alone"
            )

    def check(self, length: int) -> None:
        """Refuses completions of `length` tokens that blocks and steps do not fit.

        Raises:
          ValueError: names the key and what would fit.
        """
        if length % self.block_length:
            near = max(length // self.block_length, 1) * self.block_length
            raise ValueError(
                f"block_length={self.block_length} does not divide the {length} tokens of a "
                f"completion (max_new_tokens): make it a divisor, or the length {near}"
            )
        blocks, steps = length // self.block_length, self.steps_of(length)
        if steps > length:
            raise ValueError(
                f"steps={steps} is above the {length} tokens of a completion (max_new_tokens): a "
                "step commits at least one token"
            )
        if steps % blocks:
            raise ValueError(
                f"steps={steps} is not a multiple of the {blocks} blocks (max_new_tokens / "
                f"block_length): take {steps // blocks * blocks or blocks}"
            )

    def steps_of(self, length: int) -> int:
        """Steps of a completion of `length` tokens at most; the static schedule takes them all."""
        return self.steps if self.schedule == "static" and self.steps else length

    def resized(self, old: int, new: int) -> DiffusionConfig:
        """The same tokens a step at another length.

        Raises:
          ValueError: that is no whole number of steps.
        """
        if self.steps is None or self.schedule != "static" or old == new:
            return self
        if self.steps * new % old:
            raise ValueError(
                f"steps={self.steps} for {old} tokens is no whole number of steps for {new}: "
                "choose lengths with a common ratio"
            )
        return dataclasses.replace(self, steps=self.steps * new // old)

    @property
    def recorded(self) -> bool:
        """Whether scoring replays what sampling did, so that the sampler's log-probs are used."""
        return self.estimator == "trajectory" and self.segments == 0

    @property
    def unbiased(self) -> bool:
        """Whether the mean importance ratio of the tokens through the end token is 1.

        In another order than from left to right tokens behind the end may have led to it.
        """
        return self.recorded and self.remasking == "ar"
