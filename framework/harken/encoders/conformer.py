"""The Conformer encoder: self-attention and convolution between two half feed-forwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError
from harken.encoders.stack import Stack, StackConfig
from harken.nn.attention import SelfAttention
from harken.nn.convolution import DepthwiseConvolution
from harken.nn.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class ConformerConfig(StackConfig):
    """Defaults are Conformer M's (arXiv 2005.08100 table 1 and section 3.2), with the positions of wav2vec 2.0."""

    dim: int = 256
    """Width of a representation. The paper's encoder dim: 144 in S, 256 in M, 512 in L."""
    layers: int = 16
    """Blocks. The paper's encoder layers: 16 in S and M, 17 in L."""
    heads: int = 4
    """Attention heads of a block; they divide `dim`. The paper has 4 in S and M, 8 in L."""
    ffn_dim: int = 1024
    """Inner width of each of the two half feed-forwards; the paper's expansion factor is 4."""
    layer_drop: float = 0.0
    """Chance of a block to be passed over in a training step; the paper drops none."""
    kernel: int = 31
    """Frames of the depthwise convolution, odd. The paper found 32 best, and padding is even only for an odd one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "encoder", positive=("kernel",))
        if self.kernel % 2 == 0:
            raise HarkenError(f"`encoder.kernel` must be odd, got {self.kernel}")


class FeedForward(nn.Module):
    """Norm, expansion, swish, contraction. Source: arXiv 2005.08100 section 2.3."""

    def __init__(self, config: StackConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.activation_dropout = Dropout(config.activation_dropout)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, D)` to the branch `(B, T, D)`."""
        y: Tensor = self.dropout(self.down(self.activation_dropout(functional.silu(self.up(self.norm(x))))))
        return y


def without_padding(x: Tensor, attend: Tensor | None) -> Tensor:
    """Return `(B, T, D)` with zeros in padded frames, of which a convolution then carries nothing to real ones."""
    return x if attend is None else x.masked_fill(~attend[:, 0, 0, :, None], 0.0)


class Convolution(nn.Module):
    """Norm, gated linear unit, depthwise convolution over time, norm, swish, linear.

    Source: arXiv 2005.08100 section 2.2, with layer norm in the place of batch norm, so that an utterance's output does
    not depend on its batch or its padding.
    """

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.dim)
        self.gate = nn.Linear(config.dim, 2 * config.dim)
        self.depthwise = DepthwiseConvolution(config.dim, config.kernel)
        self.inner_norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """Map `(B, T, D)` to the branch `(B, T, D)`; padded frames do not reach real ones."""
        y = without_padding(functional.glu(self.gate(self.norm(x)), dim=-1), attend)
        branch: Tensor = self.dropout(self.out(functional.silu(self.inner_norm(self.depthwise(y)))))
        return branch


class Block(nn.Module):
    """Half feed-forward, self-attention, convolution, half feed-forward, norm. Source: arXiv 2005.08100 equation 1."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.before = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.heads, config.attention_dropout)
        self.dropout = Dropout(config.dropout)
        self.convolution = Convolution(config)
        self.after = FeedForward(config)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `attend` as in `SelfAttention`."""
        x = torch.add(x, self.before(x), alpha=0.5)
        x = x + self.dropout(self.attention(self.attention_norm(x), attend))
        x = x + self.convolution(x, attend)
        y: Tensor = self.norm(torch.add(x, self.after(x), alpha=0.5))
        return y


@register("encoder", ConformerConfig)
class Conformer(Stack):
    """A stack of Conformer blocks; see `Stack`. Positions come from its convolution, not from relative encodings."""

    def __init__(self, config: ConformerConfig, input_dim: int) -> None:
        super().__init__(config, input_dim, lambda: Block(config), norm_last=False)
        self.config = config

    def feed_forwards(self) -> Sequence[nn.Module]:
        """Return the contractions of the second feed-forwards; see `Encoder`."""
        return [cast(Block, block).after.down for block in self.blocks]

    def block_flops(self, frames: int) -> float:
        """Count the products of a block, of its attention and of its convolution."""
        own = self.config
        weights = (4 + 3) * own.dim**2 + 4 * own.dim * own.ffn_dim + own.dim * own.kernel
        return 2.0 * frames * (weights + 2 * frames * own.dim)
