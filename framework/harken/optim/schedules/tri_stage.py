"""Warm up, hold, decay exponentially: wav2vec 2.0's fine-tuning schedule."""

from __future__ import annotations

from dataclasses import dataclass

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError


@dataclass(frozen=True, kw_only=True)
class TriStageConfig(SlotConfig):
    """Shares of the run. wav2vec 2.0 and HuBERT fine-tune with 0.1, 0.4 and 0.5 (arXiv 2006.11477 section 4.3)."""

    peak: float
    """Learning rate between warm-up and decay. fairseq `lr`."""
    warmup_share: float = 0.1
    """Share of the steps in which the rate rises linearly to `peak`. fairseq `phase_ratio`, its first number."""
    hold_share: float = 0.4
    """Share of the steps that have `peak`; the rest decays. fairseq `phase_ratio`, its second number."""
    start_scale: float = 0.01
    """The first rate, as a share of `peak`. fairseq `init_lr_scale`."""
    end_scale: float = 0.05
    """The last rate, as a share of `peak`; the decay is exponential. fairseq `final_lr_scale`."""

    def __post_init__(self) -> None:
        check_numbers(self, "schedule", positive=("peak", "end_scale"), not_negative=("start_scale",))
        if not 0 <= self.warmup_share <= 1 or not 0 <= self.hold_share <= 1 - self.warmup_share:
            raise HarkenError(
                "`schedule.warmup_share` and `schedule.hold_share` must be at least 0 and together at most 1, "
                f"got {self.warmup_share} and {self.hold_share}"
            )


@register("schedule", TriStageConfig)
class TriStage:
    """fairseq's `tri_stage`."""

    def __init__(self, config: TriStageConfig, steps: int) -> None:
        self.config = config
        self.warmup = round(steps * config.warmup_share)
        self.hold = round(steps * config.hold_share)
        self.decay = max(1, steps - self.warmup - self.hold)

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps."""
        own = self.config
        if step < self.warmup:
            return own.peak * (own.start_scale + (1 - own.start_scale) * step / self.warmup)
        done = min(1.0, max(0, step - self.warmup - self.hold) / self.decay)
        return float(own.peak * own.end_scale**done)
