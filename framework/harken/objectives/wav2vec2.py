"""wav2vec 2.0: telling the quantised frame under a mask from those under the utterance's other masks.

With its views and its projections switched on it is wav2vec-Aug.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, real_mask
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss, Metrics
from harken.data.masking import SpanMask
from harken.data.views import Views
from harken.encoders.backbone import Backbone
from harken.nn.dropout import Dropout
from harken.nn.masked import summed_mean_squares
from harken.objectives.base import Objective
from harken.units.product_quantizer import ProductQuantizer, Quantised, Temperature, perplexity


@dataclass(frozen=True, kw_only=True)
class Wav2vec2Config(SlotConfig):
    """Defaults are wav2vec 2.0 Base's (arXiv 2006.11477; fairseq `wav2vec2_base_librispeech.yaml`)."""

    mask_probability: float = 0.65
    """fairseq `mask_prob`: the paper's 6.5 % of frames that begin a mask, times its length."""
    mask_length: int = 10
    """fairseq `mask_length`, in frames."""
    negatives: int = 100
    """Distractors of a masked frame, other masked frames of its utterance. The paper's K; fairseq `num_negatives`."""
    groups: int = 2
    """Codebooks of the quantiser. The paper's G; fairseq `latent_groups`."""
    entries: int = 320
    """Entries of each codebook. The paper's V; fairseq `latent_vars`."""
    quantizer_dim: int = 0
    """Width of a quantised frame, all groups together; they divide it. 0 is `code_dim`. fairseq `latent_dim`."""
    code_dim: int = 256
    """Width in which frames and targets are compared. fairseq `final_dim`; 256 in Base, 768 in Large."""
    temperature: float = 0.1
    """Of the comparison. The paper's kappa; fairseq `logit_temp`."""
    gumbel_start: float = 2.0
    """Temperature of the Gumbel softmax at first. fairseq `latent_temp`, its first number."""
    gumbel_end: float = 0.5
    """Its lowest. fairseq `latent_temp`, its second number; 0.5 in Base, 0.1 in Large."""
    gumbel_decay: float = 0.999995
    """Factor on it at each step. fairseq `latent_temp`, its third number."""
    feature_dropout: float = 0.1
    """Of the frames that are quantised. fairseq `dropout_features`; 0.1 in Base, 0 in Large."""
    diversity_weight: float = 0.1
    """The paper's alpha; fairseq `loss_weights`, its first number."""
    diversity_over: Literal["utterance", "batch"] = "utterance"
    """Whose codes should be diverse. `batch` is the original: the loss then depends on which utterances share a
    micro-batch."""
    penalty_weight: float = 10.0
    """Weight of the mean square of the frontend's output. fairseq `loss_weights`, its second number; 10 in Base, 0 in
    Large."""
    views: Literal["none", "context", "both"] = "none"
    """Whether, in training, the masked context is made of another view of the audio than the targets: the targets' is
    the audio itself (`context`), or a second view (`both`). wav2vec-Aug (arXiv 2206.13654) augments its pretraining
    data; that the past alone is best augmented was found for CPC (arXiv 2007.00991)."""
    view_pitch: float = 0.5
    """Share of the views in which pitch is moved, by up to 3 semitones. harken's; wav2vec-Aug's was not looked up."""
    view_reverberation: float = 0.5
    """Share of the views with reverberation, of up to 0.5 s. harken's; wav2vec-Aug's was not looked up."""
    view_noise: float = 0.5
    """Share of the views with white noise, 5 to 20 dB below. harken's; wav2vec-Aug's was not looked up."""
    projection: Literal["linear", "mlp"] = "linear"
    """How frames and targets come to the width of the comparison. `mlp`: two layers with a layer norm and GELU between,
    a form of harken's: wav2vec-Aug's own projections were not looked up."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=(
                *("mask_probability", "mask_length", "negatives", "groups", "entries", "code_dim", "temperature"),
                *("gumbel_start", "gumbel_end", "gumbel_decay"),
            ),
            not_negative=("quantizer_dim", "diversity_weight", "penalty_weight"),
            shares=(
                *("mask_probability", "feature_dropout", "gumbel_decay"),
                *("view_pitch", "view_reverberation", "view_noise"),
            ),
        )
        if self.target_dim % self.groups:
            key = "quantizer_dim" if self.quantizer_dim else "code_dim"
            raise HarkenError(
                f"`objective.{key}` must be divisible by `objective.groups`, got {self.target_dim} and {self.groups}"
            )

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
        counts = mask.sum(1)
        masked = np.zeros((len(mask), int(counts.max(initial=0))), dtype=np.int64)
        negatives = np.zeros((*masked.shape, self.negatives), dtype=np.int32)
        for row, (cut, count, own) in enumerate(zip(batch.ids, counts, draws, strict=True)):
            if count:
                masked[row, :count] = np.flatnonzero(mask[row])
                drawn = own.generator("negatives", cut).integers(0, count - 1, (count, self.negatives))
                negatives[row, :count] = drawn + (drawn >= np.arange(count)[:, None])  # any other but itself
        arrays = {"mask": mask, "counts": counts, "masked": masked, "negatives": negatives}
        targets = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self.views is not None:
            names = ("view", "target_view") if self.second else ("view",)
            targets |= {name: self._view(self.views, batch, draws, name) for name in names}
        return replace(batch, targets={**batch.targets, **targets}, num_targets=float(counts.sum()))

    @staticmethod
    def _view(views: Views, batch: Batch, draws: Sequence[Draws], name: str) -> Tensor:
        view = torch.zeros_like(batch.inputs)
        for row, (cut, length, own) in enumerate(zip(batch.ids, batch.lengths.tolist(), draws, strict=True)):
            samples = batch.inputs[row, :length].numpy()
            view[row, :length] = torch.from_numpy(views(samples, cut, own, name))
        return view


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
        self.quantizer = ProductQuantizer(
            backbone.frontend.dim,
            groups=config.groups,
            entries=config.entries,
            dim=config.target_dim,
            temperature=Temperature(start=config.gumbel_start, end=config.gumbel_end, decay=config.gumbel_decay),
        )
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
        views = None
        if train and own.views != "none":
            views = Views(
                pitch=own.view_pitch,
                reverberation=own.view_reverberation,
                noise=own.view_noise,
                sample_rate=config.data.sample_rate,
            )
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
        quantised = self.quantizer(self.dropout(self.backbone.encoder.normalise(_pick(frames, masked))))
        logits = self._compare(self.project(_pick(encoded.last, masked)), quantised, targets["negatives"])
        contrast = -(logits.log_softmax(-1)[..., 0] * real).sum()
        diversity, health = self._diversity(quantised, real, counts)
        total = contrast + own.diversity_weight * diversity + own.penalty_weight * penalty
        count = contrast.new_tensor(batch.num_targets)
        hits = (logits[..., 0] > logits[..., 1:].amax(-1)) & real
        figures = {
            "loss": contrast,
            "accuracy": hits.sum().float(),
            "diversity": diversity,
            "features_penalty": penalty,
        }
        metrics: Metrics = {name: (value.detach(), count) for name, value in figures.items()}
        metrics |= {name: (value.detach() * count, count) for name, value in health.items()}
        metrics["gumbel_temperature"] = (count * self.quantizer.temperature.now(), count)
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def _compare(self, x: Tensor, quantised: Quantised, negatives: Tensor) -> Tensor:
        """Return logits `(B, M, 1 + K)` of frames `(B, M, D)`, the true target's first.

        A negative that has the codes of the true target is no negative: its logit is -inf. Codes are compared rather
        than vectors, which the straight-through estimate leaves equal only up to rounding.
        """
        negatives = negatives.long()
        y = self.project_target(quantised.vectors)
        with torch.autocast(x.device.type, enabled=False):
            x, y = functional.normalize(x.float(), dim=-1), functional.normalize(y.float(), dim=-1)
            # (B, M, M), from which the negatives are picked: no frames x negatives x dim tensor exists
            similarity = x @ y.transpose(1, 2) / self.config.temperature
        codes = quantised.codes
        index = negatives.flatten(1)[..., None].expand(-1, -1, codes.shape[-1])
        same = (codes.gather(1, index).view(*negatives.shape, codes.shape[-1]) == codes[:, :, None]).all(-1)
        others = similarity.gather(2, negatives).masked_fill(same, -torch.inf)
        return torch.cat([similarity.diagonal(dim1=1, dim2=2)[..., None], others], -1)

    def _diversity(self, quantised: Quantised, real: Tensor, counts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the diversity loss summed over masked frames, and the perplexities of the micro-batch's codes."""
        size = self.config.groups * self.config.entries
        sums = (quantised.probabilities * real[..., None, None]).sum(1)  # (B, G, V)
        total = counts.sum().clamp(min=1)
        prob_perplexity = perplexity(sums.sum(0) / total)
        used = functional.one_hot(quantised.best, self.config.entries) * real[..., None, None]
        code_perplexity = perplexity(used.sum((0, 1)) / total)
        if self.config.diversity_over == "batch":
            diversity = (size - prob_perplexity) / size * counts.sum()
        else:
            own = perplexity(sums / counts.clamp(min=1)[:, None, None])
            diversity = ((size - own) / size * counts).sum()
        health = {"code_perplexity": code_perplexity, "prob_perplexity": prob_perplexity}
        return diversity, {**health, "codebook_perplexity": code_perplexity / self.config.groups}

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


def _pick(x: Tensor, places: Tensor) -> Tensor:
    """Return the frames `(B, M, D)` of `(B, T, D)` at places `(B, M)`."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
