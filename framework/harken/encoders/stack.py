"""What the Transformer family shares: projection, positions, a stack of blocks with LayerDrop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from harken.config.registry import SlotConfig
from harken.config.rules import check_numbers
from harken.core.batch import padding_mask
from harken.core.draws import shared_uniform
from harken.core.errors import HarkenError
from harken.encoders.base import Encoded, Encoder
from harken.nn.dropout import Dropout
from harken.nn.positions import GridPositions, PositionalConvolution, StackedConvolutions, position_kernel


@dataclass(frozen=True, kw_only=True)
class StackConfig(SlotConfig):
    """Defaults are HuBERT Base's (arXiv 2106.07447 table I; fairseq `hubert_base_librispeech.yaml`)."""

    dim: int = 768
    """Width of a representation. fairseq `encoder_embed_dim`; 768 in Base, 1024 in Large, 1280 in X-Large."""
    layers: int = 12
    """Blocks. fairseq `encoder_layers`; 12 in Base, 24 in Large, 48 in X-Large."""
    heads: int = 12
    """Attention heads of a block; they divide `dim`. fairseq `encoder_attention_heads`; 12 in Base, 16 in Large."""
    ffn_dim: int = 3072
    """Inner width of a feed-forward. fairseq `encoder_ffn_embed_dim`; 3072 in Base, 4096 in Large, 5120 in X-Large."""
    dropout: float = 0.1
    """After each branch of a block and after the positions. fairseq `dropout`; 0.1 in Base, 0 in Large."""
    attention_dropout: float = 0.1
    """Of attention weights. fairseq `attention_dropout`; 0.1 in Base, 0 in Large."""
    activation_dropout: float = 0.0
    """Inside a feed-forward, after its activation. fairseq `activation_dropout`."""
    input_dropout: float = 0.1
    """Of the projected frames. fairseq `dropout_input`; 0.1 in Base, 0 in Large."""
    layer_drop: float = 0.05
    """Chance of a block to be passed over in a training step. fairseq `encoder_layerdrop`; 0.05 in Base, 0 in Large."""
    position_kernel: int = 128
    """Frames that the convolution of the positions covers. fairseq `conv_pos`."""
    position_groups: int = 16
    """Groups of the convolution of the positions; they divide `dim`. fairseq `conv_pos_groups`."""
    position_depth: int = 1
    """Convolutions in a row that `position_kernel` is divided among, 3 frames each at least, with a layer norm and GELU
    behind each. 1 is a single one with weight norm. fairseq `pos_conv_depth`, 5 in data2vec."""
    positions: Literal["convolution", "grid"] = "convolution"
    """`convolution` over the tokens, or a fixed sinusoid of time and row (EAT, arXiv 2401.03497)."""
    rows: int = 1
    """Tokens that a frame is cut into: for `frontend.name: patches` `bands / patch_bands`, 8 by default, for others 1.
    `dim` is the width of a token; a representation is all tokens of a frame side by side."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "encoder",
            positive=(
                "dim",
                "layers",
                "heads",
                "ffn_dim",
                "position_kernel",
                "position_groups",
                "position_depth",
                "rows",
            ),
            shares=("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop"),
        )
        if self.dim % self.heads:
            raise HarkenError(f"`encoder.dim` must be divisible by `encoder.heads`, got {self.dim} and {self.heads}")
        if self.dim % self.position_groups:
            raise HarkenError(
                "`encoder.dim` must be divisible by `encoder.position_groups`, "
                f"got {self.dim} and {self.position_groups}"
            )


class Stack(Encoder):
    """Layer norm and projection, positions, blocks with LayerDrop.

    A frame is `rows` tokens, which all of it works on one by one: 1 for speech, the patches of one time for a grid.

    norm_last: normalise what leaves the last block, for blocks whose residual path is not normalised; else what enters
    the first. A block maps `(B, T, D)`, `attend` (see `SelfAttention`) and what `shared` returns to `(B, T, D)`.
    Source: arXiv 2006.11477 section 2; LayerDrop: arXiv 1909.11556. Which layers are dropped is the same on all ranks
    and micro-batches of a step, so no rank waits for a gradient that another does not make.
    """

    swaps = True

    omits: ClassVar[bool] = False
    """Whether blocks compute the same where hidden tokens are taken out of the sequence."""

    def __init__(
        self, config: StackConfig, input_dim: int, make_block: Callable[[], nn.Module], *, norm_last: bool
    ) -> None:
        super().__init__()
        self.stack = config
        self.rows = config.rows
        self.dim = config.rows * config.dim
        self.num_layers = config.layers
        self.norm_last = norm_last
        if input_dim % config.rows:
            raise HarkenError(
                f"`encoder.rows` must divide the width of the frontend's frames, got {config.rows} and {input_dim}; "
                "for patches it is `frontend.bands / frontend.patch_bands`"
            )
        input_dim //= config.rows
        self.input_norm = nn.LayerNorm(input_dim)
        # fairseq has no projection where the widths are equal; its released checkpoints load either way
        self.project: nn.Module = nn.Linear(input_dim, config.dim) if input_dim != config.dim else nn.Identity()
        self.input_dropout = Dropout(config.input_dropout)
        self.positions = _positions(config)
        self.blocks = nn.ModuleList(make_block() for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self.dropout = Dropout(config.dropout)
        self.blocks.apply(initialise)

    def normalise(self, frames: Tensor) -> Tensor:
        """Give each token of the frames `(B, T, F)` its norm; see `Encoder`."""
        return self._normal_tokens(frames).flatten(2)

    def _normal_tokens(self, frames: Tensor) -> Tensor:
        normal: Tensor = self.input_norm(frames.unflatten(2, (self.rows, -1)))
        return normal

    def embed(self, frames: Tensor) -> Tensor:
        """Normalise and project frames `(B, T, F)` to `(B, T, D)`."""
        embedded: Tensor = self.input_dropout(self.project(self._normal_tokens(frames)))
        return embedded.flatten(2)

    def encode(self, frames: Tensor, lengths: Tensor, layers: Collection[int] = ()) -> Encoded:
        """Encode embedded frames `(B, T, embed_dim)`; see `Encoder`."""
        self.check_layers(layers)
        last, hidden = self.run_blocks(*self._place(frames, lengths), layers)
        hidden = {layer: value.view_as(frames) for layer, value in hidden.items()}
        return Encoded(last.view_as(frames), hidden, lengths)

    def _place(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the tokens of frames with positions `(B, N, D)`, zeros before them where padded, and `attend`."""
        tokens = frames.reshape(len(frames), frames.shape[1] * self.rows, -1)
        padded = padding_mask(lengths * self.rows, tokens.shape[1])
        attend = None
        if padded is not None:
            padded = padded.to(frames.device, non_blocking=True)
            tokens = tokens.masked_fill(padded[..., None], 0.0)
            attend = ~padded[:, None, None, :]
        return tokens + self.positions(tokens, padded), attend

    def encode_swapped(
        self,
        masked: Tensor,
        whole: Tensor,
        mask: Tensor,
        lengths: Tensor,
        swaps: Collection[int],
        layers: Collection[int] = (),
    ) -> Encoded:
        """Encode two views that exchange frames, as one batch of twice as many rows; see `Encoder`."""
        self.check_layers(layers)
        rows = len(masked)
        places = mask.repeat_interleave(self.rows, 1)[..., None]
        both = places.repeat(2, 1, 1)

        def exchange(number: int, x: Tensor) -> Tensor:
            return torch.where(both, x.roll(rows, 0), x) if number in swaps else x

        def gather(number: int, x: Tensor) -> Tensor:
            first, second = x.chunk(2)
            crossed = sum(swap <= number for swap in swaps) % 2
            return (torch.where(places, second, first) if crossed else first).reshape(masked.shape)

        inputs = self._place(torch.cat([masked, whole]), lengths.repeat(2))
        last, hidden = self.run_blocks(*inputs, layers, exchange)
        found = {layer: gather(layer, value) for layer, value in hidden.items()}
        return Encoded(gather(self.num_layers, last), found, lengths)

    def encode_visible(
        self, frames: Tensor, lengths: Tensor, mask: Tensor, visible: Tensor, extra: Tensor | None = None
    ) -> Encoded:
        """Encode what is visible; see `Encoder`. Hidden tokens are zeros to the positions, and attended to by none."""
        tokens = frames.reshape(len(frames), frames.shape[1] * self.rows, -1)
        hidden = mask
        padded = padding_mask(lengths * self.rows, tokens.shape[1])
        if padded is not None:
            padded = padded.to(frames.device, non_blocking=True)
            hidden = hidden | padded
        tokens = tokens.masked_fill(hidden[..., None], 0.0)
        every = tokens + self.positions(tokens, padded)
        seen = visible.clamp(min=0)
        places = seen[..., None].expand(-1, -1, every.shape[2])
        x, real = (every.gather(1, places), visible >= 0) if self.omits else (every, ~hidden)
        if extra is not None:
            x = torch.cat([extra.to(x.dtype).expand(len(x), 1, -1), x], 1)
            real = functional.pad(real, (1, 0), value=True)
            seen = functional.pad(seen, (1, 0), value=-1)  # it stands before the first
        x, _ = self.run_blocks(x, real[:, None, None, :], places=seen if self.omits else None)
        summary = None
        if extra is not None:
            summary, x, real = x[:, 0], x[:, 1:], real[:, 1:]
        if self.omits:  # places beyond the visible ones repeat place 0: adding zeros leaves it as it is
            x = torch.zeros_like(every, dtype=x.dtype).scatter_add(1, places, x * real[..., None])
        return Encoded(x.reshape(frames.shape), {}, lengths, summary=summary)

    def repeated(self) -> Sequence[nn.Module]:
        """Return the blocks; see `Encoder`."""
        return tuple(self.blocks)

    def visible_flops(self, frames: int, share: float) -> float:
        """Count positions over all tokens, and the blocks over those that they see; see `Encoder`."""
        tokens = frames * self.rows
        seen = round(tokens * share) if self.omits else tokens
        return 2.0 * tokens * self._position_weights() + self.num_layers * self.block_flops(seen)

    def run_blocks(
        self,
        x: Tensor,
        attend: Tensor | None,
        layers: Collection[int] = (),
        behind: Callable[[int, Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run norms and blocks over tokens with positions `(B, N, D)`; return the last and the hidden `layers`.

        attend: `(B, 1, 1, N)`, True where a token may be attended to, None for all. behind: what is done to the output
        of each block, called with its number. places: see `shared`.
        """
        return self.run_stage(x, attend, self.norm, range(1, self.num_layers + 1), layers, behind, places)

    def run_stage(
        self,
        x: Tensor,
        attend: Tensor | None,
        norm: nn.Module,
        numbers: range,
        layers: Collection[int] = (),
        behind: Callable[[int, Tensor], Tensor] | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run the blocks `numbers` (from 1) and the norm before or behind them; see `run_blocks`."""
        if not self.norm_last:
            x = norm(x)
        x = self.dropout(x)
        hidden = {0: x} if numbers[0] == 1 and 0 in layers else {}
        inputs = (attend, *self.shared(x, places))
        for number in numbers:
            block = self.blocks[number - 1]
            if not (self.training and self.stack.layer_drop and shared_uniform() < self.stack.layer_drop):
                x = checkpoint(block, x, *inputs, use_reentrant=False) if self.checkpoint_blocks else block(x, *inputs)
            if behind is not None:
                x = behind(number, x)
            if number in layers:
                hidden[number] = x
        return (norm(x) if self.norm_last else x), hidden

    def shared(self, frames: Tensor, places: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return what all blocks take besides their input `(B, T, D)`, computed once a forward pass; nothing here.

        places: `(B, T)`, where in their sequences these tokens stand; None where none is left out.
        """
        return ()

    def block_flops(self, frames: int) -> float:
        """Return the forward operations of one block over `frames` tokens, attention included."""
        raise NotImplementedError

    def flops(self, frames: int) -> float:
        """Count projection, positions and blocks; see `Encoder`."""
        own = self.stack
        project = own.dim * self.input_norm.normalized_shape[0] if isinstance(self.project, nn.Linear) else 0
        tokens = frames * self.rows
        return 2.0 * tokens * (project + self._position_weights()) + own.layers * self.block_flops(tokens)

    def _position_weights(self) -> int:
        own = self.stack
        if own.positions == "grid":
            return 0
        frames = own.position_depth * position_kernel(own.position_kernel, own.position_depth)
        return own.dim * (own.dim // own.position_groups) * frames

    def depth(self, parameter: str) -> int:
        """Return the block that holds a parameter; a norm behind the blocks counts with the last one."""
        if parameter.startswith("blocks."):
            return int(parameter.split(".")[1]) + 1
        return self.num_layers if parameter.startswith("norm.") and self.norm_last else 0


def _positions(config: StackConfig) -> nn.Module:
    if config.positions == "grid":
        return GridPositions(config.dim, config.rows)
    if config.position_depth > 1:
        return StackedConvolutions(config.dim, config.position_kernel, config.position_groups, config.position_depth)
    return PositionalConvolution(config.dim, config.position_kernel, config.position_groups)


def initialise(module: nn.Module) -> None:
    """Give linear maps the weights of BERT: normal with deviation 0.02, no bias. Source: fairseq `init_bert_params`."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
