"""BEATs: masked prediction of the codes of patches, of which the encoder sees the visible ones alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.data.block_mask import BlockMask
from harken.data.check import Cuts, Doubt
from harken.encoders.backbone import Backbone
from harken.encoders.token_decoder import DecoderConfig, TokenDecoder
from harken.objectives.base import Objective
from harken.units.alignment import UnitReader, open_units, units_fingerprint
from harken.units.random_codes import RandomCodes
from harken.units.random_projection import codebook_use


@dataclass(frozen=True, kw_only=True)
class BeatsConfig(DecoderConfig):
    """Defaults are the paper's (arXiv 2212.09058) and ESPnet's of the label predictor (`decoder_*`)."""

    targets: Literal["random_projection", "labels"] = "random_projection"
    """Codes of a random projection of each patch, made on the way (iteration 1, section 3.2.1), or those of
    `data.labels`, made by a tokenizer (the next iterations)."""
    classes: int = 1024
    """Codes; with `targets: labels` they must equal the K of `data.labels`. Section 4.2."""
    code_dim: int = 256
    """Width in which patches and random codes are compared. Section 4.2."""
    bands: int = 128
    """Log-mel bands of what is projected at random, whatever the frontend. Section 4.2."""
    mask_probability: float = 0.75
    """Share of the patches that are masked. Section 3.3.2; ESPnet `mask_ratio`."""
    mask_length: int = 1
    """Side of a masked block of the grid, in patches; 1 masks single patches, as published."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "objective", positive=("classes", "code_dim", "bands", "mask_length"))
        self.mask()

    def mask(self) -> BlockMask:
        """Return what draws masks."""
        return BlockMask(probability=self.mask_probability, length=self.mask_length)


@dataclass(frozen=True)
class BeatsPrepare:
    """Draws the masks and reads the labels, where there are any."""

    spec: FrameSpec
    mask: BlockMask
    rows: int
    units: UnitReader | None

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `mask` `(B, N)`, `visible` `(B, V)`, `masked` (`BlockMask.draw_rows`), `real`: positions of tokens in the
        flat `(B * N)`, and, from stores, `labels` `(B, N)`.
        """
        drawn = self.mask.draw_rows(batch, draws, self.spec, rows=self.rows)
        mask, visible = drawn["mask"][:, 0], drawn["visible"][:, 0]
        counts = self.rows * self.spec.num_frames(batch.lengths).numpy()
        real = np.flatnonzero(np.arange(mask.shape[1])[None] < counts[:, None])
        added = {"mask": mask, "visible": visible, "masked": drawn["masked"], "real": real}
        if self.units is not None:
            added["labels"] = self.units.read(batch, mask.shape[1] // self.rows)[..., 0]
        targets = {**batch.targets, **{name: torch.from_numpy(value) for name, value in added.items()}}
        return replace(batch, targets=targets, num_targets=float(len(drawn["masked"])))

    def check(self, cuts: Cuts) -> Iterator[Doubt]:
        """Yield what is wrong with the labels of cuts."""
        if self.units is not None:
            yield from self.units.check(cuts)


@register("objective", BeatsConfig)
class Beats(Objective):
    """Predicts the codes of masked tokens: those of patches, or, of an encoder of one row, of frames.

    The encoder sees the visible tokens. A decoder, the label predictor, gets what comes out in their places and zeros
    in the places of the masked ones, and is discarded afterwards.
    Source: arXiv 2212.09058 section 3.3.2 and equation 4; ESPnet's `espnet2/beats`, the original's training code being
    unpublished. There the visible tokens close ranks before positions are computed; here each keeps its own.
    """

    uses_mask_embedding: ClassVar[bool] = False

    def __init__(self, config: BeatsConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.rows = backbone.encoder.rows
        self.quantiser: RandomCodes | None = None
        if config.targets == "random_projection":
            self.quantiser = RandomCodes(
                backbone.spec,
                bands=config.bands,
                code_dim=config.code_dim,
                codes=config.classes,
                codebooks=1,
                seed=run.seed,
                rows=self.rows,
            )
        self.decoder = TokenDecoder(config, backbone.dim // self.rows, config.classes)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> BeatsPrepare:
        """Return the mask and label reader; masks are drawn in validation too, as the loss is over masked tokens."""
        own, rows = cast(BeatsConfig, config.objective), int(getattr(config.encoder, "rows", 1))
        units = None
        if own.targets == "labels":
            units = open_units(config.data, spec, (own.classes,), train=train, rows=rows)
        return BeatsPrepare(spec, own.mask(), rows, units)

    @staticmethod
    def fingerprint(config: RunConfig) -> dict[str, str]:
        """Return what the labels are made of; random codes follow from the seed and are in every checkpoint."""
        own = cast(BeatsConfig, config.objective)
        return units_fingerprint(config.data) if own.targets == "labels" else {}

    def forward(self, batch: Batch) -> Loss:
        """Return the cross entropy summed over masked tokens."""
        mask, masked, real = (batch.targets[name] for name in ("mask", "masked", "real"))
        _, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {})
        encoded = self.backbone.encoder.encode_visible(x, lengths, mask, batch.targets["visible"])
        tokens = encoded.last.reshape(*mask.shape, -1).masked_fill(mask[..., None], 0.0)
        logits = self.decoder(tokens, lengths * self.rows).flatten(0, 1)[masked].float()
        labels = self._labels(batch, x.shape[1])
        loss = functional.cross_entropy(logits, labels[masked], reduction="sum")
        guesses = logits.detach().argmax(-1)
        hits = (guesses == labels[masked]).sum().float()
        use, perplexity = codebook_use(labels[real][:, None], self.config.classes)
        _, guessed = codebook_use(guesses[:, None], self.config.classes)
        count, seen = loss.new_full((), batch.num_targets), loss.new_full((), float(len(real)))
        name = "label" if self.quantiser is None else "codebook"
        metrics = {
            "loss": (loss.detach(), count),
            "accuracy_masked": (hits, count),
            "prediction_perplexity": (guessed * count, count),
            f"{name}_use": (use * seen, seen),
            f"{name}_perplexity": (perplexity * seen, seen),
        }
        # masked tokens are left out, so nothing stands for them
        return Loss(total=encoded.penalised(loss + self.backbone.unused_mask()), metrics=metrics)

    def _labels(self, batch: Batch, frames: int) -> Tensor:
        """Return the labels `(B * N,)`, int64; those of padding mean nothing."""
        if self.quantiser is None:
            return batch.targets["labels"].flatten().long()
        return self.quantiser.of_audio(batch.inputs, batch.lengths, frames).flatten()

    def head_flops(self, frames: int) -> float:
        """Count the decoder, less what the encoder leaves out, and a third of random codes: they have no backward."""
        encoder = self.backbone.encoder
        student = encoder.visible_flops(frames, 1.0 - self.config.mask_probability) - encoder.visible_flops(frames, 1.0)
        targets = 0.0 if self.quantiser is None else self.quantiser.flops(frames) / 3.0
        return student + self.decoder.flops(frames * self.rows) + targets
