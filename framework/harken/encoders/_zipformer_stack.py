"""A stack of Zipformer blocks at a rate of its own, between downsampling and upsampling."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harken.encoders._zipformer_block import Block, BlockConfig, Bypass, View
from harken.nn.chunks import Past
from harken.nn.limits import Regime
from harken.nn.relative_attention import relative_positions
from harken.nn.scheduled import Scheduled


class Downsample(nn.Module):
    """A learned weighted mean of each group of frames. Source: arXiv 2310.11230 section 3.1."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.logits = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, last: Tensor | None) -> Tensor:
        """Map `(B, T, C)` to `(B, ceil(T / factor), C)`.

        The last group is filled with the last frame. last: `(B,)`, the place of each sequence's last real frame: what
        is behind it counts as that frame, so that padding changes nothing; None where nothing is padded.
        """
        time = x.shape[1]
        size = -(-time // self.factor) * self.factor
        if last is not None:
            place = torch.minimum(torch.arange(size, device=x.device)[None], last[:, None])
            x = x.gather(1, place[..., None].expand(-1, -1, x.shape[2]))
        elif size > time:
            x = torch.cat([x, x[:, -1:].expand(-1, size - time, -1)], 1)
        weights = self.logits.softmax(0).to(x.dtype)
        groups: Tensor = x.unflatten(1, (-1, self.factor))
        return (groups * weights[:, None]).sum(2)


def upsample(x: Tensor, factor: int, frames: int) -> Tensor:
    """Repeat each frame of `(B, T, C)` and return the first `frames`. Source: arXiv 2310.11230 section 3.1."""
    return x[:, :, None].expand(-1, -1, factor, -1).flatten(1, 2)[:, :frames]


class ZipformerStack(nn.Module):
    """Blocks at a share of the frame rate, whose result is mixed with the stack's input by a bypass."""

    def __init__(
        self,
        config: BlockConfig,
        factor: int,
        layer_skips: Sequence[tuple[tuple[float, float], ...]],
        position_dropout: float,
        regime: Regime,
        dropout: Scheduled,
    ) -> None:
        super().__init__()
        self.config = config
        self.factor = factor
        self.position_dropout = position_dropout
        self.downsample = Downsample(factor) if factor > 1 else None
        self.blocks = nn.ModuleList(Block(config, regime, dropout, points) for points in layer_skips)
        self.combine = Bypass(config.dim, regime) if factor > 1 else None

    def forward(
        self,
        x: Tensor,
        view: View,
        last: Tensor | None,
        channel_mask: Tensor | None,
        wanted: Collection[int] = (),
        *,
        recompute: bool = False,
    ) -> tuple[Tensor, dict[int, Tensor], Tensor | None]:
        """Return the result `(B, T, D)`, the results of `wanted` blocks (from 1) at the full rate, and the penalty.

        x: `(B, T, D)`. view: at the stack's rate. last: see `Downsample`. channel_mask: `(B, 1, D)` of 0 and 1, applied
        before each block and behind the last. recompute: in the backward pass, instead of keeping activations.
        """
        start = x
        x = self._down(x, last, channel_mask)
        positions = self._positions(x.shape[1], 0, x)
        hidden, penalties = dict[int, Tensor](), list[Tensor]()
        for number, block in enumerate(self.blocks, start=1):
            if recompute:
                x, penalty = cast(
                    tuple[Tensor, Tensor | None], checkpoint(block, x, positions, view, use_reentrant=False)
                )
            else:
                x, penalty = block(x, positions, view)
            if penalty is not None:
                penalties.append(penalty)
            if channel_mask is not None:
                x = x * channel_mask
            if number in wanted:
                hidden[number] = self._up(start, x)
        return self._up(start, x), hidden, torch.stack(penalties).sum() if penalties else None

    def stream(self, x: Tensor, view: View, pasts: Sequence[Past]) -> Tensor:
        """Map the next chunk `(B, T, D)` to `(B, T, D)`. pasts: one for each block, which this fills."""
        start = x
        x = self._down(x, None, None)
        kept = pasts[0].kept.get("keys")
        positions = self._positions(x.shape[1], 0 if kept is None else kept.shape[1], x)
        for block, past in zip(self.blocks, pasts, strict=True):
            x, _ = block(x, positions, view, past)
        return self._up(start, x)

    def _positions(self, frames: int, left: int, x: Tensor) -> Tensor:
        table = relative_positions(frames, left, self.config.position_dim, x.device)
        return functional.dropout(table, self.position_dropout, self.training).to(x.dtype)

    def _down(self, x: Tensor, last: Tensor | None, channel_mask: Tensor | None) -> Tensor:
        if self.downsample is not None:
            x = self.downsample(x, last)
        return x if channel_mask is None else x * channel_mask

    def _up(self, start: Tensor, x: Tensor) -> Tensor:
        if self.combine is None:
            return x
        mixed: Tensor = self.combine(start, upsample(x, self.factor, start.shape[1]))
        return mixed
