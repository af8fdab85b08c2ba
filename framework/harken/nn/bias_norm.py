"""BiasNorm: a norm that keeps some of the length of what it normalises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from harken.nn.limits import limit_parameter


class _BiasNorm(torch.autograd.Function):
    """Keeps the input alone; the derivatives are those of x s, s = exp(g) / rms(x - bias)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias, log_scale)
        inverse, _ = _inverse_rms(x, bias)
        return (x.float() * inverse * log_scale.exp()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, bias, log_scale = ctx.saved_tensors
        grad = grads[0].float()
        inverse, centred = _inverse_rms(x, bias)
        scale = inverse * log_scale.exp()
        along = (grad * x.float()).sum(-1, keepdim=True) * scale
        pull = along * inverse.square() * centred / x.shape[-1]
        bias_grad = pull.flatten(0, -2).sum(0)
        return (grad * scale - pull).to(x.dtype), bias_grad.to(bias.dtype), along.sum().reshape(1).to(log_scale.dtype)


def _inverse_rms(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    centred = x.float() - bias
    return centred.square().mean(-1, keepdim=True).rsqrt(), centred


class BiasNorm(nn.Module):
    """x exp(log_scale) / rms(x - bias), over channels. Source: arXiv 2310.11230 equation 2.

    limit: in training, keep `log_scale` between -1.5 and 1.5.
    """

    def __init__(self, dim: int, *, limit: bool) -> None:
        super().__init__()
        self.limit = limit
        self.log_scale = nn.Parameter(torch.ones(1))  # not a scalar: DeepSpeed cannot broadcast one to the ranks
        self.bias = nn.Parameter(torch.empty(dim).normal_(std=1e-4))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to the same shape."""
        log_scale: Tensor = self.log_scale
        if self.limit and self.training:
            log_scale = limit_parameter(log_scale, -1.5, 1.5)
        y: Tensor = _BiasNorm.apply(x, self.bias, log_scale)  # type: ignore[no-untyped-call]
        return y
