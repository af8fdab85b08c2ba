"""Warm up, stay, and fall in the last part of the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError

# what is left of the rate when a share x of the decay is done, from 1 to 0
_SHAPES: dict[str, Callable[[float], float]] = {
    "sqrt": lambda x: 1 - math.sqrt(x),
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecayConfig(SlotConfig):
    """The decay alone knows how long the run is: one run's plateau serves runs of any length (arXiv 2404.06395)."""

    peak: float
    """Learning rate between warm-up and decay."""
    warmup_steps: int
    """Steps in which the rate rises linearly to `peak`."""
    decay_share: float = 0.2
    """Share of all steps in which it falls, the last ones: arXiv 2405.18392 finds that 10 to 20 % do."""
    shape: Literal["sqrt", "linear", "cosine"] = "sqrt"
    """How it falls: `sqrt` is 1 - sqrt(x) of the share x of the decay that is done, the best of arXiv 2405.18392."""
    end: float = 0.0
    """Rate at the last step, at most `peak`."""

    def __post_init__(self) -> None:
        check_numbers(
            self, "schedule", positive=("peak",), not_negative=("warmup_steps", "end"), shares=("decay_share",)
        )
        if self.end > self.peak:
            raise HarkenError(f"`schedule.end` must be at most `schedule.peak`, got {self.end:g} and {self.peak:g}")


@register("schedule", WarmupStableDecayConfig)
class WarmupStableDecay:
    """Linear warm-up, a plateau, and a decay whose length is a share of the run.

    Source: MiniCPM, arXiv 2404.06395 section 4; the shape of the decay: arXiv 2405.18392.
    """

    def __init__(self, config: WarmupStableDecayConfig, steps: int) -> None:
        self.config, self.steps = config, steps
        self.decay = round(steps * config.decay_share)
        if config.warmup_steps + self.decay > steps:
            raise HarkenError(
                f"`schedule.warmup_steps` and the decay, `schedule.decay_share` of `train.steps`, must fit into "
                f"`train.steps`, got {config.warmup_steps}, {self.decay} and {steps}: lower one of the two"
            )

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps."""
        own = self.config
        if step < own.warmup_steps:
            return own.peak * (step + 1) / own.warmup_steps
        done = min(1.0, max(0, step - (self.steps - self.decay)) / max(1, self.decay))
        return own.end + (own.peak - own.end) * _SHAPES[own.shape](done)
