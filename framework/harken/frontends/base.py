"""What every frontend promises."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.core.frames import FrameSpec, Window
from harken.nn.noise import normal_of


@dataclass(frozen=True)
class InputNoise:
    """Normal noise in the place of what masked frames see: masking before the frontend.

    mask: `(B, T)` bool over the frontend's frames. keys: `(B,)` int64, from which the noise of each row follows.
    deviation: of the noise.
    """

    mask: Tensor
    keys: Tensor
    deviation: float

    def replace(self, x: Tensor, spec: FrameSpec, window: Window, scale: Tensor | float = 1.0) -> Tensor:
        """Return `x` `(B, M, C)` with noise in the middle of masked frames.

        spec: of the frames. window: of which input each of the M steps of `x` is made. scale: factor on the deviation.
        """
        first, many = spec.middle(window)
        steps = functional.pad(self.mask.repeat_interleave(many, 1), (first, max(0, x.shape[1])))[:, : x.shape[1]]
        # row by row in time, so that padding at the end does not change the noise of what is before it
        noise = normal_of(self.keys, x[0].numel()).view_as(x)
        return torch.where(steps[..., None], (self.deviation * scale * noise).to(x.dtype), x)


class Frontend(nn.Module):
    """Maps inputs to frames.

    spec: exact number of frames for any number of samples. dim: width of a frame.
    bands: number of frequency bands that `band_mask` covers, None where the frontend has no such axis.
    """

    spec: FrameSpec
    dim: int
    bands: int | None = None

    def forward(
        self, inputs: Tensor, lengths: Tensor, band_mask: Tensor | None = None, noise: InputNoise | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return frames `(B, T, dim)` and their lengths `(B,)`.

        inputs: `(B, S)` samples. lengths: `(B,)` on the CPU. band_mask: `(B, bands)`, True where a band is blanked.
        noise: what replaces the input of masked frames, before anything that is learned.
        """
        raise NotImplementedError

    def flops(self, samples: int) -> float:
        """Return the floating-point operations of one forward pass over `samples`, a multiply-add counted as two."""
        raise NotImplementedError
