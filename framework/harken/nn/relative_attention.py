"""Attention whose weights several modules share, with compact relative positions.

Source: arXiv 2310.11230 section 3.2, and icefall's `zipformer.py` for the positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from harken.nn.chunks import Past, joined
from harken.nn.limits import Regime
from harken.nn.scheduled import happens
from harken.nn.swoosh import scale_start

_BLOCKED = -1000.0  # far enough that a weight is exactly 0, near enough that a row of nothing else has no NaN
_SCORE_LIMIT, _SCORE_PENALTY, _PENALTY_SHARE = 25.0, 1e-4, 0.1


def relative_positions(frames: int, left: int, dim: int, device: torch.device) -> Tensor:
    """Return vectors `(left + 2 frames - 1, dim)` of the offsets key - query, from -(left + frames - 1) to frames - 1.

    An offset is compressed by a logarithm and an arctangent, so that near ones are told apart and far ones hardly;
    cosines and sines of its multiples follow, and the last channel is 1. Source: icefall's
    `CompactRelPositionalEncoding`.
    """
    offset = torch.arange(1 - left - frames, frames, device=device, dtype=torch.float32)[:, None]
    resolution = dim**0.5
    compressed = resolution * offset.sign() * ((offset.abs() + resolution).log() - math.log(resolution))
    angle = (compressed / (dim / (2.0 * math.pi))).atan()
    multiples = angle * torch.arange(1, dim // 2 + 1, device=device)
    table = torch.stack([multiples.cos(), multiples.sin()], -1).flatten(1)
    return torch.cat([table[:, :-1], torch.ones_like(table[:, :1])], 1)


def by_key(scores: Tensor, keys: int) -> Tensor:
    """Turn scores by offset `(..., T, T + K - 1)` into scores by key `(..., T, K)`, as a view of the same numbers.

    Key j has offset number T - 1 - i + j for query i, so in memory a row begins one number before the last one ends.
    """
    queries = scores.shape[-2]
    if queries == 1:
        return scores
    row = queries + keys - 2
    flat: Tensor = scores.flatten(-2)[..., queries - 1 : queries - 1 + queries * row]
    rows: Tensor = flat.unflatten(-1, (queries, row))
    return rows[..., :keys]


class _Softmax(torch.autograd.Function):
    """Softmax that keeps its result in the precision in which it is used: under autocast half of what torch keeps."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = torch.softmax(scores, -1).to(scores.dtype)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        product = grads[0].float() * weights.float()
        grad: Tensor = (product - weights.float() * product.sum(-1, keepdim=True)).to(weights.dtype)
        return grad


