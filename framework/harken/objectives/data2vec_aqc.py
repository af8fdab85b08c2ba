"""data2vec-aqc: data2vec on augmented views, where student and teacher also meet quantised frames of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, real_mask
from harken.core.draws import Draws
from harken.core.frames import FrameSpec
from harken.core.loss import Loss, Metrics
from harken.data.views import Views
from harken.nn.dropout import Dropout
from harken.nn.masked import summed_mean_squares
from harken.objectives._contrast import (
    CodebookConfig,
    ViewsConfig,
    alike_negatives,
    contrast_logits,
    draw_negatives,
    draw_starts,
    masked_places,
    pick,
    views_of,
)
from harken.objectives.data2vec import Data2vec, Data2vecConfig, Data2vecPrepare
from harken.units.product_quantizer import Quantised


@dataclass(frozen=True, kw_only=True)
class Data2vecAqcConfig(Data2vecConfig, CodebookConfig, ViewsConfig):
    """data2vec's settings, and those of its contrastive terms, whose defaults are the original's (arXiv 2211.01246;
    Speech-Lab-IITM/data2vec-aqc `audio/pretraining/base_librispeech.yaml`, with the option after each).
    """

    views: Literal["none", "student", "both"] = "none"
    """Whose audio is augmented, in training: of the student alone, or of the teacher by itself as well (`both`)."""
    contrast_weight: float = 0.5
    """Weight of each of the two contrastive terms, 0.5 in the original's code. 0 leaves data2vec: no quantiser, no
    diversity, no penalty."""
    negatives: int = 100
    """Distractors of a masked frame, other masked frames of its utterance. `num_negatives`."""
    code_dim: int = 256
    """Width of a quantised frame, and of the comparison. `final_proj_dim`."""
    temperature: float = 0.1
    """Of the comparison; `logit_temp` in the original's code."""
    cluster_factor: int = 16
    """Frames of an utterance for each of its clusters; there are two at least. `cluster_factor`."""
    cluster_scale: float = 0.3
    """Factor on the logit of a negative that is in the cluster of the true frame. `scale_factor`."""
    cluster_passes: int = 10
    """How often centroids move. The original goes on until they rest, at most 100 times."""
    feature_dropout: float = 0.0
    """Of the frames that are quantised. `dropout_features`."""
    penalty_weight: float = 10.0
    """Weight of the mean square of the frontend's output; 10 in the original's criterion."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            "objective",
            positive=("negatives", "code_dim", "temperature", "cluster_factor", "cluster_passes"),
            not_negative=("contrast_weight", "penalty_weight"),
            shares=("cluster_scale", "feature_dropout"),
        )
        self.check_codebooks("code_dim", self.code_dim)
        self.check_views()


@dataclass(frozen=True)
class Data2vecAqcPrepare(Data2vecPrepare):
    """Draws the masks, the views, and for the contrastive terms negatives and where clusters begin.

    views: None for none.
    """

    config: Data2vecAqcConfig
    views: Views | None

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add to data2vec's targets `counts` `(B,)` of masked frames, `places` `(B, M)`, `negatives` `(B, M, K)` that
        point into them, and `starts` `(B, C)`.

        Where there are views, `view` `(B, S)` is the student's audio and `target_view`, if any, the teacher's.
        """
        batch = super().__call__(batch, draws)
        targets = dict(batch.targets)
        if self.config.contrast_weight:
            counts, places = masked_places(targets["mask"].numpy())
            negatives = draw_negatives(batch, draws, counts, self.config.negatives)
            clusters = (self.spec.num_frames(batch.lengths) // self.config.cluster_factor).clamp(min=2)
            starts = draw_starts(batch, draws, counts, clusters.tolist(), 1 if self.views is None else 2)
            arrays = {"counts": counts, "places": places, "negatives": negatives, "starts": starts}
            targets |= {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.views is not None:
            names = ("view", "target_view") if self.config.views == "both" else ("view",)
            targets |= {name: views_of(self.views, batch, draws, name) for name in names}
        return replace(batch, targets=targets)


@register("objective", Data2vecAqcConfig)
class Data2vecAqc(Data2vec):
    """data2vec, and cross entropies that tell the true quantised frame from others of the utterance.

    At each masked frame the student, which saw a view, is compared with quantised frames of the teacher's audio, and
    the teacher's target with quantised frames of the view. Quantised frames are clustered by cosines within the
    utterance; a negative in the true frame's cluster counts less. Here, clusters, diversity and penalty are of an
    utterance, the original's of a batch (`diversity_over: batch` is its).
    Source: arXiv 2211.01246; `Data2VecAudioModel` and `ModelCriterion` of Speech-Lab-IITM/data2vec-aqc. There, logits
    are scaled in those micro-batches alone in which some negative has the codes of its true frame: nearly all.
    """

    config: Data2vecAqcConfig

    def head(self, run: RunConfig) -> int:
        """Make what predicts targets, and where frames are contrasted the quantiser; return the targets' width."""
        width, own = super().head(run), self.config
        if own.contrast_weight:
            self.quantizer = own.quantizer(self.backbone.frontend.dim, own.code_dim)
            self.dropout = Dropout(own.feature_dropout)
            self.project_context = nn.Linear(width, own.code_dim)
            self.project_target = nn.Linear(own.code_dim, own.code_dim)
        return width

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> Data2vecAqcPrepare:
        """Return what draws masks, views, negatives and clusters; in validation no views."""
        own = cast(Data2vecAqcConfig, config.objective)
        views = own.made(config.data.sample_rate) if train and own.views != "none" else None
        return Data2vecAqcPrepare(spec, own.span_mask(), own, views)

    def forward(self, batch: Batch) -> Loss:
        """Return data2vec's error with contrastive terms, diversity and penalty, summed over masked frames."""
        seen = batch.targets.get("view", batch.inputs)
        frames, x, lengths = self.backbone.embed(seen, batch.lengths, {"mask": batch.targets["mask"]})
        encoded = self.backbone.encoder.encode(x, lengths)
        heard = frames
        if "view" in batch.targets:
            heard, _ = self.backbone.frontend(batch.targets.get("target_view", batch.inputs), batch.lengths)
        targets = self.teacher(heard.detach(), lengths)
        total, metrics = self.regress(encoded, targets, batch)
        if self.config.contrast_weight:
            counts = batch.targets["counts"]
            contrast, diversity, figures = self._contrast(encoded.last, targets, frames, heard, batch)
            penalty = summed_mean_squares(heard, lengths, counts)
            total = total + self.config.contrast_weight * contrast + self.config.diversity_weight * diversity
            total = total + self.config.penalty_weight * penalty
            metrics = {**metrics, **figures, "features_penalty": (penalty.detach(), metrics["loss"][1])}
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def _contrast(
        self, student: Tensor, teacher: Tensor, frames: Tensor, heard: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Return both contrastive terms together and the diversity, summed over masked frames, and figures.

        student, teacher: `(B, T, D)`. frames, heard: the frontend's, `(B, T, F)`, of the student's and the teacher's
        audio; the same where there is no view.
        """
        places, counts = batch.targets["places"], batch.targets["counts"]
        real = real_mask(counts, places.shape[1])
        quantised = [self._quantise(heard, places)]
        quantised += [] if frames is heard else [self._quantise(frames, places)]
        vectors = [self.project_target(one.vectors) for one in quantised]
        negatives = batch.targets["negatives"]
        alike = alike_negatives(vectors, real, batch.targets["starts"], negatives, self.config.cluster_passes)
        count = counts.sum().float()
        metrics: Metrics = {"gumbel_temperature": (count * self.quantizer.temperature.now(), count)}
        terms = []
        # the student with the frames of the teacher's audio, which is first, and the teacher with those of the view
        for name, x, place in (("student", student, 0), ("teacher", teacher, -1)):
            context, codes = self.project_context(pick(x, places)), quantised[place].codes
            factors = torch.where(alike[place], self.config.cluster_scale, 1.0)
            logits = contrast_logits(context, vectors[place], codes, negatives, self.config.temperature, factors)
            terms.append(-(logits.log_softmax(-1)[..., 0] * real).sum())
            hits = ((logits[..., 0] > logits[..., 1:].amax(-1)) & real).sum().float()
            metrics |= {f"contrast_{name}": (terms[-1].detach(), count), f"accuracy_{name}": (hits, count)}
        diversity, health = self.config.diversity(quantised[0], real, counts)
        metrics |= {**health, "same_cluster": ((alike[0].float().mean(-1) * real).sum(), count)}
        return torch.stack(terms).sum(), diversity, metrics

    def _quantise(self, frames: Tensor, places: Tensor) -> Quantised:
        quantised: Quantised = self.quantizer(self.dropout(self.backbone.encoder.normalise(pick(frames, places))))
        return quantised

    def frontend_flops(self, samples: int) -> float:
        """Count the frontend twice where student and teacher have audio of their own."""
        return super().frontend_flops(samples) * (1 if self.config.views == "none" else 2)

    def head_flops(self, frames: int) -> float:
        """Count data2vec's head, the quantiser, the projections, the similarities, and the clusters, which have no
        backward pass.
        """
        flops, own = super().head_flops(frames), self.config
        if not own.contrast_weight:
            return flops
        masked, audios = frames * self.mask.expected_share, 1 if own.views == "none" else 2
        project = 2 * self.width + audios * own.code_dim + 2 * masked
        points = audios * masked * max(2, frames // own.cluster_factor)
        clusters = 2.0 * (2 * own.cluster_passes + 1) * points * own.code_dim / 3.0
        return flops + audios * self.quantizer.flops(masked) + 2.0 * masked * own.code_dim * project + clusters
