"""The Transformer of WavLM: attention that adds a gated bias of the relative position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError
from harken.encoders.transformer import Block, Transformer, TransformerConfig
from harken.nn.gated_position_bias import GATE_PARTS, GatedAttention, PositionBias


@dataclass(frozen=True, kw_only=True)
class WavlmConfig(TransformerConfig):
    """Defaults are WavLM Base's (arXiv 2110.13900; Microsoft's `WavLMConfig` and HuBERT Base's for the training)."""

    position_buckets: int = 320
    """Buckets of key position minus query position, a multiple of 4: half for keys that come later, and half of each
    half for single offsets. WavLM `num_buckets`."""
    position_max_distance: int = 800
    """Frames from which on all offsets share the last bucket. WavLM `max_distance`."""
    gate_on: Literal["input", "query"] = "input"
    """What a block's gates are computed from: its input, as in WavLM's released code, or its queries, as in the paper
    and in BEATs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "encoder", positive=("position_buckets", "position_max_distance"))
        if self.position_buckets % 4 or self.position_max_distance <= self.position_buckets // 4:
            raise HarkenError(
                "`encoder.position_buckets` must be a multiple of 4, and `encoder.position_max_distance` above a "
                f"quarter of it, got {self.position_buckets} and {self.position_max_distance}"
            )


@register("encoder", WavlmConfig)
class Wavlm(Transformer):
    """The Transformer of wav2vec 2.0, with one bias of relative positions that each block gates by its own input.

    The biases are looked up once a forward pass and shared by all blocks, whichever of them LayerDrop leaves out.

    Large models overflow in fp16 where scores are kept in half precision, against which the paper rescales them by 32
    and subtracts their maximum before the softmax. torch's fused kernels keep scores in float32 and subtract the
    maximum, which computes the same without a pass over the scores. Source: arXiv 2110.13900.
    """

    attention = GatedAttention

    def __init__(self, config: WavlmConfig, input_dim: int) -> None:
        super().__init__(config, input_dim)
        for block in self.blocks:
            cast(GatedAttention, cast(Block, block).attention).on_query = config.gate_on == "query"
        self.bias = PositionBias(config.heads, config.position_buckets, config.position_max_distance)

    def shared(self, frames: Tensor, places: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the biases `(H, T, T)` of frames `(B, T, D)`, or `(B, H, V, V)` of tokens at `places`."""
        return (self.bias(frames.shape[1]) if places is None else self.bias.at(places),)

    def block_flops(self, frames: int) -> float:
        """Add the gates to a block of the Transformer."""
        return super().block_flops(frames) + 2.0 * frames * self.stack.dim * GATE_PARTS