class _Excess(torch.autograd.Function):
    """Sum of what absolute values exceed a limit by; keeps one byte a value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        over = (x.abs() - limit).float()
        ctx.save_for_backward((x.sign() * (over > 0)).to(torch.int8))
        ctx.dtype = x.dtype
        return over.clamp(min=0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (sign,) = ctx.saved_tensors
        return (sign * grads[0]).to(ctx.dtype), None


class AttentionWeights(nn.Module):
    """Queries, keys and position queries to attention weights; their scale is in how the map starts."""

    def __init__(
        self, dim: int, heads: int, query_dim: int, position_head_dim: int, position_dim: int, regime: Regime
    ) -> None:
        super().__init__()
        self.heads = heads
        self.sizes = [heads * query_dim, heads * query_dim, heads * position_head_dim]
        self.project = nn.Linear(dim, sum(self.sizes))
        scale_start(self.project, query_dim**-0.25)
        self.positions = nn.Linear(position_dim, heads * position_head_dim, bias=False)
        scale_start(self.positions, 0.05)
        self.regime = regime
        self.position_skip = regime.schedule((0.0, 0.5), (4000.0, 0.0))
        self.balance_keys = regime.balancer(min_positive=0.4, max_positive=0.6, min_abs=0.0, share=0.025)
        self.whiten_keys = regime.whitener(3.0, groups=heads, strength=0.025)

    def forward(
        self, x: Tensor, positions: Tensor, blocked: Tensor | None, past: Past | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return weights `(B, H, T, K)` and, in training, a penalty on scores above 25 to add to a summed loss.

        x: `(B, T, D)`. positions: `(K + T - 1, P)`. blocked: bool, broadcasts to `(B, H, T, K)`, True where a key is
        not seen. past: what a stream keeps.
        """
        queries, keys, places = self.project(x).split(self.sizes, -1)
        keys = joined(past, "keys", self.whiten_keys(self.balance_keys(keys)))
        queries, keys, places = (part.unflatten(-1, (self.heads, -1)) for part in (queries, keys, places))
        scores = queries.transpose(1, 2) @ keys.permute(0, 2, 3, 1)
        scores = self._add_positions(scores, places, positions)
        penalty = self._penalty(scores) if self.training and self.regime.limits else None
        if blocked is not None:
            scores = scores.masked_fill(blocked, _BLOCKED)
        weights: Tensor = _Softmax.apply(scores)  # type: ignore[no-untyped-call]
        return weights, penalty

    def _add_positions(self, scores: Tensor, places: Tensor, positions: Tensor) -> Tensor:
        """Add scores by offset; in a share of the passes early in training, which it draws, zeros instead.

        They are computed in any case: ranks draw apart, and under ZeRO-3 all of them must run the same modules.
        """
        table = self.positions(positions).unflatten(-1, (self.heads, -1)).permute(1, 2, 0)
        by_offset = by_key(places.transpose(1, 2) @ table, scores.shape[-1])
        if self.training and self.regime.skips:
            by_offset = by_offset * (torch.rand(()) >= self.position_skip()).to(by_offset)
        return scores + by_offset

    def _penalty(self, scores: Tensor) -> Tensor:
        active = happens(_PENALTY_SHARE)
        if active is False:
            return scores.new_zeros((), dtype=torch.float32)
        excess: Tensor = _Excess.apply(scores, _SCORE_LIMIT)  # type: ignore[no-untyped-call]
        weight = active.to(excess) if isinstance(active, Tensor) else 1.0
        return _SCORE_PENALTY * weight * excess


class Values(nn.Module):
    """Values weighted by attention weights that were made elsewhere, and an output map."""

    def __init__(self, dim: int, heads: int, value_dim: int, regime: Regime) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(dim, heads * value_dim)
        self.out = nn.Linear(heads * value_dim, dim)
        scale_start(self.out, 0.05)
        self.whiten = regime.whitener(7.5, 3 * 7.5)

    def forward(self, x: Tensor, weights: Tensor, past: Past | None, name: str) -> Tensor:
        """Map `(B, T, D)` and weights `(B, H, T, K)` to `(B, T, D)`; see `ChunkConvolution` for past and name."""
        values = joined(past, name, self.project(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        branch: Tensor = self.whiten(self.out((weights @ values).transpose(1, 2).flatten(2)))
        return branch


class NonlinearAttention(nn.Module):
    """A gated unit whose middle is averaged over time with one head's attention weights, for a convolution's kernel.

    Source: arXiv 2310.11230 section 3.2 and figure 3 (right).
    """

    def __init__(self, dim: int, regime: Regime) -> None:
        super().__init__()
        hidden = 3 * dim // 4
        self.project = nn.Linear(dim, 3 * hidden)
        self.out = nn.Linear(hidden, dim)
        scale_start(self.out, 0.05)
        self.balance = regime.balancer(
            min_positive=regime.schedule((0.0, 0.25), (20000.0, 0.05)),
            max_positive=regime.schedule((0.0, 0.75), (20000.0, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.whiten_inner = regime.whitener(5.0)
        self.whiten = regime.whitener(5.0, 15.0)

    def forward(self, x: Tensor, weights: Tensor, past: Past | None) -> Tensor:
        """Map `(B, T, D)` and one head's weights `(B, 1, T, K)` to `(B, T, D)`."""
        gate, inner, outer = self.project(x).chunk(3, -1)
        inner = self.whiten_inner(inner) * torch.tanh(self.balance(gate))
        inner = weights[:, 0] @ joined(past, "nonlinear", inner)
        branch: Tensor = self.whiten(self.out(inner * outer))
        return branch
