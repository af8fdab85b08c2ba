"""Positions: relative ones from a wide grouped convolution or several in a row, fixed ones of a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core.errors import HarkenError
from harken.nn.convolution import GroupedConvolution, convolve_over_time


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
        std = math.sqrt(4 / (kernel * dim))
        self.weight_v = nn.Parameter(torch.randn(dim, dim // groups, kernel) * std)
        self.weight_g = nn.Parameter(self.weight_v.detach().norm(dim=(0, 1), keepdim=True))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        """Return the positions `(B, T, D)` to add to `x` `(B, T, D)`, whose padded frames must be zero."""
        weight = self.weight_v * (self.weight_g / self.weight_v.norm(dim=(0, 1), keepdim=True))
        y = convolve_over_time(x, weight, self.bias, padding=self.padding, groups=self.groups)
        return functional.gelu(y[:, : x.shape[1]])  # an even kernel padded on both sides gives one frame too many


class StackedConvolutions(nn.Module):
    """Grouped convolutions over time in a row, each with a layer norm without weights and GELU behind it.

    Padded frames are zeros to each of them. In fairseq only to the first: what the others see behind an utterance is
    the norm of a bias there, as far as its batch is padded, and zeros beyond.
    Source: fairseq's `TransformerEncoder` with `pos_conv_depth` above 1, data2vec's (arXiv 2202.03555); the weights
    begin as torch's.
    """

    def __init__(self, dim: int, kernel: int, groups: int, depth: int) -> None:
        """Make `depth` convolutions that see about `kernel` frames together, three each at least."""
        super().__init__()
        each = position_kernel(kernel, depth)
        self.layers = nn.ModuleList(GroupedConvolution(dim, each, groups) for _ in range(depth))

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        """Return the positions `(B, T, D)` to add to `x` `(B, T, D)`; `padded` `(B, T)` is True beyond an utterance."""
        for layer in self.layers:
            if padded is not None:
                x = x.masked_fill(padded[..., None], 0.0)
            x = functional.gelu(functional.layer_norm(layer(x), x.shape[-1:]))
        return x


def position_kernel(frames: int, depth: int) -> int:
    """Return the frames that each of `depth` convolutions covers, `frames` of them together. Source: as above."""
    return frames if depth == 1 else max(3, frames // depth)


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

    def forward(self, x: Tensor, padded: Tensor | None = None) -> Tensor:
        """Return the positions `(T * rows, D)` to add to tokens `(B, T * rows, D)`, time by time."""
        times = torch.arange(x.shape[1] // self.rows, device=x.device).repeat_interleave(self.rows)
        rows = torch.arange(self.rows, device=x.device).repeat(x.shape[1] // self.rows)
        return torch.cat([self._sinusoid(rows), self._sinusoid(times)], 1).to(x.dtype)

    def _sinusoid(self, places: Tensor) -> Tensor:
        quarter = self.dim // 4
        rates = 10000.0 ** (-torch.arange(quarter, device=places.device, dtype=torch.float64) / quarter)
        angles = places[:, None] * rates
        return torch.cat([angles.sin(), angles.cos()], 1)
