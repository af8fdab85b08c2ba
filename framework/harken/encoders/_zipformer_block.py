"""One block of the Zipformer and the modules that no other encoder has. Source: arXiv 2310.11230 section 3.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from harken.nn.bias_norm import BiasNorm
from harken.nn.chunks import ChunkConvolution, Past
from harken.nn.convolution import DepthwiseConvolution
from harken.nn.limits import Regime, limit_parameter
from harken.nn.relative_attention import AttentionWeights, NonlinearAttention, Values
from harken.nn.scheduled import Scheduled, drop_over_time, happens, keep_rows
from harken.nn.swoosh import SWOOSH_L, SWOOSH_R, SwooshLinear


@dataclass(frozen=True)
class BlockConfig:
    """Sizes of a block, one stack's entries of the encoder's configuration."""

    dim: int
    ffn_dim: int
    heads: int
    kernel: int
    query_dim: int
    value_dim: int
    position_head_dim: int
    position_dim: int
    causal: bool
    constant_attention: bool

    def flops(self, frames: int) -> float:
        """Count the products of a block over `frames` of its rate, a multiply-add as two."""
        heads, dim, hidden = self.heads, self.dim, 3 * self.dim // 4
        scores = heads * (2 * self.query_dim + self.position_head_dim)
        kernels = self.kernel + (self.kernel + 1) // 2 if self.causal else self.kernel
        weights = dim * scores + 4 * dim * heads * self.value_dim + 4 * dim * hidden
        weights += sum(2 * dim * inner for inner in feed_forward_dims(self.ffn_dim)) + 2 * (3 * dim**2 + dim * kernels)
        positions = (2 * frames - 1) * heads * self.position_head_dim
        attention = frames * heads * (self.query_dim + 2 * self.value_dim) + frames * hidden
        return 2.0 * (frames * (weights + attention + positions) + positions * self.position_dim)


def feed_forward_dims(ffn_dim: int) -> tuple[int, int, int]:
    """Return the inner widths of a block's three feed-forwards. Source: arXiv 2310.11230 section 3.2."""
    return ffn_dim * 3 // 4, ffn_dim, ffn_dim * 5 // 4


class View(NamedTuple):
    """What the frames of a stack see, at its rate.

    blocked: bool, broadcasts to `(B, H, T, K)`, True where a key is not attended to. padded: `(B, T)` bool. lengths:
    `(B,)` on the device. All None where nothing is padded (or hidden by chunks). chunk: frames of one, 0 for the whole.
    """

    blocked: Tensor | None = None
    padded: Tensor | None = None
    lengths: Tensor | None = None
    chunk: int = 0


