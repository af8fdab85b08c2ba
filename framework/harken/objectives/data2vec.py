"""data2vec: a masked student predicts what a slow copy of itself makes of the whole utterance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from harken.config.registry import SlotConfig, register
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.draws import Draws, current_step
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss, Metrics
from harken.data.masking import SpanMask
from harken.encoders.backbone import Backbone
from harken.encoders.base import Encoded
from harken.encoders.teacher import Kind, Teacher
from harken.objectives.base import Objective, Prepare

CHECK_EVERY = 100
"""Steps between two looks for a collapse, each of which waits for the device."""


@dataclass(frozen=True, kw_only=True)
class Data2vecConfig(SlotConfig):
    """Defaults are data2vec Base's for speech (arXiv 2202.03555; fairseq `audio/pretraining/base_librispeech.yaml`)."""

    mask_probability: float = 0.65
    """fairseq `mask_prob`."""
    mask_length: int = 10
    """fairseq `mask_length`, in frames."""
    top_layers: int = 8
    """The last blocks of the teacher whose outputs are averaged. The paper's K; fairseq `average_top_k_layers`."""
    targets: Kind = "auto"
    """Which outputs: `feed_forward`, before its residual connection, is published; `block` takes the whole block's.
    `auto` is the first where the encoder can (the Zipformer's blocks differ in rate and width), else the second."""
    beta: float = 0.0
    """Where smooth L1 turns from square to line; 0 is the squared error. fairseq `loss_beta`."""
    loss_scale: float | None = None
    """Factor on the summed error of a frame; null is 1 / sqrt(the encoder's width). fairseq `loss_scale`."""
    ema_start: float = 0.999
    """The teacher's decay at first. The paper's tau_0; fairseq `ema_decay`."""
    ema_end: float = 0.9999
    """The decay after `ema_steps`. The paper's tau_e; fairseq `ema_end_decay`."""
    ema_steps: int = 30000
    """Steps in which the decay rises linearly. The paper's tau_n; fairseq `ema_anneal_end_step`."""
    ema_reference_seconds: float | None = None
    """Audio of the step that these three are right for: with another `batch.seconds_per_step` the decay is raised to
    the power of the quotient, and a step counts for as many of `ema_steps` (arXiv 2307.13813). None scales nothing."""
    min_target_deviation: float = 0.1
    """The run ends when the targets' deviation over frames falls below. fairseq `min_target_var`."""
    min_prediction_deviation: float = 0.01
    """The same for the predictions. fairseq `min_pred_var`."""
    collapse_after_steps: int = 5000
    """Steps before which nothing ends the run; fairseq has this number in its code."""

    def __post_init__(self) -> None:
        check_numbers(
            self,
            "objective",
            positive=(
                "mask_probability",
                "mask_length",
                "top_layers",
                "loss_scale",
                "ema_steps",
                "ema_reference_seconds",
            ),
            not_negative=("beta", "min_target_deviation", "min_prediction_deviation", "collapse_after_steps"),
            shares=("mask_probability", "ema_start", "ema_end"),
        )

    def span_mask(self) -> SpanMask:
        """Return what draws masks."""
        return SpanMask(probability=self.mask_probability, length=self.mask_length, at_least=1)

    def decay(self, step: int, times: float = 1.0) -> float:
        """Return the teacher's decay after optimiser step `step`; times: see `BatchConfig.times`."""
        done = min(1.0, step * times / self.ema_steps)
        return float((self.ema_end - (self.ema_end - self.ema_start) * (1.0 - done)) ** times)


