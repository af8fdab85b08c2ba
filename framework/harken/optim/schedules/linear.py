"""Linear warm-up, then linear decay."""

from __future__ import annotations

from dataclasses import dataclass

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers


@dataclass(frozen=True, kw_only=True)
class LinearConfig(SlotConfig):
    """HuBERT Base: peak 5e-4, 32000 of 400000 steps of warm-up, decay to 0 (arXiv 2106.07447 section IV-C)."""

    peak: float
    """Learning rate at the end of the warm-up. fairseq `lr`."""
    warmup_steps: int
    """Steps in which the rate rises linearly to `peak`. fairseq `warmup_updates`."""
    end: float = 0.0
    """Rate at the last step. fairseq `end_learning_rate`."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule", positive=("peak",), not_negative=("warmup_steps", "end"))


@register("schedule", LinearConfig)
class Linear:
    """fairseq's `polynomial_decay` with power 1."""

    def __init__(self, config: LinearConfig, steps: int) -> None:
        self.config, self.steps = config, steps

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps."""
        own = self.config
        if step < own.warmup_steps:
            return own.peak * (step + 1) / own.warmup_steps
        left = max(0.0, (self.steps - step) / max(1, self.steps - own.warmup_steps))
        return own.end + (own.peak - own.end) * left
