"""Teachers, whose outputs a student learns to predict: a slow copy of its encoder, or a saved model."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from harken.core.errors import HarkenError
from harken.encoders.base import Encoder
from harken.encoders.saved import load_backbone
from harken.nn.masked import normalise_over_time

Kind = Literal["auto", "feed_forward", "block"]


class Teacher(nn.Module):
    """An exponential moving average of an encoder, always in evaluation mode.

    Its weights are buffers, so that no optimiser sees them and every checkpoint holds them. What lies before the blocks
    is the student's own, as in fairseq with `ema_layers_only`: averaging it makes no better targets.
    Source: arXiv 2202.03555 section 3.3; fairseq's `EMAModule`.
    """

    def __init__(self, encoder: Encoder, top: int, kind: Kind) -> None:
        """Copy an encoder. top: how many of the last blocks. kind: their feed-forwards' outputs, or theirs.

        Raises HarkenError when the encoder has fewer blocks, or no feed-forwards where these are asked for.
        """
        super().__init__()
        if not 1 <= top <= encoder.num_layers:
            raise HarkenError(f"`objective.top_layers` must lie in 1..{encoder.num_layers}, the encoder's, got {top}")
        branches = len(encoder.feed_forwards())
        if kind == "feed_forward" and not branches:
            raise HarkenError(
                "`objective.targets: feed_forward` needs blocks of one rate and width with a feed-forward each, which "
                "this encoder has not: use `block`, the outputs of its blocks"
            )
        self.top = top
        self.branches = bool(branches) and kind != "block"
        self.encoder = deepcopy(encoder)
        self.encoder.checkpoint_blocks = False
        _weights_to_buffers(self.encoder)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:  # noqa: FBT001, FBT002  torch's signature
        """Stay in evaluation mode: a teacher drops nothing."""
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """Return targets `(B, T, D)` of a frontend's unmasked frames `(B, T, F)`: the mean of the top blocks' outputs.

        Each is normalised over the real tokens of its utterance (instance norm). An output is that of the feed-forward
        before the residual connection, or of the whole block.
        """
        x = self.encoder.embed(frames)
        batch, time, rows = len(frames), frames.shape[1], self.encoder.rows
        padded = None if bool((lengths >= time).all()) else lengths * rows
        outputs = self._feed_forwards(x, lengths) if self.branches else self._blocks(x, lengths)
        tokens = [output.float().reshape(batch, time * rows, -1) for output in outputs]
        return torch.stack([normalise_over_time(x, padded) for x in tokens]).mean(0).view(batch, time, -1)

    def _blocks(self, x: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        last = self.encoder.num_layers
        hidden = self.encoder.encode(x, lengths, range(last - self.top + 1, last + 1)).hidden
        return list(hidden.values())

    def _feed_forwards(self, x: Tensor, lengths: Tensor) -> Sequence[Tensor]:
        outputs: list[Tensor] = []

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output)

        hooks = [part.register_forward_hook(keep) for part in self.encoder.feed_forwards()[-self.top :]]
        try:
            self.encoder.encode(x, lengths)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    @torch.no_grad()
    def update(self, student: Encoder, decay: float) -> None:
        """Set each weight to `decay * weight + (1 - decay) * student's`; every rank does the same."""
        own = dict(self.encoder.named_buffers())
        slow, fast = list[Tensor](), list[Tensor]()
        for name, value in (*student.named_parameters(), *student.named_buffers()):
            if isinstance(value, nn.Parameter) and student.depth(name) > 0:
                slow.append(own[name])
                fast.append(value.detach())
            else:
                own[name].copy_(value)
        torch._foreach_lerp_(slow, fast, 1.0 - decay)


class FrozenTeacher(nn.Module):
    """The backbone of a saved model, always in evaluation mode.

    Its weights are buffers, so that no optimiser sees them, and in no checkpoint: they are read from the model again.
    """

    def __init__(self, path: str | Path) -> None:
        """Load a model; raises HarkenError when there is none, or it is damaged."""
        super().__init__()
        self.backbone, _ = load_backbone(path)
        self.backbone.encoder.checkpoint_blocks = False
        _weights_to_buffers(self.backbone, persistent=False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenTeacher:  # noqa: FBT001, FBT002  torch's signature
        """Stay in evaluation mode."""
        return super().train(mode=False)

    @torch.no_grad()
    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        """Return the last block's output `(B, T, D)` for samples `(B, S)`; lengths: `(B,)` samples, on the CPU."""
        last: Tensor = self.backbone(inputs, lengths).last
        return last

    def flops(self, samples: int) -> float:
        """Return the operations of a pass over `samples`, a multiply-add counted as two."""
        own = self.backbone
        return own.frontend.flops(samples) + own.encoder.flops(own.spec.num_frames(samples))


def _weights_to_buffers(module: nn.Module, *, persistent: bool = True) -> None:
    """Make parameters buffers; persistent: whether a state dict holds all buffers, or none of them."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach().clone())
        if not persistent:
            for name, buffer in list(part.named_buffers(recurse=False)):
                part.register_buffer(name, buffer, persistent=False)
