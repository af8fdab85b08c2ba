"""A few blocks that turn tokens into predictions: BEATs' label predictor and the estimator of its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from harken.config.registry import SlotConfig
from harken.config.rules import check_numbers
from harken.core.batch import padding_mask
from harken.core.errors import HarkenError
from harken.encoders.stack import initialise
from harken.encoders.transformer import Block, TransformerConfig
from harken.nn.gated_position_bias import GATE_PARTS, GatedAttention, PositionBias
from harken.nn.positions import PositionalConvolution

BUCKETS, MAX_DISTANCE = 320, 1280
"""Of relative positions. Defaults of the released `BEATs.py`, `num_buckets` and `max_distance`."""
POSITION_GROUPS = 16
"""Of a convolution of positions. `conv_pos_groups` of the encoder, released as 16."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(SlotConfig):
    """Sizes; defaults are those of ESPnet's BEATs (`espnet2/beats/encoder.py`), whose options stand behind them."""

    decoder_layers: int = 3
    """Blocks of the decoder. The paper's "3-layer Transformer estimator" (section 3.2.2); `decoder_layers`."""
    decoder_dim: int = 768
    """Width of a token in the decoder. `decoder_embed_dim`."""
    decoder_heads: int = 12
    """Attention heads of a block of the decoder; they divide `decoder_dim`. `decoder_attention_heads`."""
    decoder_ffn_dim: int = 3072
    """Inner width of a feed-forward of the decoder. `encoder_ffn_embed_dim`."""
    decoder_dropout: float = 0.1
    """Of the decoder's branches and of its attention weights. `dropout` and `attention_dropout`."""
    decoder_position_kernel: int = 0
    """Tokens that a convolution of positions over the decoder's input covers, like the encoder's; 0 is none, as in
    ESPnet. Without it masked tokens begin alike, and small models on little audio stay at predicting the most common
    code (docs/beats.md)."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=("decoder_layers", "decoder_dim", "decoder_heads", "decoder_ffn_dim"),
            not_negative=("decoder_position_kernel",),
            shares=("decoder_dropout",),
        )
        if self.decoder_position_kernel and self.decoder_dim % POSITION_GROUPS:
            raise HarkenError(
                f"`objective.decoder_dim` must be divisible by {POSITION_GROUPS} for the groups of a convolution of "
                f"positions (`objective.decoder_position_kernel`), got {self.decoder_dim}"
            )
        if self.decoder_dim % self.decoder_heads:
            raise HarkenError(
                "`objective.decoder_dim` must be divisible by `objective.decoder_heads`, "
                f"got {self.decoder_dim} and {self.decoder_heads}"
            )


class TokenDecoder(nn.Module):
    """A linear map, blocks with deep norm and a gated bias of relative positions, and a linear map.

    Positions of a convolution are added before the blocks where there is one.
    The last map is for widths that differ; ESPnet's estimator is as wide as what it predicts and ends with a norm.
    Source: arXiv 2212.09058 sections 3.2.2 and 3.3.2; ESPnet's `BeatsPretrainingPredictor`.
    """

    def __init__(self, config: DecoderConfig, input_dim: int, output_dim: int) -> None:
        super().__init__()
        self.blocks_config = TransformerConfig(
            name="transformer",
            dim=config.decoder_dim,
            layers=config.decoder_layers,
            heads=config.decoder_heads,
            ffn_dim=config.decoder_ffn_dim,
            dropout=config.decoder_dropout,
            attention_dropout=config.decoder_dropout,
            position_groups=1,  # of a `Stack`, which this is not
            deep_norm=True,
        )
        self.enter = nn.Linear(input_dim, config.decoder_dim)
        blocks = [Block(self.blocks_config, GatedAttention) for _ in range(config.decoder_layers)]
        self.blocks = nn.ModuleList(blocks)
        kernel = config.decoder_position_kernel
        self.positions = PositionalConvolution(config.decoder_dim, kernel, POSITION_GROUPS) if kernel else None
        self.bias = PositionBias(config.decoder_heads, BUCKETS, MAX_DISTANCE)
        self.leave = nn.Linear(config.decoder_dim, output_dim)
        self.apply(initialise)
        for block in blocks:
            cast(GatedAttention, block.attention).on_query = True
            block.start_deep((8 * config.decoder_layers) ** -0.25)  # DeepNet's beta

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map tokens `(B, N, input_dim)` to `(B, N, output_dim)`; lengths: `(B,)` tokens, on the CPU."""
        x, attend = self.enter(tokens), None
        padded = padding_mask(lengths, tokens.shape[1])
        if padded is not None:
            padded = padded.to(tokens.device, non_blocking=True)
            attend = ~padded[:, None, None, :]
        if self.positions is not None:
            x = x + self.positions(x if padded is None else x.masked_fill(padded[..., None], 0.0))
        bias = self.bias(tokens.shape[1])
        for block in self.blocks:
            x = block(x, attend, bias)
        predicted: Tensor = self.leave(x)
        return predicted

    def flops(self, tokens: int) -> float:
        """Return the operations of a forward pass over `tokens`, a multiply-add counted as two."""
        own = self.blocks_config
        block = 4 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * tokens * own.dim + own.dim * GATE_PARTS
        ends = self.enter.weight.numel() + self.leave.weight.numel()
        positions = 0 if self.positions is None else self.positions.weight_v.numel()
        return 2.0 * tokens * (ends + positions + own.layers * block)
