"""The E-Branchformer encoder: self-attention beside a gated convolution, merged, between two half feed-forwards."""

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
from harken.encoders.conformer import FeedForward, without_padding
from harken.encoders.stack import Stack, StackConfig
from harken.nn.attention import SelfAttention
from harken.nn.convolution import DepthwiseConvolution
from harken.nn.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class EBranchformerConfig(StackConfig):
    """Defaults are those of a LibriSpeech recipe of ESPnet, of 38 million parameters with its decoder
    (`train_asr_e_branchformer_size256_mlp1024_linear1024_e12_mactrue`), with the positions of wav2vec 2.0.
    """

    dim: int = 256
    """Width of a representation. ESPnet `output_size`."""
    layers: int = 12
    """Blocks. ESPnet `num_blocks`."""
    heads: int = 4
    """Attention heads of a block; they divide `dim`. ESPnet `attention_heads`."""
    ffn_dim: int = 1024
    """Inner width of each of the two half feed-forwards. ESPnet `linear_units`."""
    layer_drop: float = 0.0
    """Chance of a block to be passed over in a training step. ESPnet `layer_drop_rate`."""
    gate_dim: int = 1024
    """Inner width of the local branch; half of it gates the other half. ESPnet `cgmlp_linear_units`."""
    kernel: int = 31
    """Frames of the gate's depthwise convolution, odd. ESPnet `cgmlp_conv_kernel`."""
    merge_kernel: int = 31
    """Frames of the depthwise convolution over both branches, odd. ESPnet `merge_conv_kernel`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "encoder", positive=("gate_dim", "kernel", "merge_kernel"))
        if self.gate_dim % 2:
            raise HarkenError(f"`encoder.gate_dim` must be even, got {self.gate_dim}")
        for name, size in (("kernel", self.kernel), ("merge_kernel", self.merge_kernel)):
            if size % 2 == 0:
                raise HarkenError(f"`encoder.{name}` must be odd, got {size}")


class GatedConvolution(nn.Module):
    """Norm, expansion, GELU, one half times the convolved other half, contraction.

    Source: arXiv 2207.02971 section 3.3 (cgMLP of arXiv 2202.08791); the gate begins at one everywhere.
    """

    def __init__(self, config: EBranchformerConfig) -> None:
        super().__init__()
        half = config.gate_dim // 2
        self.norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.gate_dim)
        self.gate_norm = nn.LayerNorm(half)
        self.depthwise = DepthwiseConvolution(half, config.kernel, bias=True)
        self.down = nn.Linear(half, config.dim)
        self.gate_dropout = Dropout(config.dropout)
        nn.init.normal_(self.depthwise.weight, std=1e-6)
        nn.init.ones_(cast(Tensor, self.depthwise.bias))

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; padded frames do not reach real ones."""
        value, gate = functional.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        gate = self.depthwise(without_padding(self.gate_norm(gate), attend))
        y: Tensor = self.down(self.gate_dropout(value * gate))
        return y


class Block(nn.Module):
    """Half feed-forward, both branches and their merge, half feed-forward, norm.

    The merge adds to both branches, side by side, their depthwise convolution, and maps them back to one width.
    Source: arXiv 2210.00077 section 3.
    """

    def __init__(self, config: EBranchformerConfig) -> None:
        super().__init__()
        self.before = FeedForward(config)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.heads, config.attention_dropout)
        self.local = GatedConvolution(config)
        self.merge_depthwise = DepthwiseConvolution(2 * config.dim, config.merge_kernel, bias=True)
        self.merge = nn.Linear(2 * config.dim, config.dim)
        self.dropout = Dropout(config.dropout)
        self.after = FeedForward(config)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `attend` as in `SelfAttention`."""
        x = torch.add(x, self.before(x), alpha=0.5)
        far = self.dropout(self.attention(self.attention_norm(x), attend))
        near = self.dropout(self.local(x, attend))
        both = without_padding(torch.cat([far, near], dim=-1), attend)
        x = x + self.dropout(self.merge(both + self.merge_depthwise(both)))
        y: Tensor = self.norm(torch.add(x, self.after(x), alpha=0.5))
        return y


@register("encoder", EBranchformerConfig)
class EBranchformer(Stack):
    """A stack of E-Branchformer blocks; see `Stack`. Positions come from a convolution, not from relative encodings."""

    def __init__(self, config: EBranchformerConfig, input_dim: int) -> None:
        super().__init__(config, input_dim, lambda: Block(config), norm_last=False)
        self.config = config

    def feed_forwards(self) -> Sequence[nn.Module]:
        """Return the contractions of the second feed-forwards; see `Encoder`."""
        return [cast(Block, block).after.down for block in self.blocks]

    def block_flops(self, frames: int) -> float:
        """Count the products of a block, of its attention and of its convolutions."""
        own = self.config
        products = (4 + 2) * own.dim**2 + 4 * own.dim * own.ffn_dim + 3 * own.dim * own.gate_dim // 2
        convolutions = own.gate_dim // 2 * own.kernel + 2 * own.dim * own.merge_kernel
        return 2.0 * frames * (products + convolutions + 2 * frames * own.dim)
