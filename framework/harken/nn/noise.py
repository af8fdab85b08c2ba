"""Normal numbers that follow from keys alone: the same in every batch, and made on the device that needs them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_UNIT = 2.0**-24


def normal_of(keys: Tensor, count: int) -> Tensor:
    """Return for keys `(B,)` int64 standard normal numbers `(B, count)`, float32: number i of a row depends on its key.

    A torch generator would draw other numbers for an utterance in another batch, with other padding or on another
    device. Source: SplitMix64 (Steele et al. 2014), and Box and Muller 1958.
    """
    index = torch.arange(1, count + 1, device=keys.device)
    x = keys[:, None] + index * _STEP
    x = (x ^ _shifted(x, 30)) * _FIRST
    x = (x ^ _shifted(x, 27)) * _SECOND
    x = x ^ _shifted(x, 31)
    radius = (_shifted(x, 40).float() + 1.0) * _UNIT  # in (0, 1], as its logarithm is taken
    angle = (x & 0xFFFFFF).float() * (2.0 * math.pi * _UNIT)
    normal: Tensor = (-2.0 * radius.log()).sqrt() * angle.cos()
    return normal


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as unsigned numbers are shifted; torch's int64 copies the sign."""
    shifted: Tensor = (x >> bits) & (2 ** (64 - bits) - 1)
    return shifted
