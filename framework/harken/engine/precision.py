"""Which precision this machine trains fastest in."""

from __future__ import annotations

from dataclasses import replace

import torch

from harken.config.schema import EngineConfig
from harken.core import distributed
from harken.core.cpu import bf16_instructions

_AMPERE = 8
"""Compute capability of the first NVIDIA GPUs with bf16. Source: NVIDIA A100 architecture white paper (2020)."""


def resolved(config: EngineConfig) -> EngineConfig:
    """Return the settings with `precision: auto` made bf16 where every rank's device has it, else fp32.

    Every rank calls it, after joining the process group.
    """
    if config.precision != "auto":
        return config
    lacking = distributed.any_rank(not device_has_bf16())
    return replace(config, precision="fp32" if lacking else "bf16")


def device_has_bf16() -> bool:
    """Whether this rank's device has bf16 arithmetic in hardware."""
    device = distributed.device()
    if device.type == "cpu":
        return bool(bf16_instructions())
    return torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= _AMPERE
