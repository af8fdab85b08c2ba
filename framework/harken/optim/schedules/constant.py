"""One rate for the whole run, after a warm-up."""

from __future__ import annotations

from dataclasses import dataclass

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers


@dataclass(frozen=True, kw_only=True)
class ConstantConfig(SlotConfig):
    """`rate` after `warmup_steps`."""

    rate: float
    """Learning rate after the warm-up. fairseq `lr` with the scheduler `fixed`."""
    warmup_steps: int = 0
    """Steps in which the rate rises linearly to `rate`. fairseq `warmup_updates`."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule", positive=("rate",), not_negative=("warmup_steps",))


@register("schedule", ConstantConfig)
class Constant:
    """Linear warm-up to a rate that stays."""

    def __init__(self, config: ConstantConfig, steps: int) -> None:
        self.config = config

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps."""
        return self.config.rate * min(1.0, (step + 1) / max(1, self.config.warmup_steps))
