"""Numbers that change in the course of training, as pure functions of the step, and draws with such probabilities.

In eager code they are Python numbers. In code that torch compiles they are scalars on the CPU, read from the step's
own tensor (`harken.core.draws`): the code is compiled once and has no branch on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from harken.core import draws

Number = float | Tensor
Chance = bool | Tensor


@dataclass(frozen=True)
class Clock:
    """Time for schedules, in the unit of their points: `start + scale * step` of the run."""

    start: float = 0.0
    scale: float = 1.0

    def now(self) -> Number:
        """Return the time of the step that is being taken."""
        step = draws.current_step()
        return self.start + self.scale * (step if torch.compiler.is_compiling() else float(step))


class Scheduled:
    """A piecewise linear function of time, constant before its first point and behind its last.

    Source: icefall's `ScheduledFloat` (arXiv 2310.11230 appendix A.2), without its state.
    """

    def __init__(self, clock: Clock, *points: tuple[float, float]) -> None:
        self.clock = clock
        self.points = points

    def __call__(self) -> Number:
        """Return the value at the current step."""
        now = self.clock.now()
        value: Number = self.points[0][1]
        for (begin, before), (end, after) in pairwise(self.points):
            value = value + (after - before) * _clamped((now - begin) / (end - begin))
        return value


def _clamped(share: Number) -> Number:
    return share.clamp(0.0, 1.0) if isinstance(share, Tensor) else min(1.0, max(0.0, share))


def happens(probability: Number) -> Chance:
    """Draw from torch's generator, which the loop seeds for each micro-batch, whether something is done this time."""
    drawn = torch.rand(()) < probability
    return drawn if torch.compiler.is_compiling() else bool(drawn)


def keep_rows(x: Tensor, rate: Scheduled) -> Tensor | None:
    """Return `(B, 1, 1)` of 0 with probability `rate`, else 1, in the type of `x` `(B, T, D)`; None when all are 1."""
    probability = rate()
    if not isinstance(probability, Tensor) and probability == 0.0:
        return None
    return (torch.rand(x.shape[0], 1, 1, device=x.device) >= probability).to(x.dtype)


def drop_over_time(x: Tensor, rate: Scheduled) -> Tensor | None:
    """Return `(B, 1, C)` of 0 with probability `rate`, else 1 / (1 - rate), for `x` `(B, T, C)`; None where rate is 0.

    A dropout mask that all frames of a sequence share.
    """
    probability = rate()
    if not isinstance(probability, Tensor) and probability == 0.0:
        return None
    kept = torch.rand(x.shape[0], 1, x.shape[2], device=x.device) >= probability
    return (kept / (1 - probability)).to(x.dtype)
