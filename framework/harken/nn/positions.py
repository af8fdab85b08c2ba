"""Positions: relative ones from a wide grouped convolution, fixed ones of a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core.errors import HarkenError
from harken.nn.convolution import convolve_over_time


class PositionalConvolution(nn.Module):
    """Grouped convolution over time, weight-normalised over its kernel axis, then GELU.

    Source: wav2vec 2.0, arXiv 2006.11477 section 2; initialisation as fairseq's `pos_conv`.
    The weight is kept as direction and gain in this module itself (not as a torch parametrisation), so that ZeRO-3
    gathers both when it gathers the module.
    """

    def __init__(self, dim: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.padding = kernel // 2
        self.surplus = 1 - kernel % 2  # an even kernel padded on both sides gives one frame too many
        std = math.sqrt(4 / (kernel * dim))
        self.weight_v = nn.Parameter(torch.randn(dim, dim // groups, kernel) * std)
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Return the positions `(B, T, D)` to add to `x` `(B, T, D)`, whose padded frames must be zero."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        y = convolve_over_time(x, weight, self.bias, padding=self.padding, groups=self.groups)
        return functional.gelu(y[:, : y.shape[1] - self.surplus])


class GridPositions(nn.Module):
    """Fixed sinusoids of time and row, half of the width for each, for a grid of any length.

    Source: masked autoencoders, arXiv 2111.06377, whose position embedding EAT (arXiv 2401.03497) keeps fixed.
    """

    def __init__(self, dim: int, rows: int) -> None:
        super().__init__()
        if dim % 4:
            raise HarkenError(f"`encoder.positions: grid` needs an `encoder.dim` divisible by 4, got {dim}")
        self.dim = dim
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """Return the positions `(T * rows, D)` to add to tokens `(B, T * rows, D)`, time by time."""
        times = torch.arange(x.shape[1] // self.rows, device=x.device).repeat_interleave(self.rows)
        rows = torch.arange(self.rows, device=x.device).repeat(x.shape[1] // self.rows)
        return torch.cat([self._sinusoid(rows), self._sinusoid(times)], 1).to(x.dtype)

    def _sinusoid(self, places: Tensor) -> Tensor:
        quarter = self.dim // 4
        rates = 10000.0 ** (-torch.arange(quarter, device=places.device, dtype=torch.float64) / quarter)
        angles = places[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)
