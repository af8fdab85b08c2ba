"""What parts of a run's configuration must agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harken.core.errors import HarkenError

if TYPE_CHECKING:
    from harken.config.schema import RunConfig


def check_agreement(config: RunConfig) -> None:
    """Raise HarkenError where two parts contradict each other."""
    rate = getattr(config.frontend, "sample_rate", config.data.sample_rate)
    if rate != config.data.sample_rate:
        raise HarkenError(
            "`data.sample_rate` must equal `frontend.sample_rate`, so that audio is heard at the rate that it is "
            f"read at, got {config.data.sample_rate} and {rate}"
        )
    if config.objective.whole_cuts and config.data.crop_seconds is not None:
        raise HarkenError(
            f"`data.crop_seconds` must be null with `objective.name: {config.objective.name}`, whose targets belong "
            f"to whole cuts, got {config.data.crop_seconds:g}: leave longer cuts out with `data.max_seconds`"
        )
    if config.optimizer.whole_tensors and config.engine.zero_stage not in ("auto", 0):
        raise HarkenError(
            f"`engine.zero_stage` must be 0 with `optimizer.name: {config.optimizer.name}`, which needs each "
            f"parameter whole, got {config.engine.zero_stage}: ZeRO gives a rank slices of many parameters strung "
            "together; use stage 0, or `optimizer.name: adamw`"
        )
    if config.optimizer.whole_tensors and config.engine.offload_optimizer:
        raise HarkenError(
            f"`engine.offload_optimizer` must be false with `optimizer.name: {config.optimizer.name}`, which needs "
            "each parameter whole: it needs ZeRO, which gives a rank slices"
        )
    if config.engine.compile and config.batch.max_seconds == "auto":
        raise HarkenError(
            "`batch.max_seconds` must be a number with `engine.compile`, as compiling is no part of what a batch "
            "takes: let `harken tune-batch` measure without it"
        )
    if config.train.patience and config.data.valid is None:
        raise HarkenError("`train.patience` counts validations: it needs `data.valid`, which is not given")
    longest = config.data.crop_seconds or config.data.max_seconds
    key = "seconds_per_step" if config.batch.max_seconds == "auto" else "max_seconds"
    if longest > getattr(config.batch, key):
        raise HarkenError(
            f"`batch.{key}` must hold the longest cut (`data.crop_seconds` or `data.max_seconds`), "
            f"got {getattr(config.batch, key)} and {longest}"
        )