class FeedForward(nn.Module):
    """Linear, SwooshL, dropout over whole channels of a sequence, linear."""

    def __init__(self, dim: int, inner: int, regime: Regime, dropout: Scheduled) -> None:
        super().__init__()
        self.up = nn.Linear(dim, inner)
        self.down = SwooshLinear(inner, dim, SWOOSH_L, 0.1)
        self.dropout = dropout
        self.balance = regime.balancer(min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.whiten = regime.whitener(7.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, D)` to the branch `(B, T, D)`."""
        y = self.balance(self.up(x))
        mask = drop_over_time(y, self.dropout) if self.training else None
        branch: Tensor = self.whiten(self.down(y, mask))
        return branch


class Convolution(nn.Module):
    """Gated linear unit, depthwise convolution over time, SwooshR, linear."""

    def __init__(self, config: BlockConfig, regime: Regime) -> None:
        super().__init__()
        dim = config.dim
        self.gate = nn.Linear(dim, 2 * dim)
        self.depthwise: ChunkConvolution | DepthwiseConvolution = (
            ChunkConvolution(dim, config.kernel)
            if config.causal
            else DepthwiseConvolution(dim, config.kernel, bias=True)
        )
        self.out = SwooshLinear(dim, dim, SWOOSH_R, 0.05)
        self.balance_gate = regime.balancer(
            min_positive=regime.schedule((0.0, 0.05), (8000.0, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=regime.schedule((0.0, 5.0), (8000.0, 10.0)),
        )
        self.balance = regime.balancer(
            min_positive=regime.schedule((0.0, 0.1), (8000.0, 0.05)),
            max_positive=1.0,
            min_abs=regime.schedule((0.0, 0.2), (20000.0, 0.5)),
            max_abs=10.0,
        )
        self.whiten = regime.whitener(7.5)

    def forward(self, x: Tensor, view: View, past: Past | None, name: str) -> Tensor:
        """Map `(B, T, D)` to the branch `(B, T, D)`; padded frames do not reach real ones."""
        y, gate = self.gate(x).chunk(2, -1)
        y = y * torch.sigmoid(self.balance_gate(gate))
        if view.padded is not None:
            y = y.masked_fill(view.padded[..., None], 0.0)
        if isinstance(self.depthwise, ChunkConvolution):
            y = self.depthwise(y, view.chunk, view.lengths, past, name)
        else:
            y = self.depthwise(y)
        branch: Tensor = self.out(self.whiten(self.balance(y)))
        return branch


class Bypass(nn.Module):
    """A learned mixture, by channel, of a module's input and its output.

    In training the share of the output is kept above 0.9 at first and above 0.2 in the end, so that all modules learn.
    """

    def __init__(self, dim: int, regime: Regime) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((dim,), 0.5))
        self.limits = regime.limits
        self.low = regime.schedule((0.0, 0.9), (20000.0, 0.2))

    def forward(self, before: Tensor, after: Tensor, keep: Tensor | None = None) -> Tensor:
        """Mix `(B, T, D)` and `(B, T, D)`. keep: `(B, 1, 1)`, 0 where a sequence passes the module over."""
        scale: Tensor = self.scale
        if self.training and self.limits:
            scale = limit_parameter(scale, self.low(), 1.0)
        scale = scale.to(after.dtype)
        return before + (after - before) * (scale if keep is None else scale * keep)


class Skips:
    """How often a sequence passes parts of a block over in training, by step. Source: icefall's `zipformer.py`."""

    def __init__(self, regime: Regime, layer: tuple[tuple[float, float], ...]) -> None:
        self.attention = regime.schedule((0.0, 0.2), (4000.0, 0.05), (16000.0, 0.0))
        self.convolution = regime.schedule((0.0, 0.2), (4000.0, 0.05), (16000.0, 0.0))
        self.feed_forward = regime.schedule((0.0, 0.1), (4000.0, 0.01), (50000.0, 0.0))
        self.layer = regime.schedule(*layer)


class Block(nn.Module):
    """Attention weights, then twice what uses them and a convolution, with feed-forwards and a bypass between.

    layer_skip: points of the schedule by which sequences pass the whole block over.
    Source: arXiv 2310.11230 figure 2; numbers from icefall's `zipformer.py`.
    """

    def __init__(
        self, config: BlockConfig, regime: Regime, dropout: Scheduled, layer_skip: tuple[tuple[float, float], ...]
    ) -> None:
        super().__init__()
        dim, heads = config.dim, config.heads
        self.weights = AttentionWeights(
            dim, heads, config.query_dim, config.position_head_dim, config.position_dim, regime
        )
        self.nonlinear = NonlinearAttention(dim, regime)
        self.attention1, self.attention2 = (Values(dim, heads, config.value_dim, regime) for _ in range(2))
        self.convolution1, self.convolution2 = (Convolution(config, regime) for _ in range(2))
        self.feed_forward1, self.feed_forward2, self.feed_forward3 = (
            FeedForward(dim, inner, regime, dropout) for inner in feed_forward_dims(config.ffn_dim)
        )
        self.bypass_middle, self.bypass = Bypass(dim, regime), Bypass(dim, regime)
        self.norm = BiasNorm(dim, limit=regime.limits)
        self.skips = Skips(regime, layer_skip) if regime.skips else None
        self.constant = config.constant_attention
        self.constant_share = regime.schedule((0.0, 0.25), (4000.0, 0.025))

        def balancer(low: float, end: float, high: float) -> nn.Module:
            bound = regime.schedule((0.0, low), (4000.0, end))
            return regime.balancer(min_positive=0.3, max_positive=0.7, min_abs=bound, max_abs=high, share=0.05)

        self.balance_nonlinear = balancer(0.004, 0.02, 100.0)
        self.balance_feed_forward2 = balancer(0.0, 0.1, 2.0)
        self.balance_feed_forward3 = balancer(0.0, 0.2, 4.0)
        self.balance_before, self.balance_after = (
            regime.balancer(min_positive=0.45, max_positive=0.55, min_abs=low, max_abs=4.0) for low in (0.2, 0.1)
        )
        self.whiten = regime.whitener(4.0, 12.0)

    def forward(
        self, x: Tensor, positions: Tensor, view: View, past: Past | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Map `(B, T, D)` to `(B, T, D)`, and the penalty of its attention scores in training.

        positions: `(K + T - 1, P)`. past: what a stream keeps of this block.
        """
        start = x
        skips = self.skips if self.training else None
        weights, penalty = self.weights(x, positions, view.blocked, past)
        x = x + self.feed_forward1(x)
        attention_rows = keep_rows(x, skips.attention) if skips else None
        mixed = self.nonlinear(x, self._head_for_nonlinear(weights), past)
        x = _add(x, self.balance_nonlinear(mixed), attention_rows)
        x = _add(x, self.attention1(x, weights, past, "values1"), attention_rows)
        rows = keep_rows(x, skips.convolution) if skips else None
        x = _add(x, self.convolution1(x, view, past, "convolution1"), rows)
        rows = keep_rows(x, skips.feed_forward) if skips else None
        x = _add(x, self.balance_feed_forward2(self.feed_forward2(x)), rows)
        x = self.bypass_middle(start, x)
        x = _add(x, self.attention2(x, weights, past, "values2"), attention_rows)
        rows = keep_rows(x, skips.convolution) if skips else None
        x = _add(x, self.convolution2(x, view, past, "convolution2"), rows)
        rows = keep_rows(x, skips.feed_forward) if skips else None
        x = _add(x, self.balance_feed_forward3(self.feed_forward3(x)), rows)
        x = self.norm(self.balance_before(x))
        x = self.bypass(start, x, keep_rows(x, skips.layer) if skips else None)
        return self.whiten(self.balance_after(x)), penalty

    def _head_for_nonlinear(self, weights: Tensor) -> Tensor:
        """Return the first head's weights `(B, 1, T, K)`, or now and then in training equal ones for all keys seen."""
        head = weights[:, :1]
        if not (self.training and self.constant and self.skips):
            return head
        constant = happens(self.constant_share())
        if constant is False:
            return head
        seen = (head > 0).to(head.dtype)
        equal = seen / seen.sum(-1, keepdim=True)
        return torch.where(constant, equal, head) if isinstance(constant, Tensor) else equal


def _add(x: Tensor, branch: Tensor, rows: Tensor | None) -> Tensor:
    """Add a branch, but for the sequences that pass it over."""
    return x + branch if rows is None else x + branch * rows
