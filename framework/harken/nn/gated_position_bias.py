"""WavLM's gated relative position bias.

Source: arXiv 2110.13900, "gated relative position bias"; buckets: T5, arXiv 1910.10683. Names and details follow
Microsoft's released `modules.py`, so that its checkpoints load.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from harken.nn.attention import SelfAttention

GATE_PARTS = 8
"""Outputs of a gate's linear map; each of its two gates is the sum of four, as released. The sum could be one output,
but it learns four times as fast."""


def position_buckets(offsets: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Return the bucket of each offset, key position minus query position, as int64 of the same shape.

    The first half of the buckets is for keys at or before the query, the second for those behind it. Half of each half
    holds one distance a bucket, the other grows logarithmically up to `max_distance`, where the last bucket begins.
    """
    half = buckets // 2
    exact = half // 2
    distance = offsets.abs()
    # float32 in this order of operations, as at the edges of buckets rounding decides
    grown = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    far = (exact + grown.long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, far) + half * (offsets > 0).long()


class PositionBias(nn.Module):
    """A learned bias for each head and bucket of relative positions."""

    def __init__(self, heads: int, buckets: int, max_distance: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.max_distance = max_distance
        self.table = nn.Parameter(torch.randn(buckets, heads) * 0.02)  # as BERT's embeddings start

    def forward(self, frames: int) -> Tensor:
        """Return `(H, T, T)`: head, query, key. One look-up an offset, 2 T - 1 of them, not one a pair."""
        offsets = torch.arange(1 - frames, frames, device=self.table.device)
        by_offset = self.table[position_buckets(offsets, self.buckets, self.max_distance)].T
        # the window of T offsets that begins at 1 - T is the last query's, the one that begins at 0 the first's
        return by_offset.unfold(1, frames, 1).flip(1)

    def at(self, places: Tensor) -> Tensor:
        """Return `(B, H, V, V)` of some tokens alone, whose places in their sequences are `(B, V)`."""
        far = self.max_distance  # all offsets from here on share a bucket: each distinct one is looked up once
        offsets = torch.arange(-far, far + 1, device=self.table.device)
        by_offset = self.table[position_buckets(offsets, self.buckets, far)]
        between = (places[:, None, :] - places[:, :, None]).clamp(-far, far) + far
        return by_offset[between].permute(0, 3, 1, 2)


class GatedAttention(SelfAttention):
    """Self-attention whose scores get a bias times a gate that each frame and head computes.

    on_query: from the query, as in the paper and in BEATs, and not from the layer's input, as in WavLM as released.
    """

    on_query: bool = False

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__(dim, heads, dropout)
        self.gate = nn.Linear(dim // heads, GATE_PARTS)
        self.gate_scale = nn.Parameter(torch.ones(heads))

    def forward(self, x: Tensor, attend: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Attend within each sequence `(B, T, D)`; `attend` as in `SelfAttention`, `bias` `(H, T, T)`, or of each."""
        if bias is None:
            return super().forward(x, attend)
        q, k, v = self.project(x)
        scores = self.gates(q.transpose(1, 2).flatten(2) if self.on_query else x) * bias
        if attend is not None:
            scores = scores.masked_fill(~attend, -torch.inf)
        return self.combine(q, k, v, scores)

    def gates(self, x: Tensor) -> Tensor:
        """Return `(B, H, T, 1)` in 1..2 + `gate_scale` for what they are computed from, `(B, T, D)`.

        With u and r the sigmoids of the two sums and s the scale, the gate is u (r s - 1) + 2 = 1 + (1 - u) + u r s. As
        released, where the paper has 1 - u for u.
        """
        parts: Tensor = self.gate(x.unflatten(-1, (self.heads, -1)))
        update, reset = parts.unflatten(-1, (2, GATE_PARTS // 2)).sum(-1).sigmoid().unbind(-1)
        gate: Tensor = update * (reset * self.gate_scale - 1.0) + 2.0
        return gate.transpose(1, 2)[..., None]
