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

BUCKETS, MAX_DISTANCE = 320, 1280
"""Of relative positions. Defaults of the released `BEATs.py`, `num_buckets` and `max_distance`."""


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

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=("decoder_layers", "decoder_dim", "decoder_heads", "decoder_ffn_dim"),
            shares=("decoder_dropout",),
        )
        if self.decoder_dim % self.decoder_heads:
            raise HarkenError(
                "`objective.decoder_dim` must be divisible by `objective.decoder_heads`, "
                f"got {self.decoder_dim} and {self.decoder_heads}"
            )


class TokenDecoder(nn.Module):
    """A linear map, blocks with deep norm and a gated bias of relative positions, and a linear map.

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
            position_groups=1,  # it has no convolution of positions
            deep_norm=True,
        )
        self.enter = nn.Linear(input_dim, config.decoder_dim)
        blocks = [Block(self.blocks_config, GatedAttention) for _ in range(config.decoder_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.bias = PositionBias(config.decoder_heads, BUCKETS, MAX_DISTANCE)
        self.leave = nn.Linear(config.decoder_dim, output_dim)
        self.apply(initialise)
        for block in blocks:
            cast(GatedAttention, block.attention).on_query = True
            block.start_deep((8 * config.decoder_layers) ** -0.25)  # DeepNet's beta

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Map tokens `(B, N, input_dim)` to `(B, N, output_dim)`; lengths: `(B,)` tokens, on the CPU."""
        padded = padding_mask(lengths, tokens.shape[1])
        attend = None if padded is None else ~padded.to(tokens.device, non_blocking=True)[:, None, None, :]
        x, bias = self.enter(tokens), self.bias(tokens.shape[1])
        for block in self.blocks:
            x = block(x, attend, bias)
        predicted: Tensor = self.leave(x)
        return predicted

    def flops(self, tokens: int) -> float:
        """Return the operations of a forward pass over `tokens`, a multiply-add counted as two."""
        own = self.blocks_config
        block = 4 * own.dim**2 + 2 * own.dim * own.ffn_dim + 2 * tokens * own.dim + own.dim * GATE_PARTS
        return 2.0 * tokens * (self.enter.weight.numel() + own.layers * block + self.leave.weight.numel())
