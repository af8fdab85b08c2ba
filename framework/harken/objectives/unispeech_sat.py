"""UniSpeech-SAT: HuBERT whose middle layer also tells its own utterance from the others of the batch."""

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
from harken.core.batch import Batch, real_mask
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Metrics
from harken.encoders.backbone import Backbone
from harken.encoders.base import Encoded
from harken.objectives._contrast import CodebookConfig, masked_places, pick
from harken.objectives.hubert import Hubert, HubertConfig, HubertPrepare


@dataclass(frozen=True, kw_only=True)
class UniSpeechSatConfig(HubertConfig, CodebookConfig):
    """HuBERT's settings and those of the term over utterances; its defaults are of microsoft/UniSpeech's
    `UniSpeechSATConfig`, with the option after each (arXiv 2110.05752). `code_dim` and `temperature` are of both.
    """

    contrast_layer: int = 6
    """Block whose output is compared, from 1. `utterance_contrastive_layer`; half of Base's."""
    contrast_weight: float = 1.0
    """Weight of the term over utterances, a mean over a frame's instances. `loss_weights`, the number of `loss_spk_m`,
    which was not found."""
    contrast_norm: bool = False
    """Layer norm before the comparison. The original has it where norms come first: `layer_norm_for_extract`."""
    instances: int = 100
    """Masked frames of the micro-batch, of any utterance, that each is compared with. `cross_sample_instances`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "objective", positive=("contrast_layer", "contrast_weight", "instances"))
        self.check_codebooks("code_dim", self.code_dim)


@dataclass(frozen=True)
class UniSpeechSatPrepare(HubertPrepare):
    """Draws the masks, reads the units, and draws the instances."""

    instances: int

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add to HuBERT's targets `places` `(B, M)` of masked frames, `counts` `(B,)` of them, and `instances`
        `(B, M, K)`: for each masked frame others of the batch, as positions in the flattened `(B * M)`.

        A frame that is alone in its batch is its own instance.
        """
        batch = super().__call__(batch, draws)
        counts, places = masked_places(batch.targets["mask"].numpy())
        size = places.shape[1]
        every = np.flatnonzero(np.arange(size) < counts[:, None])
        instances = np.zeros((*places.shape, self.instances), dtype=np.int32)
        firsts = np.cumsum(counts) - counts
        for row, (cut, count, first, own) in enumerate(zip(batch.ids, counts, firsts, draws, strict=True)):
            if count and len(every) > 1:
                drawn = own.generator("instances", cut).integers(0, len(every) - 1, (count, self.instances))
                drawn += drawn >= (first + np.arange(count))[:, None]  # any other but itself
                instances[row, :count] = every[drawn]
            elif count:
                instances[row, :count] = every[0]
        arrays = {"places": places, "counts": counts, "instances": instances}
        targets = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return replace(batch, targets={**batch.targets, **targets})


@register("objective", UniSpeechSatConfig)
class UniSpeechSat(Hubert):
    """HuBERT, and for each masked frame: which quantised frames of the micro-batch are of its own utterance.

    Masked frames of a middle block are quantised; a frame is compared by cosine with its own quantised one and with
    drawn ones of the micro-batch, and a binary cross entropy says of each whether the utterance is the same, a mean
    over them. What is told apart are utterances that share a micro-batch, so their losses depend on each other.
    Source: arXiv 2110.05752; `UniSpeechSATModel.forward` and `UniSpeechSATCriterion` of microsoft/UniSpeech.
    """

    compares_utterances: ClassVar[bool] = True

    config: UniSpeechSatConfig

    def __init__(self, config: UniSpeechSatConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__(config, run, backbone)
        last = backbone.encoder.num_layers
        if config.contrast_layer > last:
            raise HarkenError(
                f"`objective.contrast_layer` must lie in 1..{last}, the encoder's blocks, got {config.contrast_layer}"
            )
        self.hidden_layers = tuple(sorted({*self.hidden_layers, config.contrast_layer} - {last}))
        dim, width = backbone.dim, config.code_dim
        self.contrast_norm = nn.LayerNorm(dim) if config.contrast_norm else nn.Identity()
        self.quantizer = config.quantizer(dim, width)
        self.project_frame = nn.Linear(dim, width)
        self.project_target = nn.Linear(width, width)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> UniSpeechSatPrepare:
        """Return HuBERT's mask and label reader, which draws instances as well."""
        units = Hubert.preparer(config, spec, train=train)
        own = cast(UniSpeechSatConfig, config.objective)
        return UniSpeechSatPrepare(units.spec, units.mask, units.units, units.unmasked_weight, own.instances)

    def add_terms(self, total: Tensor, encoded: Encoded, batch: Batch, metrics: Metrics) -> Tensor:
        """Add the term over utterances and the diversity of its codes, means over an utterance's masked frames times
        the frames that it counts with.
        """
        own, counts = self.config, batch.targets["counts"]
        counted = batch.targets["counted"] * (counts > 0)
        real = real_mask(counts, batch.targets["places"].shape[1])
        hidden = encoded.hidden.get(own.contrast_layer, encoded.last)
        frames = self.contrast_norm(pick(hidden, batch.targets["places"]))
        quantised = self.quantizer(frames)
        logits, same = self._compare(self.project_frame(frames), self.project_target(quantised.vectors), batch)
        entropy = functional.binary_cross_entropy_with_logits(logits, same, reduction="none").mean(-1)
        entropies = (entropy * real).sum(1)
        contrast = (entropies * counted / counts.clamp(min=1)).sum()
        diversity, health = own.diversity(quantised, real, counts, counted)
        count = counts.sum().to(contrast.dtype)
        right = ((logits >= 0) == same.bool()).float().mean(-1)
        figures = {
            "utterance_loss": entropies.sum(),
            "utterance_accuracy": (right * real).sum(),
            "utterance_positives": (same.mean(-1) * real).sum(),
            "gumbel_temperature": count * self.quantizer.temperature.now(),
        }
        metrics |= {name: (value.detach(), count) for name, value in figures.items()}
        metrics |= health
        return total + own.contrast_weight * contrast + own.diversity_weight * diversity

    def _compare(self, x: Tensor, y: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits `(B, M, 1 + K)` of frames `(B, M, D)` with quantised ones, their own first, and 1.0 where
        both are of one utterance.
        """
        rows, size = x.shape[:2]
        instances = batch.targets["instances"].long()
        with torch.autocast(x.device.type, enabled=False):
            x, y = (functional.normalize(z.flatten(0, 1).float(), dim=-1) for z in (x, y))
            # all pairs of the micro-batch, from which the instances are picked, take less than their vectors would
            similarity = x @ y.T / self.config.temperature
        own = similarity.diagonal().view(rows, size, 1)
        drawn = similarity.gather(1, instances.flatten(0, 1)).view_as(instances)
        row = torch.arange(rows, device=x.device)[:, None, None]
        same = torch.div(instances, max(1, size), rounding_mode="floor") == row
        return torch.cat([own, drawn], -1), torch.cat([torch.ones_like(own), same.to(own.dtype)], -1)

    def head_flops(self, frames: int) -> float:
        """Count HuBERT's head, the quantiser, the projections, and the products with the utterance's own frames."""
        masked = frames * self.config.span_mask().expected_share
        widths = self.backbone.dim + self.config.code_dim + masked
        return super().head_flops(frames) + self.quantizer.flops(masked) + 2.0 * masked * self.config.code_dim * widths
