"""The context network of CPC: recurrent layers that run forwards in time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.encoders._causal_stack import CausalStack
from harken.nn.dropout import Dropout

_GATES = {"gru": 3, "lstm": 4}


@dataclass(frozen=True, kw_only=True)
class RecurrentConfig(SlotConfig):
    """Defaults are those of the modified CPC (arXiv 2002.02848; CPC_audio's `cpc_default_config.py`)."""

    dim: int = 256
    """Width of a representation, and of the state. CPC_audio `hiddenGar`; arXiv 1807.03748 has 256."""
    layers: int = 1
    """CPC_audio `nLevelsGRU`."""
    cell: Literal["gru", "lstm"] = "lstm"
    """CPC_audio `arMode`; arXiv 1807.03748 has `gru`."""
    dropout: float = 0.0
    """Between layers. Neither source has any."""
    input_dropout: float = 0.0
    """Of the projected frames. Neither source has any."""

    def __post_init__(self) -> None:
        check_numbers(self, "encoder", positive=("dim", "layers"), shares=("dropout", "input_dropout"))


class Block(nn.Module):
    """One recurrent layer. dropout: of its input."""

    def __init__(self, config: RecurrentConfig, dropout: float) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)
        layer = nn.LSTM if config.cell == "lstm" else nn.GRU
        self.layer = layer(config.dim, config.dim, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, T, D)` to `(B, T, D)`, from a state of zeros."""
        y: Tensor = self.layer(self.dropout(x))[0]
        return y


@register("encoder", RecurrentConfig)
class Recurrent(CausalStack):
    """Gated recurrent units or LSTM cells, one direction.

    Every utterance begins with a state of zeros; CPC_audio's `keepHidden` does not.
    Source: arXiv 1807.03748 section 3.1; GRU: arXiv 1406.1078; LSTM: Hochreiter and Schmidhuber 1997.
    """

    def __init__(self, config: RecurrentConfig, input_dim: int) -> None:
        super().__init__(
            input_dim,
            config.dim,
            config.layers,
            lambda index: Block(config, config.dropout if index else 0.0),
            input_dropout=config.input_dropout,
        )
        self.config = config

    def block_weights(self) -> int:
        """Count the products of all gates with the input and with the state."""
        return self.config.layers * _GATES[self.config.cell] * 2 * self.dim**2
