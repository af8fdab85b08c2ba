"""data2vec 2.0 and EAT: several masked clones predict one pass of the teacher; masked tokens are not encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, padding_mask, real_mask
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.data.block_mask import BlockMask
from harken.nn.dropout import Dropout
from harken.nn.noise import normal_of
from harken.objectives.data2vec import Data2vec, Data2vecConfig


@dataclass(frozen=True, kw_only=True)
class Data2vec2Config(Data2vecConfig):
    """Defaults are data2vec 2.0 Base's for speech (arXiv 2212.07525; fairseq `v2/base_audio_only_task.yaml`)."""

    mask_probability: float = 0.5
    """Share of the tokens that is masked. fairseq `mask_prob`."""
    mask_length: int = 5
    """Side of a block, in tokens. fairseq `mask_length`."""
    mask_adjust: float = 0.05
    """More share to draw blocks for, as they overlap. fairseq `mask_prob_adjust`."""
    inverse_mask: bool = False
    """Draw blocks that stay visible, not blocks that are masked. fairseq `inverse_mask`; EAT's masks."""
    clones: int = 8
    """Masked copies of an utterance for each pass of the teacher. The paper's M; fairseq `clone_batch`."""
    normalize_targets: bool = False
    """Layer norm of the averaged targets. fairseq `layer_norm_targets`; EAT has it."""
    decoder_dim: int = 384
    """Width of the decoder. fairseq `decoder_dim`."""
    decoder_layers: int = 4
    """Convolutions of the decoder. fairseq `decoder_layers`."""
    decoder_kernel: int = 7
    """Tokens that one of them covers, odd; of a grid, in both directions. fairseq `decoder_kernel`."""
    decoder_groups: int = 16
    """Groups of a convolution. fairseq `decoder_groups`."""
    decoder_dropout: float = 0.1
    """Of what the encoder gives the decoder. fairseq `decoder.input_dropout`."""
    decoder_noise: float = 0.01
    """Deviation of the noise that stands for masked tokens in the decoder. fairseq `mask_noise_std`."""
    utterance_weight: float = 0.0
    """Weight of the error at an extra token, which predicts the mean of the utterance's targets. EAT's lambda, 1;
    fairseq `cls_loss`. Needs an encoder of the Transformer family."""
    ema_end: float = 0.99999
    """fairseq `ema_end_decay`."""
    ema_steps: int = 75000
    """fairseq `ema_anneal_end_step`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            "objective",
            positive=("clones", "decoder_dim", "decoder_layers", "decoder_kernel", "decoder_groups"),
            not_negative=("mask_adjust", "decoder_noise", "utterance_weight"),
            shares=("decoder_dropout",),
        )
        if self.decoder_kernel % 2 == 0 or self.decoder_dim % self.decoder_groups:
            raise HarkenError(
                "`objective.decoder_kernel` must be odd and `objective.decoder_groups` divide `objective.decoder_dim`, "
                f"got {self.decoder_kernel}, {self.decoder_groups} and {self.decoder_dim}"
            )

    def mask(self) -> BlockMask:
        """Return what draws masks."""
        return BlockMask(
            probability=self.mask_probability,
            length=self.mask_length,
            adjust=self.mask_adjust,
            inverse=self.inverse_mask,
        )


@dataclass(frozen=True)
class Data2vec2Prepare:
    """Draws the masks of all clones."""

    spec: FrameSpec
    mask: BlockMask
    clones: int
    rows: int

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `mask`, `visible`, `masked` (`BlockMask.draw_rows`) and `noise_keys` `(B, M)`: the decoder's noise."""
        added = self.mask.draw_rows(batch, draws, self.spec, rows=self.rows, clones=self.clones)
        pairs = zip(batch.ids, draws, strict=True)
        keys = [own.generator("decoder noise", cut).integers(2**62, size=self.clones) for cut, own in pairs]
        added["noise_keys"] = np.asarray(keys, dtype=np.int64).reshape(len(keys), self.clones)
        targets = {**batch.targets, **{name: torch.from_numpy(value) for name, value in added.items()}}
        return replace(batch, targets=targets, num_targets=float(len(added["masked"])))


