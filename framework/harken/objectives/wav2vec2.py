"""wav2vec 2.0: telling the quantised frame under a mask from those under the utterance's other masks.

With its views and its projections switched on it is wav2vec-Aug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import nn

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, real_mask
from harken.core.draws import Draws
from harken.core.frames import FrameSpec
from harken.core.loss import Loss, Metrics
from harken.data.masking import SpanMask
from harken.data.views import Views
from harken.encoders.backbone import Backbone
from harken.nn.dropout import Dropout
from harken.nn.masked import summed_mean_squares
from harken.objectives._contrast import (
    CodebookConfig,
    ViewsConfig,
    contrast_logits,
    draw_negatives,
    masked_places,
    pick,
    views_of,
)
from harken.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class Wav2vec2Config(CodebookConfig, ViewsConfig):
    """Defaults are wav2vec 2.0 Base's (arXiv 2006.11477; fairseq `wav2vec2_base_librispeech.yaml`)."""

    mask_probability: float = 0.65
    """fairseq `mask_prob`: the paper's 6.5 % of frames that begin a mask, times its length."""
    mask_length: int = 10
    """fairseq `mask_length`, in frames."""
    negatives: int = 100
    """Distractors of a masked frame, other masked frames of its utterance. The paper's K; fairseq `num_negatives`."""
    quantizer_dim: int = 0
    """Width of a quantised frame, all groups together; they divide it. 0 is `code_dim`. fairseq `latent_dim`."""
    code_dim: int = 256
    """Width in which frames and targets are compared. fairseq `final_dim`; 256 in Base, 768 in Large."""
    temperature: float = 0.1
    """Of the comparison. The paper's kappa; fairseq `logit_temp`."""
    feature_dropout: float = 0.1
    """Of the frames that are quantised. fairseq `dropout_features`; 0.1 in Base, 0 in Large."""
    penalty_weight: float = 10.0
    """Weight of the mean square of the frontend's output. fairseq `loss_weights`, its second number; 10 in Base, 0 in
    Large."""
    views: Literal["none", "context", "both"] = "none"
    """Whether, in training, the masked context is made of another view of the audio than the targets: the targets' is
    the audio itself (`context`), or a second view (`both`). wav2vec-Aug (arXiv 2206.13654) augments its pretraining
    data; that the past alone is best augmented was found for CPC (arXiv 2007.00991)."""
    projection: Literal["linear", "mlp"] = "linear"
    """How frames and targets come to the width of the comparison. `mlp`: two layers with a layer norm and GELU between,
    a form of harken's: wav2vec-Aug's own projections were not looked up."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=("mask_probability", "mask_length", "negatives", "code_dim", "temperature"),
            not_negative=("quantizer_dim", "penalty_weight"),
            shares=("mask_probability", "feature_dropout"),
        )
        self.check_codebooks("quantizer_dim" if self.quantizer_dim else "code_dim", self.target_dim)
        self.check_views()

    @property
    def target_dim(self) -> int:
        """Width of a quantised frame."""
        return self.quantizer_dim or self.code_dim


@dataclass(frozen=True)
class Wav2vec2Prepare:
    """Draws the masks, the negatives and the views.

    views: None for none. second: whether the targets have one of their own.
    """

    spec: FrameSpec
    mask: SpanMask
    negatives: int
    views: Views | None = None
    second: bool = False

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `mask` `(B, T)`, `counts` `(B,)` of masked frames, `masked` `(B, M)`, `negatives` `(B, M, K)`.

        `masked` holds the places of a row's masked frames, 0 behind its count; `negatives` points into it. A row with
        a single masked frame has nothing to tell it from, and is not masked. Where there are views, `view` `(B, S)` is
        what the context is made of, and `target_view`, if any, what the targets are.
        """
        mask, _ = self.mask.draw_rows(batch, draws, self.spec)
        mask[mask.sum(1) < 2] = False
        counts, masked = masked_places(mask)
        negatives = draw_negatives(batch, draws, counts, self.negatives)
        arrays = {"mask": mask, "counts": counts, "masked": masked, "negatives": negatives}
        targets = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.views is not None:
            names = ("view", "target_view") if self.second else ("view",)
            targets |= {name: views_of(self.views, batch, draws, name) for name in names}
        return replace(batch, targets={**batch.targets, **targets}, num_targets=float(counts.sum()))


