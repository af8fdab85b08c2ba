"""Convolutions over time of what encoders keep, `(B, T, D)`.

That is channels last already once time is the width of an image of height 1: no copy is made, and on CPUs a depthwise
convolution takes half the time that it takes in one dimension (docs/LOG.md).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


def convolve_over_time(x: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, groups: int) -> Tensor:
    """Convolve `(B, T, C)` over time with a kernel `(C', C / groups, K)`; return `(B, T', C')`."""
    image = x.transpose(1, 2)[:, :, None]
    y = functional.conv2d(image, weight[:, :, None], bias, padding=(0, padding), groups=groups)
    return y[:, :, 0].transpose(1, 2)


class GroupedConvolution(nn.Conv1d):
    """A kernel over time for each of `groups` groups of channels, as many frames out as in.

    A kernel of even size sees one frame more of the past than of what is to come.
    """

    def __init__(self, channels: int, kernel: int, groups: int, *, bias: bool = True) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2, groups=groups, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`."""
        y = convolve_over_time(x, self.weight, self.bias, padding=self.kernel_size[0] // 2, groups=self.groups)
        return y[:, : x.shape[1]]  # an even kernel padded on both sides gives one frame too many


class DepthwiseConvolution(GroupedConvolution):
    """One kernel of odd size for each channel."""

    def __init__(self, channels: int, kernel: int, *, bias: bool = False) -> None:
        super().__init__(channels, kernel, channels, bias=bias)
