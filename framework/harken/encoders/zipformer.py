"""The Zipformer encoder: stacks of blocks at several frame rates.

Source: arXiv 2310.11230; pretrained in the way of HuBERT by k2SSL, arXiv 2411.17100. Where the papers are silent, the
numbers are those of icefall's `zipformer.py`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.core.batch import padding_mask
from harken.core.errors import HarkenError
from harken.encoders._zipformer_block import BlockConfig, View
from harken.encoders._zipformer_config import ZipformerConfig
from harken.encoders._zipformer_stack import ZipformerStack
from harken.encoders.base import Encoded, Encoder
from harken.nn.chunks import Past
from harken.nn.dropout import Dropout
from harken.nn.limits import Regime
from harken.nn.scheduled import Clock

_CHANNEL_MASK_SHARE = 0.125


@dataclass(frozen=True)
class StreamState:
    """What a stream of chunks leaves behind: by stack and block, and whether a short chunk has ended it."""

    kept: tuple[tuple[dict[str, Tensor], ...], ...] = ()
    ended: bool = False


@dataclass(frozen=True)
class _Padding:
    """Of a batch: `padded` `(B, T)` and `lengths` `(B,)` on the device, None where nothing is padded."""

    padded: Tensor | None = None
    lengths: Tensor | None = None
    views: dict[int, View] = field(default_factory=dict)


@register("encoder", ZipformerConfig)
class Zipformer(Encoder):
    """Layer norm, projection and stacks of blocks; each stack takes the width it needs of the one before.

    A representation is as wide as the widest stack: each channel is of the last stack that has it. Hidden layers inside
    a stack are brought to the full rate and width as its result would be.
    """

    def __init__(self, config: ZipformerConfig, input_dim: int) -> None:
        super().__init__()
        self.config = config
        self.dims = config.per_stack("dims")
        self.dim = max(self.dims)
        self.num_layers = sum(config.per_stack("layers"))
        self.input_norm = nn.LayerNorm(input_dim) if config.input_norm else nn.Identity()
        self.project = nn.Linear(input_dim, self.dims[0]) if input_dim != self.dims[0] else nn.Identity()
        self.input_dropout = Dropout(config.input_dropout)
        self.stacks = nn.ModuleList(self._stacks(config))

    @staticmethod
    def _stacks(config: ZipformerConfig) -> Iterable[ZipformerStack]:
        clock = Clock(config.schedule_start, config.schedule_scale)
        regime = Regime(clock, config.random_skips, config.gradient_limits)
        dropout = regime.schedule((0.0, config.start_dropout), (20000.0, config.dropout))
        for index, factor in enumerate(config.downsampling):
            block = BlockConfig(
                dim=config.per_stack("dims")[index],
                ffn_dim=config.per_stack("ffn_dims")[index],
                heads=config.per_stack("heads")[index],
                kernel=config.per_stack("kernels")[index],
                query_dim=config.per_stack("query_dims")[index],
                value_dim=config.per_stack("value_dims")[index],
                position_head_dim=config.per_stack("position_head_dims")[index],
                position_dim=config.position_dim,
                causal=config.causal,
                constant_attention=config.constant_attention,
            )
            skips = layer_skips(config, index)
            yield ZipformerStack(block, factor, skips, config.position_dropout, regime, dropout)

    @property
    def embed_dim(self) -> int:
        """Width of the first stack."""
        return self.dims[0]

    def normalise(self, frames: Tensor) -> Tensor:
        """Give each of the frames `(B, T, F)` its norm, where there is one; see `Encoder`."""
        normal: Tensor = self.input_norm(frames)
        return normal

    def embed(self, frames: Tensor) -> Tensor:
        """Normalise and project frames `(B, T, F)` to `(B, T, embed_dim)`."""
        embedded: Tensor = self.input_dropout(self.project(self.normalise(frames)))
        return embedded

    def encode(self, frames: Tensor, lengths: Tensor, layers: Collection[int] = ()) -> Encoded:
        """Encode embedded frames `(B, T, embed_dim)`; see `Encoder`."""
        self.check_layers(layers)
        time = frames.shape[1]
        padding = self._padding(frames, lengths)
        chunk, left_chunks = self._draw_chunk()
        masks = self._channel_masks(frames) if self.training and self.config.random_skips else None
        hidden = {0: to_width(frames, self.dim)} if 0 in layers else {}
        outputs, penalties, first = list[Tensor](), list[Tensor](), 0
        last = None if padding.lengths is None else (padding.lengths - 1).clamp(min=0)
        x = frames
        for index, stack in enumerate(cast(Sequence[ZipformerStack], self.stacks)):
            view = self._view(padding, stack.factor, time, chunk, left_chunks, frames.device)
            wanted = [layer - first for layer in layers if 0 < layer - first <= len(stack.blocks)]
            x, inner, penalty = stack(
                to_width(x, self.dims[index]),
                view,
                last,
                None if masks is None else masks[index],
                wanted,
                recompute=self.checkpoint_blocks and torch.is_grad_enabled(),
            )
            hidden.update({first + layer: widest([*outputs, value], self.dim) for layer, value in inner.items()})
            outputs.append(x)
            first += len(stack.blocks)
            penalties += [] if penalty is None else [penalty]
        total = torch.stack(penalties).sum() if penalties else None
        return Encoded(widest(outputs, self.dim), hidden, lengths, total)

    @torch.no_grad()
    def stream(self, frames: Tensor, state: StreamState = StreamState()) -> tuple[Tensor, StreamState]:
        """Encode the next chunk of a stream; return `(B, T, D)` and what the next call needs.

        frames: embedded, `(B, T, embed_dim)`; T is `eval_chunk_frames`, or less at the end. The results of all chunks
        are those of `encode` for the whole. Raises HarkenError for other chunks, and for an encoder that is not causal.
        """
        chunk, left_chunks = self._eval_chunk()
        if not chunk:
            raise HarkenError(
                "`encoder.eval_chunk_frames` must be positive (and `encoder.causal` true) to stream, got 0"
            )
        if state.ended or not 0 < frames.shape[1] <= chunk:
            what = "after a shorter one, which ends a stream" if state.ended else f"of {frames.shape[1]} frames"
            raise HarkenError(f"a stream takes chunks of `encoder.eval_chunk_frames` {chunk} frames, got one {what}")
        outputs, kept = list[Tensor](), list[tuple[dict[str, Tensor], ...]]()
        x = frames
        for index, stack in enumerate(cast(Sequence[ZipformerStack], self.stacks)):
            before = state.kept[index] if state.kept else tuple({} for _ in stack.blocks)
            left = left_chunks * chunk // stack.factor if left_chunks else None
            pasts = [Past(block, left) for block in before]
            x = stack.stream(to_width(x, self.dims[index]), View(chunk=chunk // stack.factor), pasts)
            outputs.append(x)
            kept.append(tuple(past.next for past in pasts))
        return widest(outputs, self.dim), StreamState(tuple(kept), frames.shape[1] < chunk)

    def repeated(self) -> Sequence[nn.Module]:
        """Return the blocks of all stacks; see `Encoder`."""
        return tuple(block for stack in cast(Sequence[ZipformerStack], self.stacks) for block in stack.blocks)

    def depth(self, parameter: str) -> int:
        """Return a parameter's block; downsampling counts with a stack's first, the bypass around it with its last."""
        if not parameter.startswith("stacks."):
            return 0
        parts = parameter.split(".")
        layers = self.config.per_stack("layers")
        first, own = sum(layers[: int(parts[1])]), layers[int(parts[1])]
        return (
            first
            + {"blocks": int(parts[3]) + 1 if parts[2] == "blocks" else 0, "downsample": 1, "combine": own}[parts[2]]
        )

    def flops(self, frames: int) -> float:
        """Count the projection and the blocks, each at its stack's rate; see `Encoder`."""
        total = 2.0 * frames * (self.project.weight.numel() if isinstance(self.project, nn.Linear) else 0)
        for stack in cast(Sequence[ZipformerStack], self.stacks):
            total += len(stack.blocks) * stack.config.flops(-(-frames // stack.factor))
        return total

    def _padding(self, frames: Tensor, lengths: Tensor) -> _Padding:
        padded = None if self.config.attend_to_padding else padding_mask(lengths, frames.shape[1])
        if padded is None:
            return _Padding()
        return _Padding(padded.to(frames.device, non_blocking=True), lengths.to(frames.device, non_blocking=True))

    def _eval_chunk(self) -> tuple[int, int]:
        return chunks_of(self.config.eval_chunk_frames, self.config.eval_left_frames)

    def _draw_chunk(self) -> tuple[int, int]:
        """Return frames of a chunk (0: no chunks) and chunks of left context (0: all), drawn for this micro-batch."""
        own = self.config
        if not self.training:
            return self._eval_chunk()
        chunk, left = (int(torch.randint(len(sizes), ())) for sizes in (own.chunk_frames, own.left_frames))
        return chunks_of(own.chunk_frames[chunk], own.left_frames[left])

    def _view(
        self, padding: _Padding, factor: int, time: int, chunk: int, left_chunks: int, device: torch.device
    ) -> View:
        """Return what a stack's frames see, made once for stacks of one rate."""
        if factor in padding.views:
            return padding.views[factor]
        blocked, padded, lengths = None, None, None
        if padding.padded is not None and padding.lengths is not None:
            padded = padding.padded[:, ::factor]
            lengths = (padding.lengths + factor - 1) // factor
            blocked = padded[:, None, None]
        if chunk:
            number = torch.arange(-(-time // factor), device=device) // (chunk // factor)
            ahead = number[None] - number[:, None]
            hidden = (ahead > 0) | (ahead < -left_chunks) if left_chunks else ahead > 0
            blocked = hidden if blocked is None else blocked | hidden
        padding.views[factor] = View(blocked, padded, lengths, chunk // factor)
        return padding.views[factor]

    def _channel_masks(self, frames: Tensor) -> list[Tensor]:
        """Draw a mask `(B, 1, D)` of 0 and 1 for each stack: all channels, or those below one of two bounds.

        All stacks mask the same sequences. Source: icefall's `get_feature_masks`.
        """
        kept = torch.rand(2, frames.shape[0], 1, 1, device=frames.device) >= _CHANNEL_MASK_SHARE
        lower, upper = kept[0], kept[0] & kept[1]
        masks = []
        for dim, unmasked in zip(self.dims, self.config.per_stack("unmasked_dims"), strict=True):
            channel = torch.arange(dim, device=frames.device)
            middle = unmasked + (dim - unmasked) // 2
            mask = (channel < unmasked) | (lower & (channel < middle)) | upper
            masks.append(mask.to(frames.dtype))
        return masks


def layer_skips(config: ZipformerConfig, stack: int) -> list[tuple[tuple[float, float], ...]]:
    """Return for each block of a stack the points of the schedule by which sequences pass it over.

    The blocks come in one after the other, the frontend first; at the end slow stacks are passed over more often.
    Source: icefall's `Zipformer2Encoder`.
    """
    number, count = config.per_stack("layers")[stack], len(config.downsampling)
    slot = config.warmup_steps / (count + 1)
    final = 0.035 * config.downsampling[stack] ** 0.5
    times = [slot * (stack + 1 + block / number) for block in range(number + 1)]
    if not config.warmup_steps:
        return [((0.0, final),)] * number
    return [((begin, 0.5), (end, final)) for begin, end in pairwise(times)]


def chunks_of(chunk: int, left: int) -> tuple[int, int]:
    """Return frames of a chunk and chunks of left context, at least one; 0 stands for no chunks and for all."""
    return (chunk, max(1, left // chunk) if left else 0) if chunk else (0, 0)


def to_width(x: Tensor, dim: int) -> Tensor:
    """Return the first `dim` channels of `(B, T, C)`, zeros where there are fewer."""
    return x[..., :dim] if dim <= x.shape[-1] else functional.pad(x, (0, dim - x.shape[-1]))


def widest(outputs: Sequence[Tensor], dim: int) -> Tensor:
    """Return `(B, T, dim)`, each channel of the last of `outputs` that has it; zeros where none has."""
    pieces, width = [outputs[-1]], outputs[-1].shape[-1]
    for output in reversed(outputs[:-1]):
        if output.shape[-1] > width:
            pieces.append(output[..., width:])
            width = output.shape[-1]
    return to_width(torch.cat(pieces, -1) if len(pieces) > 1 else pieces[0], dim)
