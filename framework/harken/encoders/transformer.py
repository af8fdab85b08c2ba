"""The Transformer encoder of wav2vec 2.0 and HuBERT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.encoders.stack import Stack, StackConfig
from harken.nn.attention import SelfAttention
from harken.nn.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(StackConfig):
    """Defaults are HuBERT Base's (arXiv 2106.07447 table I; fairseq `hubert_base_librispeech.yaml`)."""

    norm_first: bool = False
    """fairseq `layer_norm_first`: False in Base, True in Large and X-Large."""


class Block(nn.Module):
    """Self-attention and feed-forward, each a residual branch, normalised after (Base) or before (Large) the branch.

    attention: its kind.
    """

    def __init__(self, config: TransformerConfig, attention: type[SelfAttention] = SelfAttention) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = attention(config.dim, config.heads, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.down(self.activation_dropout(functional.gelu(self.up(x)))))
        return y

    def forward(self, x: Tensor, attend: Tensor | None, *shared: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `attend` as in `SelfAttention`, `shared` is what else the attention takes."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), attend, *shared))
            return x + self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, attend, *shared)))
        y: Tensor = self.ffn_norm(x + self._feed_forward(x))
        return y


@register("encoder", TransformerConfig)
class Transformer(Stack):
    """A stack of self-attention and feed-forward blocks; see `Stack`."""

    attention: ClassVar[type[SelfAttention]] = SelfAttention

    def __init__(self, config: TransformerConfig, input_dim: int) -> None:
        super().__init__(config, input_dim, lambda: Block(config, self.attention), norm_last=config.norm_first)
        self.config = config

    def feed_forwards(self) -> Sequence[nn.Module]:
        """Return the contractions of the feed-forwards; see `Encoder`."""
        return [cast(Block, block).down for block in self.blocks]

    def block_flops(self, frames: int) -> float:
        """Count the products of a block and of its attention."""
        own = self.config
        return 2.0 * frames * (4 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * frames * own.dim)
