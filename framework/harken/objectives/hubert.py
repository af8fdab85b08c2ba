"""HuBERT: masked prediction of hidden units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss, Metrics
from harken.data.check import Cuts, Doubt
from harken.data.masking import SpanMask
from harken.encoders.backbone import Backbone
from harken.nn.masked import summed_mean_squares
from harken.objectives.base import Objective
from harken.units.alignment import UnitReader
from harken.units.coverage import check_same_units
from harken.units.random_projection import codebook_use
from harken.units.store import LabelStore


@dataclass(frozen=True, kw_only=True)
class HubertConfig(SlotConfig):
    """Defaults are HuBERT Base's (arXiv 2106.07447 section IV-C; fairseq `hubert_base_librispeech.yaml`)."""

    classes: tuple[int, ...]
    """Units of each codebook; must equal the K of `data.labels`."""
    mask_probability: float = 0.8
    """fairseq `mask_prob`."""
    mask_length: int = 10
    """fairseq `mask_length`, in frames."""
    code_dim: int = 256
    """Width in which the cosine heads compare frames and code embeddings. fairseq `final_dim`; 768 in Large."""
    temperature: float = 0.1
    """fairseq `logit_temp`."""
    masked_weight: float = 1.0
    """fairseq `pred_masked_weight`."""
    unmasked_weight: float = 0.0
    """fairseq `pred_nomask_weight`."""
    penalty_weight: float = 10.0
    """Weight of the mean square of the frontend's output; fairseq `loss_weights: [10]`."""
    head: Literal["cosine", "cosine_normal", "linear"] = "cosine"
    """`cosine` is the published head, whose code embeddings start uniform in 0..1, so nearly parallel, and take
    thousands of steps to part. `cosine_normal` starts them normal with norm 1. `linear` is one linear map from the
    encoder's width, over `temperature` (k2SSL, arXiv 2411.17100; icefall `final_proj`)."""
    separate_projections: bool = False
    """One projection for each codebook, of the cosine heads; fairseq `untie_final_proj`."""
    penalty_over_padding: bool = False
    """Take the mean of the features penalty over the whole batch, padding included, as fairseq and k2SSL do: the loss
    then depends on which utterances share a batch."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=("classes", "mask_length", "code_dim", "temperature"),
            not_negative=("masked_weight", "unmasked_weight", "penalty_weight"),
            shares=("mask_probability",),
        )


@dataclass(frozen=True)
class HubertPrepare:
    """Draws the masks and reads the units."""

    spec: FrameSpec
    mask: SpanMask
    units: UnitReader
    unmasked_weight: float

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `labels` `(B, T, C)`, and `masked`, `unmasked`: positions of those frames in the flattened `(B * T)`."""
        masked, lengths = self.mask.draw_rows(batch, draws, self.spec)
        size = masked.shape[1]
        real = np.arange(size)[None, :] < lengths[:, None]
        labels = self.units.read(batch, size)
        targets = {
            "labels": torch.from_numpy(labels),
            "mask": torch.from_numpy(masked),
            "masked": torch.from_numpy(np.flatnonzero(masked)),
            "unmasked": torch.from_numpy(np.flatnonzero(real & ~masked)),
        }
        count = len(targets["masked"]) + (len(targets["unmasked"]) if self.unmasked_weight else 0)
        return replace(batch, targets={**batch.targets, **targets}, num_targets=float(count))

    def check(self, cuts: Cuts) -> Iterator[Doubt]:
        """Yield what is wrong with the labels of cuts."""
        return self.units.check(cuts)


class CosineCodes(nn.Module):
    """Logits of units: cosine similarity of a projected frame to each unit's embedding, over a temperature.

    One matrix product of normalised vectors; no frames x units x dim tensor exists.
    Source: arXiv 2106.07447 equation 3.
    """

    def __init__(self, classes: tuple[int, ...], dim: int, temperature: float, *, normal: bool) -> None:
        super().__init__()
        self.classes = classes
        self.temperature = temperature
        start = torch.randn(sum(classes), dim) / dim**0.5 if normal else torch.rand(sum(classes), dim)
        self.embeddings = nn.Parameter(start)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map projected frames `(N, C, dim)` to logits `(N, classes[c])` of each codebook."""
        codes = functional.normalize(self.embeddings.float(), dim=-1).split(self.classes)
        x = functional.normalize(x.float(), dim=-1)
        with torch.autocast(x.device.type, enabled=False):
            return [x[:, index] @ code.T / self.temperature for index, code in enumerate(codes)]


class LinearCodes(nn.Module):
    """Logits of units from one linear map for each codebook, over a temperature.

    Source: k2SSL, arXiv 2411.17100; icefall's `hubert_ce.py`.
    """

    def __init__(self, classes: tuple[int, ...], dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.maps = nn.ModuleList(nn.Linear(dim, count) for count in classes)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map frames `(N, C, dim)` to logits `(N, classes[c])` of each codebook."""
        return [linear(x[:, index]).float() / self.temperature for index, linear in enumerate(self.maps)]


