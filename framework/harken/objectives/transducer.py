"""A transducer on top of any encoder, trained by the pruned loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.data.tokens import BLANK, load_tokenizer
from harken.encoders.backbone import Backbone
from harken.nn.transducer.arcs import Labels, additive_arcs, joined_arcs, kept_positions, prune_starts
from harken.nn.transducer.k2_lattice import lattice_sums
from harken.nn.transducer.networks import Joiner, Predictor, quiet_linear
from harken.objectives.transcripts import Recogniser, TranscriptConfig, TranscriptPrepare, ctc_loss, frames_needed


@dataclass(frozen=True, kw_only=True)
class TransducerConfig(TranscriptConfig):
    """A stateless transducer by the pruned loss (arXiv 2206.13236).

    Options named are those of icefall's recipes `zipformer` and `SSL/hubert`, whose defaults these are.
    """

    predictor_dim: int = 512
    """Width of the embeddings of tokens. icefall `decoder-dim`."""
    context: int = 2
    """Tokens that the predictor sees. icefall `context-size`."""
    joiner_dim: int = 512
    """Width in which frames and predictions are added. icefall `joiner-dim`."""
    prune_range: int = 5
    """Token positions that the joiner scores at each frame; one more than an utterance has tokens: its full lattice.
    icefall `prune-range`."""
    lm_scale: float = 0.25
    """Share of the simple loss in which the predictor is alone. icefall `lm-scale`."""
    am_scale: float = 0.0
    """Share of the simple loss in which the encoder is alone. Above 0 an utterance's loss depends on the others of its
    micro-batch, whose mean prediction takes the predictor's place. icefall `am-scale`."""
    simple_weight: float = 0.5
    """Weight of the simple loss after the warm-up, in which it falls from 1. icefall `simple-loss-scale`."""
    loss_warmup_steps: int = 2000
    """Steps in which the weight of the pruned loss rises from 0.1 to 1 and that of the simple loss falls: ranges are of
    no use before the simple loss has learned. icefall `warm_step`."""
    ctc_weight: float = 0.0
    """Weight of a CTC loss on the encoder's output; 0 has none. icefall `ctc-loss-scale`, 0.2 with `use-ctc`."""
    backend: Literal["auto", "k2", "harken"] = "auto"
    """What sums over alignments: k2's kernels or harken's; `auto` takes k2's on a GPU where k2 imports."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(
            self,
            "objective",
            positive=("predictor_dim", "context", "joiner_dim", "loss_warmup_steps"),
            not_negative=("simple_weight", "ctc_weight"),
            shares=("lm_scale", "am_scale"),
        )
        if self.prune_range < 2:
            raise HarkenError(f"`objective.prune_range` must be at least 2, which paths need, got {self.prune_range}")
        if self.lm_scale + self.am_scale > 1:
            raise HarkenError(
                "`objective.lm_scale` and `objective.am_scale` must be at most 1 together, got "
                f"{self.lm_scale} and {self.am_scale}"
            )


@register("objective", TransducerConfig)
class Transducer(Recogniser):
    """Two transducer losses over one encoder and one predictor, summed over utterances; the targets are tokens.

    The simple loss only adds scores and so covers the whole lattice cheaply; where its paths go, the pruned loss of the
    joiner looks. The model that is searched is encoder, predictor and joiner. With `am_scale` above 0 a batch's loss is
    not the sum of its utterances' alone (see there).
    """

    config: TransducerConfig

    def __init__(self, config: TransducerConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        classes = load_tokenizer(config.tokenizer).size
        self.predictor = Predictor(classes, config.predictor_dim, config.context, BLANK)
        self.joiner = Joiner(backbone.dim, config.predictor_dim, config.joiner_dim, classes)
        self.simple_am = quiet_linear(backbone.dim, classes)
        self.simple_lm = quiet_linear(config.predictor_dim, classes)
        self.ctc = nn.Linear(backbone.dim, classes) if config.ctc_weight else None
        self.attention = config.attention_decoder(backbone.dim, classes)
        # saved with the weights, so that a run that goes on does not warm up again
        self.steps_taken: Tensor
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> TranscriptPrepare:
        """Return the transcript encoder, which leaves out transcripts of more tokens than frames.

        The searches write at most one token a frame, and icefall trains on no others. CTC needs still more frames.
        """
        prepare = Recogniser.preparer(config, spec, train=train)
        if cast(TransducerConfig, config.objective).ctc_weight:
            prepare.needed = frames_needed
        return prepare

    def search_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the joiner's projections of the frames `(B, T, J)` and their lengths `(B,)`; masks are applied."""
        encoded = self.encode(batch)
        return self.joiner.frames(encoded.last).float(), encoded.lengths

    def forward(self, batch: Batch) -> Loss:
        """Return the weighted losses summed over the utterances whose transcripts fit.

        The metric `loss` is the pruned loss, that of the model which is searched.
        """
        own = self.config
        encoded = self.encode(batch)
        x, device = encoded.last, encoded.last.device
        simple, pruned = self._losses(x, self._labels(batch, encoded.lengths.to(device, non_blocking=True)))
        done = (self.steps_taken / own.loss_warmup_steps).clamp(max=1.0)
        total = (1.0 - done * (1.0 - own.simple_weight)) * simple + (0.1 + 0.9 * done) * pruned
        count = total.new_full((), batch.num_targets)
        metrics = {"loss": (pruned.detach(), count), "loss_simple": (simple.detach(), count)}
        if self.ctc is not None:
            log_probs = functional.log_softmax(self.ctc(x).float(), dim=-1)
            ctc = ctc_loss(log_probs, encoded.lengths, batch)
            total = total + own.ctc_weight * ctc
            metrics["loss_ctc"] = (ctc.detach(), count)
        attention, more = self.attend(encoded, batch)
        metrics.update(more)
        total = total + attention
        return Loss(total=encoded.penalised(total), metrics=metrics)

    @staticmethod
    def _labels(batch: Batch, frames: Tensor) -> Labels:
        """Return the tokens; what does not fit counts as empty, so that its lattice has a path, and weighs nothing."""
        lengths = batch.targets["token_lengths"] * (batch.targets["weight"] > 0)
        return Labels(tokens=batch.targets["tokens"], lengths=lengths, frames=frames, blank=BLANK)

    def _losses(self, x: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """Return the simple and the pruned loss of encoded frames `(B, T, D)`, summed over the utterances that fit."""
        own = self.config
        predictions = self.predictor(labels.tokens)
        arcs = additive_arcs(
            self.simple_am(x), self.simple_lm(predictions), labels, lm_scale=own.lm_scale, am_scale=own.am_scale
        )
        simple = lattice_sums(arcs, own.backend)
        starts = prune_starts(simple, labels, own.prune_range)
        positions = kept_positions(starts, predictions.shape[1], own.prune_range)
        logits = self.joiner.joined(self.joiner.frames(x), self.joiner.predictions(predictions), positions)
        pruned = lattice_sums(joined_arcs(logits, positions, labels), own.backend)
        fits = (labels.lengths > 0).to(simple.scores.dtype)
        return -(simple.scores * fits).sum(), -(pruned.scores * fits).sum()

    def after_step(self, step: int) -> None:
        """Move the warm-up of the two losses on."""
        self.steps_taken.fill_(step)

    def head_flops(self, frames: int) -> float:
        """Count what is done for each frame; the predictor's part, for each token, is small beside it."""
        once = [self.simple_am, self.joiner.frames, *([self.ctc] if self.ctc is not None else [])]
        pairs = self.config.prune_range * self.joiner.output.weight.numel()
        return 2.0 * frames * (sum(layer.weight.numel() for layer in once) + pairs) + self.attention_flops(frames)
