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
from harken.encoders.base import Encoded
from harken.nn.masked import summed_mean_squares
from harken.nn.unit_heads import HeadKind, UnitHead, unit_logits
from harken.objectives.base import Objective
from harken.units.alignment import UnitReader, open_units, units_fingerprint
from harken.units.random_projection import codebook_use

IGNORED = -100
"""Stands for the label of a frame that a block does not predict; no class has it."""


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
    head: HeadKind = "cosine"
    """`cosine` is the published head, whose code embeddings start uniform in 0..1, so nearly parallel, and take
    thousands of steps to part. `cosine_normal` starts them normal with norm 1. `linear` is one linear map from the
    encoder's width, over `temperature` (k2SSL, arXiv 2411.17100; icefall `final_proj`)."""
    separate_projections: bool = False
    """One projection for each codebook, of the cosine heads; fairseq `untie_final_proj`."""
    predict_layers: tuple[int, ...] = ()
    """Blocks, 1 to the encoder's last, whose outputs predict units, each by its own head; empty is the last
    alone. Fast-HuBERT's intermediate-layer loss (arXiv 2309.13860; its `predict_layers` count from 0)."""
    layer_codebooks: Literal["all", "own"] = "all"
    """What each of `predict_layers` predicts: all codebooks, the loss being a mean over the layers as in Fast-HuBERT's
    criterion, or the codebook in its own place of `classes`, the loss being a sum as over HuBERT's codebooks."""
    swap_layers: tuple[int, ...] = ()
    """Blocks behind which a masked and an unmasked view of each utterance exchange their masked frames; the units are
    those of the frames that began masked. Empty is HuBERT, with a masked view alone. MS-HuBERT's Swap (arXiv
    2406.05661). All blocks then work on twice as many frames."""
    penalty_over_padding: bool = False
    """Take the mean of the features penalty over the whole batch, padding included, as fairseq and k2SSL do: the loss
    then depends on which utterances share a batch."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=("classes", "mask_length", "code_dim", "temperature", "predict_layers", "swap_layers"),
            not_negative=("masked_weight", "unmasked_weight", "penalty_weight"),
            shares=("mask_probability",),
        )
        if list(self.predict_layers) != sorted(set(self.predict_layers)):
            raise HarkenError(
                f"`objective.predict_layers` must rise, each block named once, got {list(self.predict_layers)}"
            )
        if self.layer_codebooks == "own" and len(self.predict_layers) != len(self.classes):
            raise HarkenError(
                "`objective.layer_codebooks: own` needs a block of `objective.predict_layers` for each codebook of "
                f"`objective.classes`, got {len(self.predict_layers)} and {len(self.classes)}"
            )

    def span_mask(self) -> SpanMask:
        """Return what draws masks."""
        return SpanMask(probability=self.mask_probability, length=self.mask_length)


@dataclass(frozen=True)
class HubertPrepare:
    """Draws the masks and reads the units."""

    spec: FrameSpec
    mask: SpanMask
    units: UnitReader
    unmasked_weight: float

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `labels` `(B, T, C)`; `masked`, `unmasked`: positions of those frames in the flattened `(B * T)`; and
        `counted` `(B,)`: how many frames each cut counts with in the loss, the masked ones or all.
        """
        masked, lengths = self.mask.draw_rows(batch, draws, self.spec)
        size = masked.shape[1]
        real = np.arange(size)[None, :] < lengths[:, None]
        labels = self.units.read(batch, size)
        counted = lengths if self.unmasked_weight else masked.sum(1)
        targets = {
            "labels": torch.from_numpy(labels),
            "counted": torch.from_numpy(counted),
            "mask": torch.from_numpy(masked),
            "masked": torch.from_numpy(np.flatnonzero(masked)),
            "unmasked": torch.from_numpy(np.flatnonzero(real & ~masked)),
        }
        return replace(batch, targets={**batch.targets, **targets}, num_targets=float(counted.sum()))

    def check(self, cuts: Cuts) -> Iterator[Doubt]:
        """Yield what is wrong with the labels of cuts."""
        return self.units.check(cuts)


