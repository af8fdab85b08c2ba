"""How many frames a number of samples gives: exact integer arithmetic, shared by frontends, labels and checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One strided window: a convolution without padding, or a framing of samples.

    Kernel and stride are in its input's units.
    """

    kernel: int
    stride: int


@dataclass(frozen=True)
class FrameSpec:
    """The chain of windows between input samples and output frames.

    stride, receptive_field: in input samples. rate: frames a second at `sample_rate`.
    A frame exists only where its whole receptive field lies inside the input: `num_frames` is exact for every chain of
    windows without padding, and frontends are built to satisfy it.
    """

    windows: tuple[Window, ...]
    sample_rate: int

    @property
    def stride(self) -> int:
        """Samples between the starts of two neighbouring frames."""
        product = 1
        for window in self.windows:
            product *= window.stride
        return product

    @property
    def receptive_field(self) -> int:
        """Samples that one frame sees."""
        field, jump = 1, 1
        for window in self.windows:
            field += (window.kernel - 1) * jump
            jump *= window.stride
        return field

    @property
    def rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.stride

    def middle(self, window: Window) -> tuple[int, int]:
        """Return which windows of a finer framing of the input lie in the middle of a frame: first and how many.

        Frame t has windows `first + many * t` to `first + many * (t + 1) - 1`: as many as pass from one frame to the
        next, so that neighbouring frames share none and leave none out.
        """
        many = max(1, self.stride // window.stride)
        covered = (self.receptive_field - window.kernel) // window.stride + 1
        return max(0, -((many - covered) // 2)), many

    @overload
    def num_frames(self, lengths: int) -> int: ...

    @overload
    def num_frames(self, lengths: Tensor) -> Tensor: ...

    def num_frames(self, lengths: int | Tensor) -> int | Tensor:
        """Return the number of frames for a number of samples, 0 where the input is below the receptive field."""
        for window in self.windows:
            lengths = (lengths - window.kernel) // window.stride + 1
            lengths = lengths.clamp(min=0) if isinstance(lengths, Tensor) else max(lengths, 0)
        return lengths
