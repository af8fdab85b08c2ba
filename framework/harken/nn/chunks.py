"""Chunks of frames: what a stream keeps of its past, and a convolution that sees the chunk and what was before it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.nn.convolution import DepthwiseConvolution, convolve_over_time


class Past:
    """What the modules of one block keep of earlier chunks, by name, `(B, T, ...)` each.

    left: frames that attention looks back, None for all. kept: what the last chunk left behind; `next` is filled with
    what the next one needs.
    """

    def __init__(self, kept: dict[str, Tensor], left: int | None) -> None:
        self.kept = kept
        self.left = left
        self.next: dict[str, Tensor] = {}

    def join(self, name: str, x: Tensor, frames: int | None = None) -> Tensor:
        """Return the chunk `x` `(B, T, D)` behind what is kept, and keep the last `frames` (`left` if not given)."""
        joined = torch.cat([self.kept[name], x], 1) if name in self.kept else x
        frames = self.left if frames is None else frames
        self.next[name] = joined if frames is None else joined[:, max(0, joined.shape[1] - frames) :]
        return joined


def joined(past: Past | None, name: str, x: Tensor) -> Tensor:
    """Return `x` behind the past, or alone where there is none."""
    return x if past is None else past.join(name, x)


class ChunkConvolution(nn.Module):
    """A causal convolution plus one within the chunk, whose output is scaled by its place from the chunk's edges.

    Source: arXiv 2310.11230 section 4 ("streaming") and icefall's `ChunkCausalDepthwiseConv1d`. There a sequence that
    is shorter than a chunk is a chunk of its own length; here it is the beginning of a whole one, as it is in a stream.
    """

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.kernel = kernel
        self.causal = nn.Conv1d(channels, channels, (kernel + 1) // 2, groups=channels)
        self.within = DepthwiseConvolution(channels, kernel, bias=True)
        self.edges = nn.Parameter(torch.zeros(2, channels, kernel))  # from the left edge, and up to the right one
        nn.init.uniform_(self.causal.bias, -0.1, 0.1) if self.causal.bias is not None else None

    def forward(self, x: Tensor, chunk: int, lengths: Tensor | None, past: Past | None, name: str) -> Tensor:
        """Map `(B, T, C)` to `(B, T, C)`.

        chunk: frames of one, 0 when the sequence is one; then lengths `(B,)`, on the device, say where each ends (None:
        nothing is padded). past: what a stream keeps; `x` is then its next chunk. name: of this module in `past`.
        """
        left = self.kernel // 2
        before = x if past is None else past.join(name, x, left)
        before = functional.pad(before, (0, 0, left + x.shape[1] - before.shape[1], 0))
        causal = convolve_over_time(before, self.causal.weight, self.causal.bias, padding=0, groups=x.shape[2])
        size = chunk or x.shape[1]
        chunks = functional.pad(x, (0, 0, 0, -x.shape[1] % size))
        within: Tensor = self.within(chunks.reshape(-1, size, x.shape[2]))
        if chunk == 0 and lengths is not None:
            return causal + within * self._scale(size, lengths[:, None])
        scale = self._scale(size, torch.full((1,), size, device=x.device))
        return causal + (within * scale).reshape(chunks.shape)[:, : x.shape[1]]

    def _scale(self, size: int, ends: Tensor) -> Tensor:
        """Return scales `(..., size, C)` for chunks that end at `ends` `(..., 1)`."""
        table = functional.pad(self.edges, (0, 1)).transpose(1, 2)  # further from the edge than the kernel: nothing
        place = torch.arange(size, device=ends.device)
        from_end = place - ends + self.kernel
        outside = (from_end < 0) | (from_end >= self.kernel)
        return 1 + table[0][place.clamp(max=self.kernel)] + table[1][from_end.masked_fill(outside, self.kernel)]
