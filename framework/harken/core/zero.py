"""What training keeps on a device, and how ZeRO divides it."""

from __future__ import annotations

BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two averages in float32. Source: ZeRO, arXiv 1910.02054, section 3.1."""
DIVIDED_BYTES = {0: 0, 1: 8, 2: 12, 3: 16}
"""Of those, what a ZeRO stage divides among the devices: the averages, then gradients, then weights."""
ROOM = 0.5
"""Share of a device's memory that these may take; activations have the rest."""


def state_bytes(parameters: int, stage: int, devices: int) -> float:
    """Return the bytes of weights, gradients and averages on each of `devices`."""
    divided = DIVIDED_BYTES[stage]
    return parameters * (BYTES_PER_PARAMETER - divided + divided / devices)


def fastest_stage(parameters: int, devices: int, device_bytes: float, *, least: int = 0, most: int = 2) -> int:
    """Return the lowest stage whose state fits into `ROOM` of a device, `most` where none does.

    A stage divides more than the one before, and sends more or waits more often for it; on one device it divides
    nothing.
    """
    fitting = (stage for stage in range(least, most) if state_bytes(parameters, stage, devices) <= ROOM * device_bytes)
    return least if devices == 1 else next(fitting, max(least, most))
