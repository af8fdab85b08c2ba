"""Connectionist temporal classification on top of any encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, real_mask
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.data.tokens import BLANK, load_tokenizer
from harken.encoders.backbone import Backbone
from harken.nn.dropout import Dropout
from harken.objectives.transcripts import Recogniser, TranscriptConfig, TranscriptPrepare, ctc_loss, frames_needed


@dataclass(frozen=True, kw_only=True)
class CtcConfig(TranscriptConfig):
    """Fine-tuning by CTC. The masks are wav2vec 2.0's form of SpecAugment (arXiv 2006.11477, 4.3 and appendix B)."""

    dropout: float = 0.0
    """Before the linear head; fairseq `final_dropout`."""
    head_upsampling: int = 1
    """Outputs for each encoder frame. Fast speech has more characters than 40 ms frames; 2 gives each two places."""
    intermediate_layers: tuple[int, ...] = ()
    """Blocks whose outputs are also trained by the loss, through the same head (arXiv 2102.03216): one in the middle
    makes the lower half useful early and regularises."""
    intermediate_weight: float = 0.3
    """Weight of their mean loss, and 1 minus it of the last layer's; lambda of arXiv 2102.03216, 0.3 there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self, "objective", positive=("head_upsampling",), shares=("dropout",))


@register("objective", CtcConfig)
class Ctc(Recogniser):
    """A linear head over the encoder's last layer, trained by CTC.

    Source: Graves et al. 2006. The loss is summed over utterances; its targets are tokens.
    """

    config: CtcConfig

    def __init__(self, config: CtcConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.dropout = Dropout(config.dropout)
        self.classes = load_tokenizer(config.tokenizer).size
        self.head = nn.Linear(backbone.dim, self.classes * config.head_upsampling)
        last = backbone.encoder.num_layers
        if any(not 0 < layer < last for layer in config.intermediate_layers):
            raise HarkenError(
                f"`objective.intermediate_layers` must lie in 1..{last - 1}, got {list(config.intermediate_layers)}"
            )
        self.intermediate_norms = nn.ModuleList(nn.LayerNorm(backbone.dim) for _ in config.intermediate_layers)
        self.attention = config.attention_decoder(backbone.dim, self.classes)

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> TranscriptPrepare:
        """Return the transcript encoder, which leaves out what has too few outputs for a CTC path."""
        prepare = Recogniser.preparer(config, spec, train=train)
        prepare.places = cast(CtcConfig, config.objective).head_upsampling
        prepare.needed = frames_needed
        return prepare

    def search_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what `log_probs` returns."""
        return self.log_probs(batch)

    def log_probs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return log probabilities `(B, T * head_upsampling, V)` in float32 and their lengths `(B,)`.

        The batch's masks are applied.
        """
        encoded = self.encode(batch)
        return self._classify(encoded.last), encoded.lengths * self.config.head_upsampling

    def _classify(self, x: Tensor) -> Tensor:
        logits = self.head(self.dropout(x)).float()
        logits = logits.unflatten(-1, (self.config.head_upsampling, self.classes)).flatten(1, 2)
        return functional.log_softmax(logits, dim=-1)

    def forward(self, batch: Batch) -> Loss:
        """Return the CTC loss summed over the utterances whose transcripts fit.

        With intermediate layers the metric `loss` is still that of the last layer.
        """
        own = self.config
        encoded = self.encode(batch, own.intermediate_layers)
        lengths = encoded.lengths * own.head_upsampling
        log_probs = self._classify(encoded.last)
        main = ctc_loss(log_probs, lengths, batch)
        total = main
        count = main.new_full((), batch.num_targets)
        real = real_mask(lengths, log_probs.shape[1], main.device)
        blanks = ((log_probs.detach().argmax(-1) == BLANK) & real).sum().float()
        metrics = {
            "loss": (main.detach(), count),
            "blank_share": (blanks, main.new_full((), float(lengths.sum()))),
        }
        if own.intermediate_layers:
            hidden = [
                norm(encoded.hidden[layer])
                for norm, layer in zip(self.intermediate_norms, own.intermediate_layers, strict=True)
            ]
            inner = torch.stack([ctc_loss(self._classify(x), lengths, batch) for x in hidden]).mean()
            total = (1 - own.intermediate_weight) * main + own.intermediate_weight * inner
            metrics["loss_intermediate"] = (inner.detach(), count)
        attention, more = self.attend(encoded, batch)
        metrics.update(more)
        total = total + attention
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def head_flops(self, frames: int) -> float:
        """Count the linear head, and the attention decoder's work on frames."""
        heads = 2.0 * frames * self.head.weight.numel() * (1 + len(self.config.intermediate_layers))
        return heads + self.attention_flops(frames)
