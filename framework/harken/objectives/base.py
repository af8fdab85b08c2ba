"""What every objective promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import nn

from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.frames import FrameSpec
from harken.core.loss import Loss
from harken.encoders.backbone import Backbone
from harken.nn.compiled import compile_blocks


class Prepare(Protocol):
    """The part of an objective without parameters: it runs in the loader's workers, so it is small and pickles.

    With a method `check(cuts)` (`harken.data.check.Checks`) it says before step 0 what is wrong with cuts.
    """

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add masks, labels and tokens to `targets`, and set `num_targets`.

        Everything drawn for a row comes from its `draws`; rows may be of different epochs.
        """
        ...


class Objective(nn.Module):
    """A backbone, a head and a loss.

    It is built as `cls(config, run=run_config, backbone=backbone)`. Its backbone's parameters are named `backbone.*`.
    needs_causal: it predicts what an encoder that sees later frames would copy (`Encoder.causal`).
    uses_mask_embedding: it masks frames by the backbone's embedding. One that does not leaves it to fine-tuning.
    compares_utterances: it tells utterances of a micro-batch apart, so the loss of one depends on the others.
    """

    needs_causal: ClassVar[bool] = False
    uses_mask_embedding: ClassVar[bool] = True
    compares_utterances: ClassVar[bool] = False

    backbone: Backbone

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> Prepare:
        """Return the objective's `Prepare`; with `train` False, nothing random but what the loss itself needs."""
        raise NotImplementedError

    @staticmethod
    def fingerprint(config: RunConfig) -> dict[str, str]:
        """Return what the targets are made of, by configuration key: a run does not go on with another.

        Files alone that give class ids their meaning, such as label stores and tokenizers; none by default.
        """
        return {}

    def forward(self, batch: Batch) -> Loss:
        """Return the loss summed over the batch's targets."""
        raise NotImplementedError

    def head_flops(self, frames: int) -> float:
        """Return the forward operations of the head over `frames`; small beside the backbone's."""
        return 0.0

    def flops(self, batch: Batch) -> float:
        """Return the operations of a training step over the batch's real audio: forward, and twice that backward.

        A multiply-add counts as two. Recomputed activations do not count.
        """
        backbone = self.backbone
        total = 0.0
        for samples in batch.lengths.tolist():
            frames = backbone.spec.num_frames(samples)
            total += self.frontend_flops(samples) + 3.0 * (backbone.encoder.flops(frames) + self.head_flops(frames))
        return total

    def frontend_flops(self, samples: int) -> float:
        """Return the operations of the frontend in a training step over `samples`; a frozen one has no way back."""
        frontend = self.backbone.frontend
        passes = 3.0 if any(parameter.requires_grad for parameter in frontend.parameters()) else 1.0
        return passes * frontend.flops(samples)

    def compile_blocks(self) -> None:
        """Have torch compile the blocks of the encoder that is trained; see `harken.nn.compiled`."""
        encoder = self.backbone.encoder
        compile_blocks(encoder.repeated(), f"an encoder of {type(encoder).__name__}")

    def begin_passes(self) -> None:
        """Forget what earlier passes left to be counted: those of a step begin, or begin again.

        Earlier ones may have run out of memory, been a trial on noise, or belonged to a step that was not applied.
        """

    def after_step(self, step: int) -> None:
        """Update what no optimiser updates (teachers, temperatures) after optimiser step `step`."""

    def rate_scale(self, parameter: str, step: int) -> float:
        """Return the factor on the learning rate of a parameter at a step: freezing and layer-wise rates."""
        return 0.0 if parameter == "backbone.mask_embedding" and not self.uses_mask_embedding else 1.0
