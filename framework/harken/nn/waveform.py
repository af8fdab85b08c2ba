"""The convolutions of a waveform frontend as matrix products over `(B, T, C)`, for training on a CPU.

There torch's convolution is slower on the way back than a matrix product, its group norm reads the largest tensor of
the whole model several times, and autograd keeps three tensors of that size (docs/LOG.md). Here each layer keeps what
enters its activation and nothing else. Results equal the plain layers' but for the order of summation; under
autocast the products are of bf16, and kernels' gradients are added up in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

# samples of a batch for each channel from which the products were measured faster; at 31 they take 1.3 times as long,
# for reordering the kernels costs the same however short the audio is (docs/LOG.md)
_ENOUGH = 400


def pays(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Say whether to use these functions for waveforms: long, fp32, on a CPU, with a gradient of the weights alone.

    Elsewhere torch's kernels are as fast, or not measured; without a gradient the plain layers can be exported.
    Autocast to bf16 is for the products alone.
    """
    if not torch.is_grad_enabled() or x.requires_grad or torch.compiler.is_compiling():
        return False
    if _products() not in (torch.float32, torch.bfloat16):
        return False
    if x.numel() < _ENOUGH * len(weights[0]):
        return False
    # ZeRO 3 gathers a parameter when its own module is called, which these functions do not do
    usable = (weight.requires_grad and not hasattr(weight, "ds_id") for weight in weights)
    return all(tensor.device.type == "cpu" and tensor.dtype is torch.float32 for tensor in (x, *weights)) and all(
        usable
    )


def normalised_convolution(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    stride: int,
    frames: Sequence[int] | None,
    eps: float = 1e-5,
) -> Tensor:
    """Convolve waveforms `(B, S)` with `(C, 1, K)` and give each channel mean 0 and variance 1 over time: `(B, T, C)`.

    scale, shift: `(C,)`. frames: how many frames of each row count for mean and variance, None for all.

    The variance of every channel follows from the covariance `S` of the windows of K samples: `w . S w`. So one product
    of windows less their mean with scaled kernels gives the normalised result, and the convolution's own output is
    never made. What lies behind `frames` is 0 before the shift, as in `harken.nn.masked`.
    """
    dtype = _products()
    with torch.autocast("cpu", enabled=False):
        result: Tensor = _Normalised.apply(x, weight, scale, shift, stride, eps, frames, dtype)  # type: ignore[no-untyped-call]
    return result


def gelu_convolution(x: Tensor, weight: Tensor, *, stride: int) -> Tensor:
    """Convolve `gelu(x)` for `x` `(B, T, C)` with `(C', C, K)` without padding; return `(B, T', C')` of x's type."""
    with torch.autocast("cpu", enabled=False):
        result: Tensor = _GeluConvolution.apply(x, weight, stride)  # type: ignore[no-untyped-call]
    return result


def _products() -> torch.dtype:
    """Return the type that products are of here."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _fold(covariance: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Return for each row the kernels and the bias `(B, K + 1, C)` that convolve and normalise at once."""
    kernels = weight[:, 0].double()
    variance = torch.einsum("ck,bkl,cl->bc", kernels, covariance, kernels)
    factor = scale * (variance + eps).rsqrt()
    bias = shift.expand(len(covariance), 1, -1)
    return torch.cat([factor[:, None, :] * kernels.T, bias], 1).float()


def _centred(windows: Tensor, frames: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """Return windows `(B, T, K)` less their mean, then a column of ones, and the covariances `(B, K, K)` in float64."""
    size = windows.shape[2]
    rows, covariances = windows.new_zeros(*windows.shape[:2], size + 1), []
    rows[..., size] = 1.0
    counts = [windows.shape[1]] * len(windows) if frames is None else frames
    for row, own, count in zip(rows, windows, counts, strict=True):
        centred = own[:count].double()
        centred = centred - centred.sum(0) / max(1, count)
        row[:count, :size] = centred
        covariances.append(centred.T @ centred / max(1, count))
    return rows, torch.stack(covariances)


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        stride: int,
        eps: float,
        frames: Sequence[int] | None,
        dtype: torch.dtype,
    ) -> Tensor:
        rows, ctx.covariance = _centred(x.unfold(1, weight.shape[2], stride), frames)
        ctx.eps = eps
        rows = rows.to(dtype)
        ctx.save_for_backward(rows, weight, scale, shift)
        return torch.bmm(rows, _fold(ctx.covariance, weight, scale, shift, eps).to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, *parameters = ctx.saved_tensors
        folded = torch.stack([row.T @ grad for row, grad in zip(rows, grads[0], strict=True)]).float()
        leaves = [parameter.detach().requires_grad_() for parameter in parameters]
        with torch.enable_grad():
            own = torch.autograd.grad(_fold(ctx.covariance, leaves[0], leaves[1], leaves[2], ctx.eps), leaves, folded)
        return None, *own, None, None, None, None


class _GeluConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        """Return `(B, T', C')`; see `gelu_convolution`. Kernels are cast to the type of `x`, which is kept."""
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        time = (x.shape[1] - weight.shape[2]) // stride + 1
        y = x.new_empty(len(x), time, len(weight))
        parts = list(_parts(weight.to(x.dtype), stride))
        for row, out in zip(x, y, strict=True):
            active = functional.gelu(row)
            for first, taps, kernel in parts:
                part = _windows(active, first, taps, stride, time)
                torch.addmm(out, part, kernel, beta=0 if first == 0 else 1, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of `x` and of the kernels, each of its own type."""
        x, weight = ctx.saved_tensors
        stride, grad = ctx.stride, grads[0].contiguous()
        grad_x = torch.empty_like(x)
        parts = list(_parts(weight.to(x.dtype), stride))
        sums = [torch.zeros_like(kernel, dtype=weight.dtype) for _, _, kernel in parts]
        for row, above, out in zip(x, grad, grad_x, strict=True):
            active, below = functional.gelu(row), torch.empty_like(row)
            reached = len(above) * stride if weight.shape[2] >= stride else 0  # what the first taps give a value
            below[reached:] = 0.0
            for (first, taps, kernel), total in zip(parts, sums, strict=True):
                total += _windows(active, first, taps, stride, len(above)).T @ above
                into = _windows(below, first, taps, stride, len(above))
                # torch's counter of operations knows `addmm` and not `addmm_`
                torch.addmm(into, above, kernel.T, beta=0 if first == 0 and reached else 1, out=into)
            torch.ops.aten.gelu_backward.grad_input(below, row, approximate="none", grad_input=out)
        channels = weight.shape[1]
        taps_first = torch.cat([total.view(-1, channels, len(weight)) for total in sums])
        return grad_x, taps_first.permute(2, 1, 0).contiguous(), None


def _parts(weight: Tensor, stride: int) -> Iterator[tuple[int, int, Tensor]]:
    """Divide a kernel `(C', C, K)` into at most `stride` taps each: first tap, taps, matrix `(taps * C, C')`.

    Windows of `stride` frames do not overlap, so they are the rows of a matrix without a copy.
    """
    outputs, channels, size = weight.shape
    for first in range(0, size, stride):
        taps = min(stride, size - first)
        yield first, taps, weight[:, :, first : first + taps].permute(2, 1, 0).reshape(taps * channels, outputs)


def _windows(x: Tensor, first: int, taps: int, stride: int, time: int) -> Tensor:
    """View a contiguous `(T, C)` as `(time, taps * C)`: row t holds `taps` frames from t * stride + first on."""
    channels = x.shape[1]
    offset = x.storage_offset() + first * channels
    return x.as_strided((time, taps * channels), (stride * channels, 1), offset)
