"""Learned changes of the frame rate between the stages of MR-HuBERT's encoder."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from harken.encoders.conformer import without_padding
from harken.nn.masked import normalise_over_time

SCALE = math.sqrt(0.4)
"""Of each sum of two branches. fairseq `residual_scale`."""


class UtteranceNorm(nn.GroupNorm):
    """A group norm of one group over the real frames of each utterance, so that padding changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__(1, dim)

    def forward(self, x: Tensor, attend: Tensor | None = None) -> Tensor:
        """Normalise `(B, T, D)` in fp32; attend: `(B, 1, 1, T)`, True where real, None when nothing is padded."""
        lengths = None if attend is None else attend[:, 0, 0].sum(-1)
        normal = normalise_over_time(x.float(), lengths, self.eps, with_channels=True)
        return (normal * self.weight + self.bias).to(x.dtype)


class Resample(nn.Module):
    """To `up` times the frame rate, then to one of `down`: a convolution each beside the repeated or kept frames.

    One of the two is 1: its convolution keeps the rate. Source: arXiv 2310.02720 section 3; fairseq's `ConvAdapter`,
    with the surplus frames of a transposed convolution cut before the norm.
    """

    def __init__(self, dim: int, kernel: int, up: int, down: int) -> None:
        super().__init__()
        self.up, self.down = up, down
        self.expand = nn.ConvTranspose1d(dim, dim, kernel, stride=up, output_padding=up - 1, bias=False)
        self.expand_norm = UtteranceNorm(dim)
        self.reduce = nn.Conv1d(dim, dim, kernel, stride=down, padding=kernel // 2, bias=False)
        self.reduce_norm = UtteranceNorm(dim)

    def forward(self, x: Tensor, frames: int, attend: Tensor | None) -> Tensor:
        """Map `(B, T / up, D)` to `(B, T / down, D)`, quotients rounded up.

        frames: T, at the higher of both rates. attend: `(B, 1, 1, T)`, see `UtteranceNorm`.
        """
        before, after = (None if attend is None else attend[..., ::step] for step in (self.up, self.down))
        repeated = x.repeat_interleave(self.up, 1)[:, :frames]
        expanded = self.expand(without_padding(x, before).transpose(1, 2)).transpose(1, 2)[:, :frames]
        x = SCALE * (functional.gelu(self.expand_norm(expanded, attend)) + repeated)
        reduced = self.reduce(without_padding(x, attend).transpose(1, 2)).transpose(1, 2)
        x = SCALE * (functional.gelu(self.reduce_norm(reduced, after)) + x[:, :: self.down])
        return SCALE * (x + repeated[:, :: self.down])

    def flops(self, frames: int) -> float:
        """Return the forward operations for T `frames` at the higher rate."""
        weights = self.expand.in_channels**2 * self.expand.kernel_size[0]  # their tensors are in pieces under ZeRO 3
        return 2.0 * weights * (-(-frames // self.up) + -(-frames // self.down))
