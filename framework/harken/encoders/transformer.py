"""The Transformer encoder of wav2vec 2.0 and HuBERT."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.core.errors import HarkenError
from harken.encoders.stack import Stack, StackConfig
from harken.nn.attention import SelfAttention
from harken.nn.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(StackConfig):
    """Defaults are HuBERT Base's (arXiv 2106.07447 table I; fairseq `hubert_base_librispeech.yaml`)."""

    norm_first: bool = False
    """fairseq `layer_norm_first`: False in Base, True in Large and X-Large."""
    deep_norm: bool = False
    """Scale residual paths up and the first weights down, so that deep stacks of post-norm blocks train (DeepNet, arXiv
    2203.00555). BEATs `deep_norm`; not with `norm_first`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deep_norm and self.norm_first:
            raise HarkenError("`encoder.deep_norm` is for norms behind the branches: set `encoder.norm_first` to false")


class Block(nn.Module):
    """Self-attention and feed-forward, each a residual branch, normalised after (Base) or before (Large) the branch.

    attention: its kind.
    """

    def __init__(self, config: TransformerConfig, attention: type[SelfAttention] = SelfAttention) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.residual = (2 * config.layers) ** 0.25 if config.deep_norm else 1.0  # DeepNet's alpha, encoder only
        self.attention = attention(config.dim, config.heads, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.activation_dropout = Dropout(config.activation_dropout)

    def start_deep(self, gain: float) -> None:
        """Draw Xavier normal weights, `gain` on all but those of queries and keys. Source: arXiv 2203.00555."""
        query, key, value = self.attention.qkv.weight.detach().chunk(3)
        for part in (query, key):
            nn.init.xavier_normal_(part)
        for part in (value, self.attention.out.weight, self.up.weight, self.down.weight):
            nn.init.xavier_normal_(part, gain=gain)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.down(self.activation_dropout(functional.gelu(self.up(x)))))
        return y

    def forward(self, x: Tensor, attend: Tensor | None, *shared: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `attend` as in `SelfAttention`, `shared` is what else the attention takes."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), attend, *shared))
            return x + self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x * self.residual + self.dropout(self.attention(x, attend, *shared)))
        y: Tensor = self.ffn_norm(x * self.residual + self._feed_forward(x))
        return y


@register("encoder", TransformerConfig)
class Transformer(Stack):
    """A stack of self-attention and feed-forward blocks; see `Stack`."""

    attention: ClassVar[type[SelfAttention]] = SelfAttention
    omits: ClassVar[bool] = True

    def __init__(self, config: TransformerConfig, input_dim: int) -> None:
        super().__init__(config, input_dim, lambda: Block(config, self.attention), norm_last=config.norm_first)
        self.config = config
        if config.deep_norm:
            for block in self.blocks:
                cast(Block, block).start_deep((8 * config.layers) ** -0.25)  # DeepNet's beta

    def feed_forwards(self) -> Sequence[nn.Module]:
        """Return the contractions of the feed-forwards; see `Encoder`."""
        return [cast(Block, block).down for block in self.blocks]

    def block_flops(self, frames: int) -> float:
        """Count the products of a block and of its attention."""
        own = self.config
        return 2.0 * frames * (4 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * frames * own.dim)
