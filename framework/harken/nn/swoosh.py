"""The activations SwooshL and SwooshR, and a linear map behind one that keeps nothing but the activation's input."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


class Swoosh(NamedTuple):
    """log(1 + exp(x - shift)) - 0.08 x - offset. Source: arXiv 2310.11230 equations 3 and 4."""

    shift: float
    offset: float

    def __call__(self, x: Tensor) -> Tensor:
        """Map a tensor of any shape to one of the same shape."""
        return functional.softplus(x - self.shift) - _SLOPE * x - self.offset

    def derivative(self, x: Tensor) -> Tensor:
        """Return the derivative at `x`, of its shape: between -0.08 and 0.92."""
        return torch.sigmoid(x - self.shift) - _SLOPE


_SLOPE = 0.08
SWOOSH_L = Swoosh(4.0, 0.035)
SWOOSH_R = Swoosh(1.0, 0.313261687)  # 0 at 0


class _SwooshLinear(torch.autograd.Function):
    """Keeps the input alone, where plain autograd keeps that of the activation and that of the linear map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None, swoosh: Swoosh) -> Tensor:
        ctx.save_for_backward(x, weight, scale)
        ctx.swoosh = swoosh
        y = swoosh(x)
        return functional.linear(y if scale is None else y * scale, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        (grad,) = grads
        y, slope = ctx.swoosh(x), ctx.swoosh.derivative(x)
        if scale is not None:
            y, slope = y * scale, slope * scale
        flat = grad.flatten(0, -2)
        weight_grad = (flat.T @ y.flatten(0, -2).to(grad.dtype)).to(weight.dtype)
        x_grad = (grad @ weight.to(grad.dtype) * slope).to(x.dtype)
        return x_grad, weight_grad, flat.sum(0, dtype=weight.dtype), None, None


def scale_start(linear: nn.Linear, scale: float) -> None:
    """Scale a fresh map's weight, and draw its bias within a tenth of that. Source: icefall's `ScaledLinear`."""
    with torch.no_grad():
        linear.weight.mul_(scale)
        if linear.bias is not None:
            nn.init.uniform_(linear.bias, -0.1 * scale, 0.1 * scale)


class SwooshLinear(nn.Linear):
    """A swoosh, an optional scaling of channels (a dropout mask that all frames share), and a linear map.

    The activation is computed anew in the backward pass. Source: icefall's `ActivationDropoutAndLinear`.
    """

    def __init__(self, inputs: int, outputs: int, swoosh: Swoosh, start_scale: float) -> None:
        super().__init__(inputs, outputs)
        self.swoosh = swoosh
        scale_start(self, start_scale)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Map `(B, T, inputs)` to `(B, T, outputs)`. scale: broadcasts to `x`, and has no gradient."""
        y: Tensor = _SwooshLinear.apply(x, self.weight, self.bias, scale, self.swoosh)  # type: ignore[no-untyped-call]
        return y