@register("objective", Wav2vec2Config)
class Wav2vec2(Objective):
    """Contrastive loss over masked frames, diversity of the codes, features penalty.

    Source: arXiv 2006.11477 equations 2 to 4; fairseq's `Wav2Vec2Model` and `wav2vec_criterion`, whose diversity loss
    is (G V - perplexity) / (G V) times the masked frames. Diversity and penalty are taken for each utterance, so that
    they do not depend on how utterances share batches; `diversity_over: batch` breaks that promise, as the original.
    """

    def __init__(self, config: Wav2vec2Config, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config, self.backbone = config, backbone
        self.mask = SpanMask(probability=config.mask_probability, length=config.mask_length)
        self.quantizer = config.quantizer(backbone.frontend.dim, config.target_dim)
        self.dropout = Dropout(config.feature_dropout)
        self.project = self._projection(backbone.dim)
        self.project_target = self._projection(config.target_dim)

    def _projection(self, dim: int) -> nn.Module:
        code_dim = self.config.code_dim
        if self.config.projection == "linear":
            return nn.Linear(dim, code_dim)
        return nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim), nn.GELU(), nn.Linear(dim, code_dim))

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> Wav2vec2Prepare:
        """Return what draws masks, negatives and views; in validation no views, but masks: the loss is over them."""
        own = cast(Wav2vec2Config, config.objective)
        mask = SpanMask(probability=own.mask_probability, length=own.mask_length)
        views = own.made(config.data.sample_rate) if train and own.views != "none" else None
        return Wav2vec2Prepare(spec, mask, own.negatives, views, own.views == "both")

    def forward(self, batch: Batch) -> Loss:
        """Return the contrastive loss summed over masked frames, with diversity and penalty for each of them."""
        own, targets = self.config, batch.targets
        masked, counts = targets["masked"], targets["counts"]
        real = real_mask(counts, masked.shape[1])
        seen = targets.get("view", batch.inputs)
        frames, x, lengths = self.backbone.embed(seen, batch.lengths, {"mask": targets["mask"]})
        encoded = self.backbone.encoder.encode(x, lengths)
        penalty = summed_mean_squares(frames, lengths, counts)
        if "view" in targets:
            frames, _ = self.backbone.frontend(targets.get("target_view", batch.inputs), batch.lengths)
        # the targets come from the frames before the masks
        quantised = self.quantizer(self.dropout(self.backbone.encoder.normalise(pick(frames, masked))))
        x, y = self.project(pick(encoded.last, masked)), self.project_target(quantised.vectors)
        logits = contrast_logits(x, y, quantised.codes, targets["negatives"], own.temperature)
        contrast = -(logits.log_softmax(-1)[..., 0] * real).sum()
        diversity, health = own.diversity(quantised, real, counts)
        total = contrast + own.diversity_weight * diversity + own.penalty_weight * penalty
        count = contrast.new_full((), batch.num_targets)
        hits = (logits[..., 0] > logits[..., 1:].amax(-1)) & real
        figures = {"loss": contrast, "accuracy": hits.sum().float(), "features_penalty": penalty}
        metrics: Metrics = {name: (value.detach(), count) for name, value in figures.items()}
        metrics |= health
        metrics["gumbel_temperature"] = (count * self.quantizer.temperature.now(), count)
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def frontend_flops(self, samples: int) -> float:
        """Count the frontend twice where the targets are made of another view."""
        return super().frontend_flops(samples) * (1 if self.config.views == "none" else 2)

    def head_flops(self, frames: int) -> float:
        """Count the quantiser, the projections and the similarities of the masked frames."""
        own, masked = self.config, frames * self.mask.expected_share
        widths = (self.backbone.dim, own.target_dim)
        project = own.code_dim * (sum(widths) + masked)
        if own.projection == "mlp":
            project += sum(width**2 for width in widths)
        return self.quantizer.flops(masked) + 2.0 * masked * project