@register("objective", HubertConfig)
class Hubert(Objective):
    """Predicts the units of masked frames.

    The features penalty of an utterance is its mean square times the frames that it counts with, so that it does not
    depend on how utterances share batches; in a batch of equal lengths and counts this is fairseq's.
    """

    def __init__(self, config: HubertConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        last = backbone.encoder.num_layers
        self.layers = config.predict_layers or (last,)
        if self.layers[-1] != last:
            raise HarkenError(
                f"`objective.predict_layers` must end with {last}, the encoder's last block: those above would learn "
                f"nothing; got {list(self.layers)}"
            )
        self._check_swaps(run.encoder.name, last)
        self.factors = {layer: backbone.encoder.layer_factor(layer) for layer in self.layers}
        self.hidden_layers = self.layers[:-1]
        everything = tuple(range(len(config.classes)))
        own = config.layer_codebooks == "own"
        self.books = {layer: (place,) if own else everything for place, layer in enumerate(self.layers)}
        heads = {layer: self._make_head(books) for layer, books in self.books.items()}
        self.flops_per_frame = sum(head.flops for head in heads.values())
        # the topmost head has the names it has in a HuBERT of one head, so that its checkpoints load
        top = heads.pop(self.layers[-1])
        self.project, self.codes = top.project, top.codes
        self.lower_heads = nn.ModuleDict({str(layer): head for layer, head in heads.items()})

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> HubertPrepare:
        """Return the mask and label reader; masks are drawn in validation too, as the loss is over masked frames."""
        own = cast(HubertConfig, config.objective)
        units = open_units(config.data, spec, own.classes, train=train)
        return HubertPrepare(spec, own.span_mask(), units, own.unmasked_weight)

    @staticmethod
    def fingerprint(config: RunConfig) -> dict[str, str]:
        """Return what the units are made of."""
        return units_fingerprint(config.data)

    def forward(self, batch: Batch) -> Loss:
        """Return the cross entropy summed over masked frames and codebooks, plus the features penalty."""
        mask = batch.targets["mask"]
        frames, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {"mask": mask})
        encoded = self._encode(frames, x, mask, lengths)
        # of the last block what leaves the encoder, with the norm that some have there
        outputs = {layer: encoded.hidden.get(layer, encoded.last).flatten(0, 1) for layer in self.layers}
        labels = batch.targets["labels"].flatten(0, 1)
        metrics: Metrics = {}
        total = frames.new_zeros((), dtype=torch.float32)
        for where, weight in (("masked", self.config.masked_weight), ("unmasked", self.config.unmasked_weight)):
            index = batch.targets[where]
            if where == "masked":
                metrics["label_perplexity"] = _perplexity(labels[index], self.config.classes)
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight > 0):
                picked = {layer: output[index] for layer, output in outputs.items()}
                loss = self._predict(picked, labels[index], index % mask.shape[1], where, metrics)
            total = total + weight * loss if weight > 0 else total
        if self.config.penalty_over_padding:
            penalty = frames.float().square().mean() * batch.num_targets
        else:
            penalty = summed_mean_squares(frames, lengths, batch.targets["counted"])
        metrics["features_penalty"] = (penalty.detach(), penalty.new_full((), batch.num_targets))
        total = self.add_terms(total + self.config.penalty_weight * penalty, encoded, batch, metrics)
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def add_terms(self, total: Tensor, encoded: Encoded, batch: Batch, metrics: Metrics) -> Tensor:
        """Return the summed loss with what a method adds to HuBERT's, and add its figures to `metrics`."""
        return total

    def head_flops(self, frames: int) -> float:
        """Count the projections and the similarities, for masked and unmasked frames together, and the second view."""
        second = self.backbone.encoder.flops(frames) if self.config.swap_layers else 0.0
        return frames * self.flops_per_frame + second

    def _check_swaps(self, encoder: str, last: int) -> None:
        swaps = self.config.swap_layers
        if swaps and not self.backbone.encoder.swaps:
            raise HarkenError(
                "`objective.swap_layers` needs an encoder of the Transformer family whose blocks have one frame rate, "
                f"such as `transformer`, got `{encoder}`"
            )
        if swaps and max(swaps) >= last:
            raise HarkenError(
                f"`objective.swap_layers` must lie below {last}, the encoder's last block, behind which no other sees "
                f"what was exchanged; got {list(swaps)}"
            )

    def _encode(self, frames: Tensor, x: Tensor, mask: Tensor, lengths: Tensor) -> Encoded:
        """Encode the masked input `(B, T, D)`, with the frontend's frames `(B, T, F)` as a second view where one is."""
        encoder, below = self.backbone.encoder, self.hidden_layers
        if not self.config.swap_layers:
            return encoder.encode(x, lengths, below)
        return encoder.encode_swapped(x, encoder.embed(frames), mask, lengths, self.config.swap_layers, below)

    def _make_head(self, books: tuple[int, ...]) -> UnitHead:
        own = self.config
        classes = tuple(own.classes[book] for book in books)
        separate = own.separate_projections
        return UnitHead(own.head, classes, self.backbone.dim, own.code_dim, own.temperature, separate=separate)

    def _logits(self, layer: int, x: Tensor) -> list[Tensor]:
        """Return logits `(N, classes)` of each codebook that a block predicts from frames `(N, D)`."""
        if layer == self.layers[-1]:
            return unit_logits(self.project, self.codes, x)
        logits: list[Tensor] = self.lower_heads[str(layer)](x)
        return logits

    def _predict(
        self, outputs: dict[int, Tensor], labels: Tensor, times: Tensor, where: str, metrics: Metrics
    ) -> Tensor:
        """Return the summed cross entropy of frames `{layer: (N, D)}` with labels `(N, C)`; record mean and accuracy.

        times: `(N,)`, places in the utterance: a block of a lower rate predicts once for each of its outputs, at the
        first of its frames. With several layers, each has figures of its own beside those of all.
        """
        losses, hits = {}, {}
        for layer, x in outputs.items():
            kept = times % self.factors[layer] == 0
            own = labels.long().masked_fill(~kept[:, None], IGNORED)
            predicted = list(zip(self._logits(layer, x), self.books[layer], strict=True))
            losses[layer] = torch.stack(
                [
                    functional.cross_entropy(z, own[:, book], reduction="sum", ignore_index=IGNORED)
                    for z, book in predicted
                ]
            ).sum()
            guesses = [z.detach().argmax(-1) for z, _ in predicted]
            right = [(guess == own[:, book]).sum() for guess, (_, book) in zip(guesses, predicted, strict=True)]
            if where == "masked" and layer == self.layers[-1]:
                own_classes = [self.config.classes[book] for book in self.books[layer]]
                metrics["prediction_perplexity"] = _perplexity(torch.stack(guesses, 1), own_classes)
            hits[layer] = (torch.stack(right).sum().float(), kept.sum().float(), float(len(predicted)))
        loss = torch.stack(list(losses.values())).sum()
        if self.config.layer_codebooks == "all":
            loss = loss / len(losses)
        name = "loss" if where == "masked" else "loss_unmasked"
        metrics[name] = (loss.detach(), loss.new_full((), float(len(labels))))
        metrics[f"accuracy_{where}"] = (
            torch.stack([right for right, _, _ in hits.values()]).sum(),
            torch.stack([count * books for _, count, books in hits.values()]).sum(),
        )
        if len(outputs) > 1 and where == "masked":
            for layer, (hit, count, books) in hits.items():
                metrics[f"loss_layer{layer}"] = (losses[layer].detach(), count)
                metrics[f"accuracy_masked_layer{layer}"] = (hit, count * books)
        return loss


def _perplexity(labels: Tensor, classes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the perplexity of labels `(N, C)` of codebooks of C sizes, a mean over these, times N, and N."""
    each = [codebook_use(labels[:, i, None].long(), size)[1] for i, size in enumerate(classes)]
    count = each[0].new_full((), float(len(labels)))
    return torch.stack(each).mean() * count, count
