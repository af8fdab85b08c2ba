"""Operations whose gradients need care: scaled on the way back, or in a certain order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


class _ScaleAndShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.addcmul(bias, x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grads[0]
        return grad * weight, (grad * x).flatten(0, -2).sum(0), grad.flatten(0, -2).sum(0)


def scale_and_shift(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return `x * weight + bias` for `x` `(..., C)` and `(C,)`, whose gradients come in the order of torch's norms.

    DeepSpeed's ZeRO 2 puts gradients into buckets in the order in which they come, on each rank for itself. So a layer
    that takes torch's norm for one batch and its own arithmetic for another must give the gradients of its weight and
    bias in one order, or ranks would add the one's to the other's.
    """
    result: Tensor = _ScaleAndShift.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x`, whose gradient is multiplied by `factor` on the way back (fairseq's `feature_grad_mult`)."""
    if factor == 1.0:
        return x
    result: Tensor = _ScaleGradient.apply(x, factor)  # type: ignore[no-untyped-call]
    return result