class GridDecoder(nn.Module):
    """Convolutions over a grid of times and rows, layer norm without weights and GELU after each, with residuals.

    Source: arXiv 2212.07525 section 3.2; fairseq's `Decoder1d` and, over grids, `Decoder2d`.
    """

    def __init__(self, config: Data2vec2Config, dim: int, rows: int) -> None:
        super().__init__()
        self.rows = rows
        kernel = (config.decoder_kernel, config.decoder_kernel if rows > 1 else 1)
        self.layers = nn.ModuleList(
            nn.Conv2d(
                config.decoder_dim if layer else dim,
                config.decoder_dim,
                kernel,
                padding=(kernel[0] // 2, kernel[1] // 2),
                groups=config.decoder_groups,
            )
            for layer in range(config.decoder_layers)
        )
        self.project = nn.Linear(config.decoder_dim, dim)

    def forward(self, x: Tensor, padded: Tensor | None) -> Tensor:
        """Map tokens `(B, T * rows, D)` to predictions `(B, T * rows, D)`; `padded` ones reach no other."""
        for layer in self.layers:
            if padded is not None:
                x = x.masked_fill(padded[..., None], 0.0)
            grid = x.unflatten(1, (-1, self.rows)).permute(0, 3, 1, 2)
            y = layer(grid).permute(0, 2, 3, 1).flatten(1, 2)
            y = functional.gelu(functional.layer_norm(y, y.shape[-1:]))
            x = x + y if x.shape == y.shape else y
        predicted: Tensor = self.project(x)
        return predicted

    def flops(self, tokens: int) -> float:
        """Count convolutions and projection."""
        return 2.0 * tokens * sum(parameter.numel() for parameter in self.parameters() if parameter.dim() > 1)


@register("objective", Data2vec2Config)
class Data2vec2(Data2vec):
    """Regression of the teacher's targets at the masked tokens of several clones.

    The encoder sees visible tokens alone; noise takes the place of the others before the decoder. The teacher is
    data2vec's: the moving average of the blocks. Source: arXiv 2212.07525; fairseq's `data2vec_multi`. EAT (arXiv
    2401.03497) is this over patches, with inverse block masks of the grid and a loss of the utterance.
    """

    uses_mask_embedding: ClassVar[bool] = False

    config: Data2vec2Config

    def head(self, run: RunConfig) -> int:
        """Make the decoder; return the width of a token."""
        rows = self.backbone.encoder.rows
        width = self.backbone.dim // rows
        if width % self.config.decoder_groups:
            raise HarkenError(
                "`objective.decoder_groups` must divide the width of the encoder's tokens, "
                f"got {self.config.decoder_groups} and {width}"
            )
        self.decoder = GridDecoder(self.config, width, rows)
        self.dropout = Dropout(self.config.decoder_dropout)
        # EAT's `init_extra_token_zero: false`
        self.utterance = nn.Parameter(torch.randn(width)) if self.config.utterance_weight else None
        return width

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> Data2vec2Prepare:
        """Return what draws masks; in validation too, as the loss is over masked tokens."""
        own = cast(Data2vec2Config, config.objective)
        return Data2vec2Prepare(spec, own.mask(), own.clones, getattr(config.encoder, "rows", 1))

    def forward(self, batch: Batch) -> Loss:
        """Return the error summed over channels, times the scale, summed over the masked tokens of all clones."""
        clones, masked = self.config.clones, batch.targets["masked"]
        mask, visible = batch.targets["mask"].flatten(0, 1), batch.targets["visible"].flatten(0, 1)
        frames, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {})
        encoder = self.backbone.encoder
        repeated = lengths.repeat_interleave(clones)
        encoded = encoder.encode_visible(x.repeat_interleave(clones, 0), repeated, mask, visible, self.utterance)
        tokens = self.dropout(encoded.last.reshape(*mask.shape, -1))
        noise = normal_of(batch.targets["noise_keys"].flatten(), tokens[0].numel()).view_as(tokens)
        tokens = torch.where(mask[..., None], (self.config.decoder_noise * noise).to(tokens.dtype), tokens)
        padded = padding_mask(repeated * encoder.rows, mask.shape[1])
        if padded is not None:
            padded = padded.to(tokens.device, non_blocking=True)
        predicted = self.decoder(tokens, padded).flatten(0, 1)[masked].float()
        targets = self.teacher(frames.detach(), lengths).reshape(len(lengths), mask.shape[1], -1)
        if self.config.normalize_targets:
            targets = functional.layer_norm(targets, targets.shape[-1:])
        target = targets.repeat_interleave(clones, 0).flatten(0, 1)[masked]
        total = self.errors(predicted, target).sum()
        metrics = self.figures(total, predicted, target, batch)
        if encoded.summary is not None:
            error = self._utterance_error(encoded.summary.float(), targets, lengths, mask)
            metrics["utterance_loss"] = (error.detach(), metrics["loss"][1])
            total = total + self.config.utterance_weight * error
        # masked tokens are left out, so nothing stands for them
        return Loss(total=encoded.penalised(total) + self.backbone.unused_mask(), metrics=metrics)

    def _utterance_error(self, predicted: Tensor, targets: Tensor, lengths: Tensor, mask: Tensor) -> Tensor:
        """Return the error of each clone's prediction `(B * M, D)` times its masked tokens, summed.

        So it weighs as much as the other term whatever the batch; the original's grows with the batch.
        """
        counts = (lengths * self.backbone.encoder.rows).to(targets.device, non_blocking=True)
        real = real_mask(counts, targets.shape[1])
        mean = (targets * real[..., None]).sum(1) / counts.clamp(min=1)[:, None]
        return (self.errors(predicted, mean.repeat_interleave(self.config.clones, 0)) * mask.sum(1)).sum()

    def head_flops(self, frames: int) -> float:
        """Count decoder and clones beside the one pass that is counted, and the teacher, without a backward pass."""
        encoder, clones = self.backbone.encoder, self.config.clones
        student = clones * encoder.visible_flops(frames, 1.0 - self.config.mask_probability)
        counted = encoder.visible_flops(frames, 1.0)
        return student - counted + encoder.flops(frames) / 3.0 + clones * self.decoder.flops(frames * encoder.rows)
