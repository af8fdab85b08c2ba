"""What every frontend promises."""

from __future__ import annotations

from torch import Tensor, nn

from harken.core.frames import FrameSpec


class Frontend(nn.Module):
    """Maps inputs to frames.

    spec: exact number of frames for any number of samples. dim: width of a frame.
    bands: number of frequency bands that `band_mask` covers, None where the frontend has no such axis.
    """

    spec: FrameSpec
    dim: int
    bands: int | None = None

    def forward(self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return frames `(B, T, dim)` and their lengths `(B,)`.

        inputs: `(B, S)` samples. lengths: `(B,)` on the CPU. band_mask: `(B, bands)`, True where a band is blanked.
        """
        raise NotImplementedError

    def flops(self, samples: int) -> float:
        """Return the floating-point operations of one forward pass over `samples`, a multiply-add counted as two."""
        raise NotImplementedError
