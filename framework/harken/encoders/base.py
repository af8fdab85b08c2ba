"""What every encoder promises."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from harken.core.errors import HarkenError


@dataclass(frozen=True)
class Encoded:
    """An encoder's result: `last` `(B, T, D)`, `hidden` `{layer: (B, T, D)}`, `lengths` `(B,)` on the CPU.

    penalty: scalar that an objective adds to its summed loss in training, None where there is none.
    summary: what came out at an extra token, `(B, D)`, where one was given.
    """

    last: Tensor
    hidden: dict[int, Tensor]
    lengths: Tensor
    penalty: Tensor | None = None
    summary: Tensor | None = None

    def penalised(self, total: Tensor) -> Tensor:
        """Return a summed loss with the penalty added."""
        return total if self.penalty is None else total + self.penalty


class Encoder(nn.Module):
    """Maps frames to representations.

    dim: width of a representation. num_layers: hidden[0] is the first block's input, hidden[i] the output of block i.
    rows: tokens of a frame, which lie side by side in `dim`: the patches of one time of a grid.
    checkpoint_blocks: recompute each block in the backward pass instead of keeping its activations.
    causal: no frame of any layer depends on a later frame.
    swaps: it has `encode_swapped`.
    """

    causal: ClassVar[bool] = False
    swaps: ClassVar[bool] = False

    dim: int
    num_layers: int
    rows: int = 1
    checkpoint_blocks: bool = False

    @property
    def embed_dim(self) -> int:
        """Width of an embedded frame, and of the vector that replaces a masked one."""
        return self.dim

    def normalise(self, frames: Tensor) -> Tensor:
        """Return frames `(B, T, F)` as `embed` projects them, by default as they are: wav2vec 2.0 quantises these."""
        return frames

    def embed(self, frames: Tensor) -> Tensor:
        """Bring a frontend's frames `(B, T, F)` to `(B, T, embed_dim)`; masks are applied to the result."""
        raise NotImplementedError

    def encode(self, frames: Tensor, lengths: Tensor, layers: Collection[int] = ()) -> Encoded:
        """Encode embedded frames `(B, T, embed_dim)`.

        lengths: `(B,)` on the CPU. layers: which hidden layers to return besides the last; the blocks above the highest
        one still run, as `last` needs them.
        """
        raise NotImplementedError

    def check_layers(self, layers: Collection[int]) -> None:
        """Raise HarkenError when a hidden layer is asked for that there is not."""
        unknown = [layer for layer in layers if not 0 <= layer <= self.num_layers]
        if unknown:
            raise HarkenError(f"hidden layers must lie in 0..{self.num_layers}, got {unknown}")

    def encode_visible(
        self, frames: Tensor, lengths: Tensor, mask: Tensor, visible: Tensor, extra: Tensor | None = None
    ) -> Encoded:
        """Encode embedded frames `(B, T, embed_dim)` of which some tokens are hidden.

        mask: `(B, T * rows)`, True where hidden. visible: `(B, V)`, places of the other real tokens, -1 beyond their
        number. extra: `(D / rows,)`, one more token, whose output is the result's `summary`. What comes out at a hidden
        place means nothing. An encoder that can leave tokens out does so; here they are zeros like any other input.
        Raises HarkenError where the encoder takes no extra token.
        """
        if extra is not None:
            raise HarkenError("an extra token needs an encoder of the Transformer family, such as `transformer`")
        tokens = frames.unflatten(2, (self.rows, -1)).masked_fill(mask.unflatten(1, (-1, self.rows))[..., None], 0.0)
        return self.encode(tokens.flatten(2), lengths)

    def encode_swapped(
        self,
        masked: Tensor,
        whole: Tensor,
        mask: Tensor,
        lengths: Tensor,
        swaps: Collection[int],
        layers: Collection[int] = (),
    ) -> Encoded:
        """Encode two views of the same frames, embedded, which exchange their masked frames behind the blocks `swaps`.

        masked, whole: `(B, T, embed_dim)`, with and without the mask embedding. mask: `(B, T)`, True where masked.
        The result is that of one batch: at masked places of the frames that began as the mask embedding, whichever view
        they are in by then, at others of the masked view. Only an encoder with `swaps` has it.
        """
        raise NotImplementedError

    def layer_factor(self, layer: int) -> int:
        """Return how many frames one output of a block stands for: hidden layers of more than 1 repeat it for each."""
        return 1

    def visible_flops(self, frames: int, share: float) -> float:
        """Return the operations of `encode_visible` where a share of the tokens is visible; see `flops`."""
        return self.flops(frames)

    def feed_forwards(self) -> Sequence[nn.Module]:
        """Return for each block the module whose output its last feed-forward adds, before any dropout.

        It is `(B, T * rows, D / rows)`, a token each.

        Empty where blocks have none, or differ in rate or width.
        """
        return ()

    def repeated(self) -> Sequence[nn.Module]:
        """Return the blocks, each a call of its own, which `engine.compile` compiles; none where there are none."""
        return ()

    def depth(self, parameter: str) -> int:
        """Return the block (from 1) that holds a parameter of this encoder, 0 for what lies before the blocks."""
        raise NotImplementedError

    def flops(self, frames: int) -> float:
        """Return the floating-point operations of embedding and encoding `frames`, a multiply-add counted as two."""
        raise NotImplementedError
