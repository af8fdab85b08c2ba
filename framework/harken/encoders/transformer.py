"""The Transformer encoder of wav2vec 2.0 and HuBERT."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harken.config.registry import SlotConfig, register
from harken.core.batch import padding_mask
from harken.core.draws import shared_uniform
from harken.core.errors import HarkenError
from harken.encoders.base import Encoded, Encoder
from harken.nn.attention import SelfAttention
from harken.nn.positions import PositionalConvolution


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(SlotConfig):
    """Defaults are HuBERT Base's (arXiv 2106.07447 table I; fairseq `hubert_base_librispeech.yaml`)."""

    dim: int = 768
    """fairseq `encoder_embed_dim`."""
    layers: int = 12
    heads: int = 12
    ffn_dim: int = 3072
    norm_first: bool = False
    """fairseq `layer_norm_first`: False in Base, True in Large and X-Large."""
    dropout: float = 0.1
    attention_dropout: float = 0.1
    activation_dropout: float = 0.0
    input_dropout: float = 0.1
    """fairseq `dropout_input`."""
    layer_drop: float = 0.05
    """fairseq `encoder_layerdrop`; 0.05 in Base, 0 in Large."""
    position_kernel: int = 128
    """fairseq `conv_pos`."""
    position_groups: int = 16

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise HarkenError(f"`encoder.dim` must be divisible by `encoder.heads`, got {self.dim} and {self.heads}")
        if self.dim % self.position_groups:
            raise HarkenError(
                "`encoder.dim` must be divisible by `encoder.position_groups`, "
                f"got {self.dim} and {self.position_groups}"
            )


class Block(nn.Module):
    """Self-attention and feed-forward, each a residual branch, normalised after (Base) or before (Large) the branch."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_first
        self.attention = SelfAttention(config.dim, config.heads, config.attention_dropout)
        self.attention_norm = nn.LayerNorm(config.dim)
        self.up = nn.Linear(config.dim, config.ffn_dim)
        self.down = nn.Linear(config.ffn_dim, config.dim)
        self.ffn_norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def _feed_forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.down(self.activation_dropout(functional.gelu(self.up(x)))))
        return y

    def forward(self, x: Tensor, attend: Tensor | None) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; `attend` as in `SelfAttention`."""
        if self.norm_first:
            x = x + self.dropout(self.attention(self.attention_norm(x), attend))
            return x + self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.dropout(self.attention(x, attend)))
        y: Tensor = self.ffn_norm(x + self._feed_forward(x))
        return y


@register("encoder", TransformerConfig)
class Transformer(Encoder):
    """Layer norm and projection, convolutional positions, a stack of blocks with LayerDrop.

    Source: arXiv 2006.11477 section 2; LayerDrop: arXiv 1909.11556. Which layers are dropped is the same on all ranks
    and micro-batches of a step, so no rank waits for a gradient that another does not make.
    """

    def __init__(self, config: TransformerConfig, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self.dim = config.dim
        self.num_layers = config.layers
        self.input_norm = nn.LayerNorm(input_dim)
        # fairseq has no projection where the widths are equal; its released checkpoints load either way
        self.project: nn.Module = nn.Linear(input_dim, config.dim) if input_dim != config.dim else nn.Identity()
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.positions = PositionalConvolution(config.dim, config.position_kernel, config.position_groups)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks.apply(_initialise)

    def embed(self, frames: Tensor) -> Tensor:
        """Normalise and project frames `(B, T, F)` to `(B, T, D)`."""
        embedded: Tensor = self.input_dropout(self.project(self.input_norm(frames)))
        return embedded

    def encode(self, frames: Tensor, lengths: Tensor, layers: Collection[int] = ()) -> Encoded:
        """Encode embedded frames `(B, T, D)`; see `Encoder`."""
        unknown = [layer for layer in layers if not 0 <= layer <= self.num_layers]
        if unknown:
            raise HarkenError(f"hidden layers must lie in 0..{self.num_layers}, got {unknown}")
        padded = padding_mask(lengths, frames.shape[1])
        attend = None
        if padded is not None:
            padded = padded.to(frames.device, non_blocking=True)
            frames = frames.masked_fill(padded[..., None], 0.0)
            attend = ~padded[:, None, None, :]
        x = frames + self.positions(frames)
        if not self.config.norm_first:
            x = self.norm(x)
        x = self.dropout(x)
        hidden = {0: x} if 0 in layers else {}
        for index, block in enumerate(self.blocks, start=1):
            if not (self.training and self.config.layer_drop and shared_uniform() < self.config.layer_drop):
                x = checkpoint(block, x, attend, use_reentrant=False) if self.checkpoint_blocks else block(x, attend)
            if index in layers:
                hidden[index] = x
        if self.config.norm_first:
            x = self.norm(x)
        return Encoded(x, hidden, lengths)

    def flops(self, frames: int) -> float:
        """Count projection, positions, products of the blocks and attention; see `Encoder`."""
        own = self.config
        project = own.dim * self.input_norm.normalized_shape[0] if isinstance(self.project, nn.Linear) else 0
        positions = own.dim * (own.dim // own.position_groups) * own.position_kernel
        block = 4 * own.dim**2 + 2 * own.dim * own.ffn_dim
        attention = 2 * frames * own.dim
        return 2.0 * frames * (project + positions + own.layers * (block + attention))

    def depth(self, parameter: str) -> int:
        """Return the block that holds a parameter; the final norm of a pre-norm encoder counts with the last block."""
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        return self.num_layers if parameter.startswith("norm.") and self.config.norm_first else 0


def _initialise(module: nn.Module) -> None:
    """Give linear maps the weights of BERT: normal with deviation 0.02, no bias. Source: fairseq `init_bert_params`."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
