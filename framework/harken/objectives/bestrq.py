"""BEST-RQ: masked prediction of what a random-projection quantiser makes of the clean input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.data.masking import SpanMask
from harken.encoders.backbone import Backbone
from harken.frontends.base import InputNoise
from harken.objectives.base import Objective
from harken.units.random_codes import RandomCodes
from harken.units.random_projection import codebook_use


@dataclass(frozen=True, kw_only=True)
class BestrqConfig(SlotConfig):
    """Defaults are the paper's, for frames of 40 ms (arXiv 2202.01855 section 4)."""

    codes: int = 8192
    """Codes of each codebook. The paper's vocabulary size."""
    code_dim: int = 16
    """Width in which frames and codes are compared. The paper's codebook dimension."""
    codebooks: int = 1
    """Codebooks, each with a projection and an output layer of its own; 16 in USM (arXiv 2303.01037)."""
    bands: int = 80
    """Log-mel bands of what is quantised, whatever the frontend."""
    mask_probability: float = 0.4
    """Share of frames that spans would cover if they did not overlap: the paper starts one at 1 % of frames of 10 ms,
    and each has 40 of these."""
    mask_length: int = 10
    """Frames of a span; 10 of 40 ms are the paper's 400 ms."""
    mask_noise: float = 0.1
    """Standard deviation of the noise that replaces masked input, whose own is 1 after normalisation."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=("codes", "code_dim", "codebooks", "bands", "mask_length"),
            not_negative=("mask_noise",),
            shares=("mask_probability",),
        )


@dataclass(frozen=True)
class BestrqPrepare:
    """Draws the masks and the keys of the noise."""

    spec: FrameSpec
    mask: SpanMask

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `mask` `(B, T)`, `noise_keys` `(B,)`, and `masked`, `real`: positions of frames in the flat `(B * T)`."""
        masked, lengths = self.mask.draw_rows(batch, draws, self.spec)
        pairs = zip(batch.ids, draws, strict=True)
        keys = [int(own.generator("mask noise", cut).integers(2**63)) for cut, own in pairs]
        targets = {
            "mask": torch.from_numpy(masked),
            "noise_keys": torch.tensor(keys, dtype=torch.int64),
            "masked": torch.from_numpy(np.flatnonzero(masked)),
            "real": torch.from_numpy(np.flatnonzero(np.arange(masked.shape[1])[None, :] < lengths[:, None])),
        }
        return replace(batch, targets={**batch.targets, **targets}, num_targets=float(masked.sum()))


@register("objective", BestrqConfig)
class Bestrq(Objective):
    """Replaces spans of the input by noise and predicts their codes.

    What the quantiser sees (`RandomCodes`) is just what the noise replaces in a filterbank. Of several codebooks the
    mean is the loss.
    Source: arXiv 2202.01855 section 3.
    """

    uses_mask_embedding: ClassVar[bool] = False

    def __init__(self, config: BestrqConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.quantiser = RandomCodes(
            backbone.spec,
            bands=config.bands,
            code_dim=config.code_dim,
            codes=config.codes,
            codebooks=config.codebooks,
            seed=run.seed,
        )
        self.head = nn.Linear(backbone.dim, config.codebooks * config.codes)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> BestrqPrepare:
        """Return the drawer of masks; they are drawn in validation too, as the loss is over masked frames."""
        own = cast(BestrqConfig, config.objective)
        return BestrqPrepare(spec, SpanMask(probability=own.mask_probability, length=own.mask_length))

    def forward(self, batch: Batch) -> Loss:
        """Return the cross entropy, a mean over codebooks, summed over masked frames."""
        own, masked = self.config, batch.targets["masked"]
        noise = InputNoise(batch.targets["mask"], batch.targets["noise_keys"], own.mask_noise)
        _, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {}, noise)
        encoded = self.backbone.encoder.encode(x, lengths)
        codes = self.quantiser.of_audio(batch.inputs, batch.lengths, x.shape[1]).flatten(0, 1)
        logits = self.head(encoded.last.flatten(0, 1)[masked]).float().unflatten(-1, (own.codebooks, own.codes))
        loss = functional.cross_entropy(logits.flatten(0, 1), codes[masked].flatten(), reduction="sum") / own.codebooks
        guesses = logits.detach().argmax(-1)
        hits = (guesses == codes[masked]).sum().float()
        use, perplexity = codebook_use(codes[batch.targets["real"]], own.codes)
        _, guessed = codebook_use(guesses, own.codes)
        count, frames = loss.new_full((), batch.num_targets), loss.new_full((), float(len(batch.targets["real"])))
        metrics = {
            "loss": (loss.detach(), count),
            "accuracy_masked": (hits, count * own.codebooks),
            "prediction_perplexity": (guessed * count, count),
            "codebook_use": (use * frames, frames),
            "codebook_perplexity": (perplexity * frames, frames),
        }
        # noise masks here, not the backbone's embedding, which fine-tuning uses
        return Loss(total=encoded.penalised(loss + self.backbone.unused_mask()), metrics=metrics)

    def head_flops(self, frames: int) -> float:
        """Count output layers over the expected masked frames, and a third of the targets: they have no backward."""
        own = self.config
        share = SpanMask(probability=own.mask_probability, length=own.mask_length).expected_share
        head = share * own.codebooks * own.codes * self.backbone.dim
        return 2.0 * frames * head + self.quantiser.flops(frames) / 3
