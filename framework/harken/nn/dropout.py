"""Dropout whose random numbers cost little on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 2**16


class _DropOnCpu(torch.autograd.Function):
    """Keeps an element where its 16 random bits lie at or above `dropped` of 65536."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        ctx.keep = (words.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2).view(x.shape)
        ctx.scale = _LEVELS / (_LEVELS - dropped)
        kept: Tensor = (x * ctx.keep).mul_(ctx.scale)
        return kept

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] * ctx.keep).mul_(ctx.scale), None


def dropped(x: Tensor, probability: float) -> Tensor:
    """Return `x` of any shape with elements zeroed with a probability, and the others scaled by 1 / (1 - p).

    On a CPU one 64-bit draw of torch's generator serves four elements, a fifth of the time of torch's own, and `p` is
    rounded to 1/65536. Elsewhere it is torch's. Source: Srivastava et al. 2014.
    """
    levels = round(probability * _LEVELS)
    if x.device.type != "cpu" or levels == _LEVELS or torch.compiler.is_compiling():  # it would cut the graph
        return functional.dropout(x, probability, training=True)
    result: Tensor = _DropOnCpu.apply(x, levels)  # type: ignore[no-untyped-call]
    return result


class Dropout(nn.Dropout):
    """`dropped` with probability `p` in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return dropped(x, self.p) if self.training and self.p else x
