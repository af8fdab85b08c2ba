"""What encoders share that look back only: projection and a stack of blocks, none of which sees a later frame."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import ClassVar

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harken.encoders.base import Encoded, Encoder
from harken.nn.dropout import Dropout


class CausalStack(Encoder):
    """A projection where the widths differ, then blocks that map `(B, T, D)` to `(B, T, D)` and look back only.

    So padding, which stands behind every real frame, reaches none without being masked.
    make_block: makes the block of an index, from 0.
    """

    causal: ClassVar[bool] = True

    def __init__(
        self, input_dim: int, dim: int, layers: int, make_block: Callable[[int], nn.Module], *, input_dropout: float
    ) -> None:
        super().__init__()
        self.dim = dim
        self.num_layers = layers
        # as in fairseq's aggregator, which has none where the widths are equal, and no bias where it has one
        self.project: nn.Module = nn.Linear(input_dim, dim, bias=False) if input_dim != dim else nn.Identity()
        self.input_dropout = Dropout(input_dropout)
        self.blocks = nn.ModuleList(make_block(index) for index in range(layers))

    def embed(self, frames: Tensor) -> Tensor:
        """Project frames `(B, T, F)` to `(B, T, D)`."""
        embedded: Tensor = self.input_dropout(self.project(frames))
        return embedded

    def encode(self, frames: Tensor, lengths: Tensor, layers: Collection[int] = ()) -> Encoded:
        """Encode embedded frames `(B, T, D)`; see `Encoder`."""
        self.check_layers(layers)
        x = frames
        hidden = {0: x} if 0 in layers else {}
        for index, block in enumerate(self.blocks, start=1):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint_blocks else block(x)
            if index in layers:
                hidden[index] = x
        return Encoded(x, hidden, lengths)

    def block_weights(self) -> int:
        """Return how many weights of all blocks a frame is multiplied with."""
        raise NotImplementedError

    def flops(self, frames: int) -> float:
        """Count the projection and the blocks; see `Encoder`."""
        project = self.project.weight.numel() if isinstance(self.project, nn.Linear) else 0
        return 2.0 * frames * (project + self.block_weights())

    def depth(self, parameter: str) -> int:
        """Return the block that holds a parameter, from 1; 0 is the projection."""
        return int(parameter.split(".")[1]) + 1 if parameter.startswith("blocks.") else 0