@dataclass(frozen=True)
class Data2vecPrepare:
    """Draws the masks."""

    spec: FrameSpec
    mask: SpanMask

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `mask` `(B, T)` and `masked`: positions of those frames in the flattened `(B * T)`."""
        mask, _ = self.mask.draw_rows(batch, draws, self.spec)
        masked = np.flatnonzero(mask)
        targets = {"mask": torch.from_numpy(mask), "masked": torch.from_numpy(masked)}
        return replace(batch, targets={**batch.targets, **targets}, num_targets=float(len(masked)))


@register("objective", Data2vecConfig)
class Data2vec(Objective):
    """Regression of the teacher's targets at masked frames.

    The teacher is a moving average of the encoder and shares the frontend (fairseq `ema_transformer_only`). It is part
    of the model's state, so checkpoints hold it and a run continues with it exactly.
    Source: arXiv 2202.03555 section 3; fairseq's `Data2VecAudioModel`.
    """

    def __init__(self, config: Data2vecConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        if run.engine.zero_stage == 3:
            raise HarkenError(
                f"`objective.name: {config.name}` needs whole weights on each rank for its teacher, which "
                "`engine.zero_stage: 3` does not keep: use stage 0, 1 or 2"
            )
        self.config, self.backbone = config, backbone
        self.times = run.batch.times(config.ema_reference_seconds)
        self.width = self.head(run)
        self.teacher = Teacher(backbone.encoder, config.top_layers, config.targets)
        self.scale = self.width**-0.5 if config.loss_scale is None else config.loss_scale
        self._moments: Tensor | None = None  # of this rank's frames in this step

    def head(self, run: RunConfig) -> int:
        """Make what predicts targets; return their width."""
        self.mask = self.config.span_mask()
        self.project = nn.Linear(self.backbone.dim, self.backbone.dim)
        return self.backbone.dim

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> Prepare:
        """Return what draws masks; in validation too, as the loss is over masked frames."""
        return Data2vecPrepare(spec, cast(Data2vecConfig, config.objective).span_mask())

    def forward(self, batch: Batch) -> Loss:
        """Return the error summed over channels, times the scale, summed over masked frames."""
        frames, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, {"mask": batch.targets["mask"]})
        encoded = self.backbone.encoder.encode(x, lengths)
        total, metrics = self.regress(encoded, self.teacher(frames.detach(), lengths), batch)
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def regress(self, encoded: Encoded, targets: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        """Return the error of a student's predictions of targets `(B, T, D)` at masked frames, and its figures."""
        masked = batch.targets["masked"]
        predicted = self.project(encoded.last.flatten(0, 1)[masked]).float()
        target = targets.flatten(0, 1)[masked]
        total = self.errors(predicted, target).sum()
        return total, self.figures(total, predicted, target, batch)

    def errors(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Return the scaled errors `(N,)` of predictions `(N, D)`, summed over channels."""
        if self.config.beta:
            error = functional.smooth_l1_loss(predicted, target, reduction="none", beta=self.config.beta)
        else:
            error = (predicted - target).square()
        return error.sum(-1) * self.scale

    def figures(self, total: Tensor, predicted: Tensor, target: Tensor, batch: Batch) -> Metrics:
        """Return what the log shows of a batch's predictions `(N, D)`; it is kept for the look for a collapse, too."""
        count = total.new_full((), batch.num_targets)
        moments = torch.stack([_moments(target), _moments(predicted.detach())])
        if self.training and batch.num_targets:
            self._moments = moments if self._moments is None else self._moments + moments
        spread = _deviation(moments).to(total.dtype)
        decay = self.config.decay(int(current_step()), self.times)
        return {
            "loss": (total.detach(), count),
            "target_deviation": (spread[0] * count, count),
            "prediction_deviation": (spread[1] * count, count),
            "teacher_decay": (count * decay, count),
        }

    def begin_passes(self) -> None:
        """Forget the frames that are looked at for a collapse."""
        self._moments = None

    def after_step(self, step: int) -> None:
        """Move the teacher; now and then see that nothing has collapsed. Every rank calls it.

        Raises HarkenError, on every rank, when targets or predictions no longer differ from frame to frame.
        """
        self.teacher.update(self.backbone.encoder, self.config.decay(step, self.times))
        if step > self.config.collapse_after_steps and step % CHECK_EVERY == 0:
            self._check_spread(step)
        self._moments = None

    def _check_spread(self, step: int) -> None:
        moments = torch.zeros(2, 3, self.width) if self._moments is None else self._moments
        summed = torch.tensor(distributed.sum_over_ranks(moments.flatten().tolist()), dtype=torch.float64)
        spread = _deviation(summed.view(2, 3, -1)).tolist()
        for name, found in zip(("target", "prediction"), spread, strict=True):
            least = float(getattr(self.config, f"min_{name}_deviation"))
            if found < least:
                raise HarkenError(
                    f"{self.config.name} has collapsed at step {step}: its {name}s differ from frame to frame by "
                    f"{found:.2g}, expected at least `objective.min_{name}_deviation` {least:g}; lower "
                    "`schedule.peak`, lengthen the warm-up, or raise `objective.ema_start`, and continue from a "
                    "checkpoint before it fell"
                )

    def head_flops(self, frames: int) -> float:
        """Count the projection of masked frames, and the teacher, which has no backward pass."""
        project = 2.0 * frames * self.mask.expected_share * self.project.weight.numel()
        return project + self.backbone.encoder.flops(frames) / 3.0


def _moments(x: Tensor) -> Tensor:
    """Return count, sum and sum of squares over frames `(N, D)` as `(3, D)` in float64."""
    count = torch.full((x.shape[1],), float(len(x)), dtype=torch.float64, device=x.device)
    return torch.stack([count, x.sum(0, dtype=torch.float64), x.square().sum(0, dtype=torch.float64)])


def _deviation(moments: Tensor) -> Tensor:
    """Return the standard deviation over frames, a mean over channels, of moments `(..., 3, D)`.

    Source: fairseq's `compute_var`, with its 1e-6 under the root.
    """
    count, total, squares = moments.unbind(-2)
    variance = (squares - total.square() / count.clamp(min=1)) / (count - 1).clamp(min=1)
    return (variance.clamp(min=0) + 1e-6).sqrt().mean(-1)