@register("objective", HubertConfig)
class Hubert(Objective):
    """Predicts the units of masked frames.

    The features penalty of an utterance is its mean square times its masked frames, so that it does not depend on
    how utterances share batches; in a batch of equal lengths and counts this is fairseq's.
    """

    def __init__(self, config: HubertConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        if config.head == "linear":
            self.heads = 1
            self.project: nn.Module = nn.Identity()
            self.codes: CosineCodes | LinearCodes = LinearCodes(config.classes, backbone.dim, config.temperature)
        else:
            self.heads = len(config.classes) if config.separate_projections else 1
            self.project = nn.Linear(backbone.dim, config.code_dim * self.heads)
            normal = config.head == "cosine_normal"
            self.codes = CosineCodes(config.classes, config.code_dim, config.temperature, normal=normal)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> HubertPrepare:
        """Return the mask and label reader; masks are drawn in validation too, as the loss is over masked frames."""
        own = cast(HubertConfig, config.objective)
        if not config.data.labels:
            raise HarkenError("`data.labels` must name a unit store for each codebook; `harken units label` makes one")
        stores = config.data.labels
        if config.data.valid_labels and not train:
            stores = config.data.valid_labels
            for folder, other in zip(config.data.labels, stores, strict=True):
                check_same_units(LabelStore(folder).card, LabelStore(other).card)
        mask = SpanMask(probability=own.mask_probability, length=own.mask_length)
        return HubertPrepare(spec, mask, UnitReader(stores, spec, own.classes), own.unmasked_weight)

    @staticmethod
    def fingerprint(config: RunConfig) -> dict[str, str]:
        """Return the clusterer and features of each codebook; a store of more cuts by the same ones is as good."""
        cards = [LabelStore(folder).card for folder in config.data.labels]
        return {f"data.labels[{index}]": card.made_of for index, card in enumerate(cards)}

    def forward(self, batch: Batch) -> Loss:
        """Return the cross entropy summed over masked frames and codebooks, plus the features penalty."""
        mask = batch.targets["mask"]
        frames, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {"mask": mask})
        encoded = self.backbone.encoder.encode(x, lengths)
        flat = encoded.last.flatten(0, 1)
        labels = batch.targets["labels"].flatten(0, 1)
        metrics: Metrics = {}
        total = frames.new_zeros((), dtype=torch.float32)
        for where, weight in (("masked", self.config.masked_weight), ("unmasked", self.config.unmasked_weight)):
            index = batch.targets[where]
            if where == "masked":
                metrics["label_perplexity"] = self._label_perplexity(labels[index])
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
                loss = self._predict(flat[index], labels[index], where, metrics)
            total = total + weight * loss if weight > 0 else total
        if self.config.penalty_over_padding:
            penalty = frames.float().square().mean() * batch.num_targets
        else:
            penalty = summed_mean_squares(frames, lengths, mask.sum(1))
        metrics["features_penalty"] = (penalty.detach(), penalty.new_tensor(batch.num_targets))
        return Loss(total=encoded.penalised(total + self.config.penalty_weight * penalty), metrics=metrics)

    def head_flops(self, frames: int) -> float:
        """Count the projection and the similarities, for masked and unmasked frames together."""
        classes, own = sum(self.config.classes), self.config
        if own.head == "linear":
            return 2.0 * frames * classes * self.backbone.dim
        return 2.0 * frames * own.code_dim * (self.heads * self.backbone.dim + classes)

    def _label_perplexity(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the perplexity of labels `(N, C)`, a mean over codebooks, times N, and N."""
        classes = self.config.classes
        each = [codebook_use(labels[:, i, None].long(), size)[1] for i, size in enumerate(classes)]
        count = each[0].new_tensor(float(len(labels)))
        return torch.stack(each).mean() * count, count

    def _predict(self, x: Tensor, labels: Tensor, where: str, metrics: Metrics) -> Tensor:
        """Return the summed cross entropy of frames `(N, D)` with labels `(N, C)`; record its mean and the accuracy."""
        projected = self.project(x).unflatten(-1, (self.heads, -1)).expand(-1, len(self.config.classes), -1)
        losses, hits = [], []
        for codebook, logits in enumerate(self.codes(projected)):
            losses.append(functional.cross_entropy(logits, labels[:, codebook].long(), reduction="sum"))
            hits.append((logits.detach().argmax(-1) == labels[:, codebook]).sum())
        loss = torch.stack(losses).sum()
        count = loss.new_tensor(float(len(x)))
        metrics["loss" if where == "masked" else "loss_unmasked"] = (loss.detach(), count)
        metrics[f"accuracy_{where}"] = (torch.stack(hits).sum().float(), count * len(losses))
        return loss
