"""Eden: decay by steps taken and by audio seen. Zipformer's schedule."""

from __future__ import annotations

from dataclasses import dataclass

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers


@dataclass(frozen=True, kw_only=True)
class EdenConfig(SlotConfig):
    """Made for `scaled_adam`. Defaults are those of icefall's Zipformer recipes (`zipformer/train.py`)."""

    rate: float = 0.045
    """Learning rate that the decay starts from. icefall `base_lr`."""
    lr_steps: float = 7500.0
    """Steps after which the first factor begins to fall fast. icefall `lr_batches`."""
    lr_hours: float
    """Hours of audio after which the second factor does: a fifth to a third of the run's. icefall `lr_hours` (30000 on
    Libriheavy), or its `lr_epochs` (3.5 on LibriSpeech) times the hours of an epoch."""
    warmup_steps: int = 500
    """Steps in which the warm-up's factor rises linearly to 1. icefall `warmup_batches`."""
    warmup_start: float = 0.5
    """Where that factor begins. icefall `warmup_start`."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "schedule",
            positive=("rate", "lr_steps", "lr_hours"),
            not_negative=("warmup_steps",),
            shares=("warmup_start",),
        )


@register("schedule", EdenConfig)
class Eden:
    """`rate` x (1 + (t / lr_steps)^2)^-1/4 x (1 + (hours / lr_hours)^2)^-1/4 x warm-up, t of the first step being 1.

    Source: arXiv 2310.11230 section 3.5, with hours of audio in the place of epochs.
    """

    def __init__(self, config: EdenConfig, steps: int) -> None:
        self.config = config

    def __call__(self, step: int, hours: float) -> float:
        """Return the rate after `step` steps and `hours` of audio."""
        own, t = self.config, step + 1
        by_steps = (1 + (t / own.lr_steps) ** 2) ** -0.25
        by_hours = (1 + (hours / own.lr_hours) ** 2) ** -0.25
        risen = min(1.0, t / own.warmup_steps) if own.warmup_steps else 1.0
        return float(own.rate * by_steps * by_hours * (own.warmup_start + (1 - own.warmup_start) * risen))
