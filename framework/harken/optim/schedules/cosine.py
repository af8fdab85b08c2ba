"""Linear warm-up, then half a cosine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError


@dataclass(frozen=True, kw_only=True)
class CosineConfig(SlotConfig):
    """One period without restarts, as data2vec 2.0 and EAT train (fairseq's scheduler `cosine`)."""

    peak: float
    """Learning rate at the end of the warm-up. fairseq `lr`."""
    warmup_steps: int
    """Steps in which the rate rises linearly to `peak`. fairseq `warmup_updates`."""
    end: float = 0.0
    """Rate at the last step, at most `peak`. fairseq `min_lr`."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule", positive=("peak",), not_negative=("warmup_steps", "end"))
        if self.end > self.peak:
            raise HarkenError(f"`schedule.end` must be at most `schedule.peak`, got {self.end:g} and {self.peak:g}")


@register("schedule", CosineConfig)
class Cosine:
    """`end` + (`peak` - `end`) (1 + cos(pi x)) / 2, x being the share of the steps after the warm-up that are done.

    Source: arXiv 1608.03983 equation 5, without restarts.
    """

    def __init__(self, config: CosineConfig, steps: int) -> None:
        self.config, self.steps = config, steps

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps."""
        own = self.config
        if step < own.warmup_steps:
            return own.peak * (step + 1) / own.warmup_steps
        done = min(1.0, (step - own.warmup_steps) / max(1, self.steps - own.warmup_steps))
        return own.end + (own.peak - own.end) * (1 + math.cos(math.pi * done)) / 2
