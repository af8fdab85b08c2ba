"""Sums of metrics, kept on the device and read only when they are logged."""

from __future__ import annotations

import torch
from torch import Tensor

from harken.core import distributed
from harken.core.loss import Metrics


class Meter:
    """Adds up (sum, weight) pairs; `read` gives the means over all ranks and starts anew."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Metrics, *, counts: bool = True) -> None:
        """Add a batch's metrics without waiting for the device.

        counts: otherwise their names alone, with no weight: of a batch that a rank runs only to stay in step.
        """
        for name, (value, weight) in metrics.items():
            if not counts:
                value, weight = torch.zeros_like(value), torch.zeros_like(weight)
            if name in self._sums:
                old, old_weight = self._sums[name]
                value, weight = old + value, old_weight + weight
            self._sums[name] = (value, weight)

    def read(self) -> dict[str, float]:
        """Return the mean of each metric over all ranks. Every rank calls it with the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        flat = torch.stack([part.double() for name in names for part in self._sums[name]]).tolist()
        sums = distributed.sum_over_ranks(flat)
        self._sums.clear()
        return {
            name: sums[2 * i] / sums[2 * i + 1] if sums[2 * i + 1] else float("nan") for i, name in enumerate(names)
        }
