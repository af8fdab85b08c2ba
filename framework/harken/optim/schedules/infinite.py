"""Warm up, cool down to a rate that stays for as long as data come, and anneal when a model is to be used."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError


@dataclass(frozen=True, kw_only=True)
class InfiniteConfig(SlotConfig):
    """A run without annealing can go on for ever, on new data too; one that anneals starts from any of its checkpoints.

    All lengths are steps, and none but the annealing's depends on `train.steps`.
    """

    peak: float
    """Learning rate at the end of the warm-up. The paper's eta_max."""
    constant: float
    """Rate after the cooldown, at most `peak`. The paper's eta_const."""
    warmup_steps: int
    """Steps in which the rate rises linearly to `peak`."""
    cooldown_steps: int
    """Steps in which it falls along half a cosine from `peak` to `constant`."""
    anneal_steps: int = 0
    """Last steps of the run, in which it falls exponentially from `constant` to `end`; 0 never anneals."""
    end: float | None = None
    """Rate at the last step of the annealing, above 0 and at most `constant`. The paper's eta_min."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "schedule",
            positive=("peak", "constant", "end"),
            not_negative=("warmup_steps", "cooldown_steps", "anneal_steps"),
        )
        if self.constant > self.peak:
            raise HarkenError(
                f"`schedule.constant` must be at most `schedule.peak`, got {self.constant:g} and {self.peak:g}"
            )
        if (self.end is None) != (self.anneal_steps == 0):
            raise HarkenError(
                "`schedule.anneal_steps` and `schedule.end` belong together: the rate falls to `end` in so many steps, "
                f"got {self.anneal_steps} and {self.end}"
            )
        if self.end is not None and self.end > self.constant:
            raise HarkenError(
                f"`schedule.end` must be at most `schedule.constant`, got {self.end:g} and {self.constant:g}"
            )


@register("schedule", InfiniteConfig)
class Infinite:
    """The infinite schedule with a cosine cooldown. Source: "Beyond Cosine Decay", arXiv 2503.02844."""

    def __init__(self, config: InfiniteConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        begun = config.warmup_steps + config.cooldown_steps
        if config.anneal_steps and begun + config.anneal_steps > steps:
            raise HarkenError(
                "`schedule.warmup_steps`, `schedule.cooldown_steps` and `schedule.anneal_steps` must fit into "
                f"`train.steps`, got {config.warmup_steps}, {config.cooldown_steps}, {config.anneal_steps} and {steps}"
            )

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps."""
        own = self.config
        if step < own.warmup_steps:
            return own.peak * (step + 1) / own.warmup_steps
        cooled = step - own.warmup_steps
        if cooled < own.cooldown_steps:
            share = (1 + math.cos(math.pi * cooled / own.cooldown_steps)) / 2
            return own.constant + (own.peak - own.constant) * share
        annealed = step - (self.steps - own.anneal_steps)
        if own.end is None or annealed <= 0:
            return own.constant
        return float(own.constant * (own.end / own.constant) ** min(1.0, annealed / own.anneal_steps))
