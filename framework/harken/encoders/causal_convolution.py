"""The context network of wav2vec: convolutions over time that look back only."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.core.errors import HarkenError
from harken.encoders._causal_stack import CausalStack
from harken.nn.convolution import convolve_over_time
from harken.nn.dropout import Dropout


@dataclass(frozen=True, kw_only=True)
class CausalConvolutionConfig(SlotConfig):
    """Defaults are those of wav2vec large (arXiv 1904.05862; fairseq's `Wav2VecConfig`)."""

    dim: int = 512
    """Width of a representation. fairseq `conv_aggregator_layers`: the first number of each triple."""
    kernels: tuple[int, ...] = tuple(range(2, 14))
    """Frames that each convolution covers, the last its own. fairseq `conv_aggregator_layers`: the second numbers."""
    skip: bool = True
    """Add each block's input to its output. fairseq `skip_connections_agg`."""
    residual_scale: float = 0.5
    """The square of the factor on that sum. fairseq `residual_scale`."""
    dropout: float = 0.0
    """After each convolution. fairseq `dropout`."""
    input_dropout: float = 0.0
    """Of the projected frames. fairseq `dropout_features`."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "encoder",
            positive=("dim", "kernels", "residual_scale"),
            shares=("dropout", "input_dropout"),
        )
        if not self.kernels:
            raise HarkenError("`encoder.kernels` must have an entry for each block, got none")


class Block(nn.Module):
    """Convolution over the past and the present, dropout, norm of each frame, ReLU, and the input added."""

    def __init__(self, config: CausalConvolutionConfig, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(config.dim, config.dim, kernel)
        self.dropout = Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.dim)
        self.skip = config.skip
        self.scale = math.sqrt(config.residual_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`; before the first frame stands the first frame, as in fairseq."""
        own = self.convolution
        past = functional.pad(x.transpose(1, 2), (own.kernel_size[0] - 1, 0), "replicate").transpose(1, 2)
        y = self.dropout(convolve_over_time(past, own.weight, own.bias, padding=0, groups=1))
        y = functional.relu(self.norm(y))
        return (x + y) * self.scale if self.skip else y


@register("encoder", CausalConvolutionConfig)
class CausalConvolution(CausalStack):
    """wav2vec's aggregator over every frontend.

    Each frame is normalised over its channels. The original normalises over channels and time together, by which a
    frame knows of those behind it and of the padding.
    Source: arXiv 1904.05862 section 2.1; fairseq's `ConvAggegator`.
    """

    def __init__(self, config: CausalConvolutionConfig, input_dim: int) -> None:
        kernels = config.kernels
        super().__init__(
            input_dim,
            config.dim,
            len(kernels),
            lambda index: Block(config, kernels[index]),
            input_dropout=config.input_dropout,
        )
        self.config = config

    def block_weights(self) -> int:
        """Count the convolutions."""
        return sum(self.config.kernels) * self.dim**2
