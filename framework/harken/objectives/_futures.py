"""What objectives share that predict the frames to come: pairs of a context and a future, negatives, figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from harken.config.registry import SlotConfig
from harken.config.rules import check_numbers
from harken.config.schema import RunConfig
from harken.core.batch import Batch, real_mask
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.core.loss import Loss, Metrics
from harken.encoders.backbone import Backbone
from harken.objectives.base import Objective


@dataclass(frozen=True, kw_only=True)
class FuturesConfig(SlotConfig):
    """Which futures are predicted, and what they are told from."""

    steps: int = 12
    """Futures predicted from each context, each by its own map. The papers' K; fairseq `prediction_steps`, CPC_audio
    `nPredicts`."""
    first_step: int = 1
    """Frames from a context to the nearest future. 1 in the papers; fairseq `offset: auto` is the receptive field in
    frames, rounded up, so that no future shares samples with the last frame of its context."""
    negatives: int = 10
    """Frames that a future is told from."""
    negatives_over: Literal["utterance", "batch"] = "utterance"
    """Where they come from: other frames of the same utterance, or of the micro-batch. With `batch` a loss depends on
    which utterances share a micro-batch."""

    def __post_init__(self) -> None:
        check_numbers(self, "objective", positive=("steps", "first_step", "negatives"))


@dataclass(frozen=True)
class FuturesPrepare:
    """Draws the negatives."""

    spec: FrameSpec
    config: FuturesConfig

    def __call__(self, batch: Batch, draws: Sequence[Draws]) -> Batch:
        """Add `negatives` `(B, T, N)`: for each frame the places of others, within its row or in `(B * T)`.

        `num_targets` is the number of pairs of a context and a future. No frame is its own negative.
        """
        own = self.config
        lengths = self.spec.num_frames(batch.lengths).numpy()
        frames = int(self.spec.num_frames(batch.inputs.shape[1]))
        ends = np.cumsum(lengths)
        places = np.concatenate([row * frames + np.arange(length) for row, length in enumerate(lengths)])
        across = own.negatives_over == "batch"
        negatives = np.zeros((len(lengths), frames, own.negatives), dtype=np.int32)
        for row, (cut, length, end, key) in enumerate(zip(batch.ids, lengths, ends, draws, strict=True)):
            pool = int(ends[-1] if across else length)
            if length == 0 or pool < 2:
                continue
            drawn = key.generator("negatives", cut).integers(0, pool - 1, (length, own.negatives))
            first = end - length if across else 0
            drawn += drawn >= (first + np.arange(length))[:, None]  # any other but itself
            negatives[row, :length] = places[drawn] if across else drawn
        steps = own.first_step + np.arange(own.steps)
        pairs = np.maximum(0, lengths[:, None] - steps).sum()
        return replace(
            batch,
            targets={**batch.targets, "negatives": torch.from_numpy(negatives)},
            num_targets=float(pairs),
        )


class Futures(Objective):
    """From each context, by an encoder that looks back only, tells the frames to come from others.

    What is told apart are the frontend's frames, through which gradients flow. A subclass says how futures are
    predicted, and what a future's score and those of its negatives cost. A pair counts where both its frames exist.
    """

    needs_causal: ClassVar[bool] = True
    uses_mask_embedding: ClassVar[bool] = False

    def __init__(self, config: FuturesConfig, run: RunConfig, backbone: Backbone) -> None:
        super().__init__()
        if not backbone.encoder.causal:
            raise HarkenError(
                f"`objective.name: {config.name}` predicts frames to come, which `encoder.name: {run.encoder.name}` "
                "sees: choose one that looks back only, `causal_convolution` or `recurrent`"
            )
        self.config, self.backbone = config, backbone

    @staticmethod
    def preparer(config: RunConfig, spec: FrameSpec, *, train: bool) -> FuturesPrepare:
        """Return what draws negatives; in validation too, as the loss is made of them."""
        return FuturesPrepare(spec, cast(FuturesConfig, config.objective))

    def predict(self, context: Tensor, index: int) -> Tensor:
        """Return the predictions `(B, T, F)`, from contexts `(B, T, D)`, of the future with an index from 0."""
        raise NotImplementedError

    def cost(self, truth: Tensor, others: Tensor) -> Tensor:
        """Return the loss `(...)` of scores `(...)` of true futures and `(..., N)` of their negatives."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Loss:
        """Return the loss summed over pairs of a context and a future, with the accuracy at each step ahead."""
        # nothing is masked; the mask embedding, which fine-tuning needs, has a gradient of zeros on every rank
        size = batch.targets["negatives"].shape[:2]
        nothing = {"mask": torch.zeros(size, dtype=torch.bool, device=batch.inputs.device)}
        frames, x, lengths = self.backbone.embed(batch.inputs, batch.lengths, nothing)
        encoded = self.backbone.encoder.encode(x, lengths)
        real = real_mask(lengths, frames.shape[1]).to(frames.device, non_blocking=True)
        total = frames.new_zeros((), dtype=torch.float32)
        hits, pairs, metrics = total.clone(), total.clone(), cast(Metrics, {})
        for index in range(self.config.steps):
            step = self.config.first_step + index
            counted = _later(real, step) & real
            truth, others = self._scores(_later(self.predict(encoded.last, index), step), frames, batch)
            total = total + (self.cost(truth, others) * counted).sum()
            right = ((truth > others.amax(-1)) & counted).sum().float()
            count = counted.sum().float()
            metrics[f"accuracy_{step}"] = (right, count)
            hits, pairs = hits + right, pairs + count
        metrics = {"loss": (total.detach(), pairs), "accuracy": (hits, pairs), **metrics}
        return Loss(total=encoded.penalised(total), metrics=metrics)

    def _scores(self, predictions: Tensor, frames: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the products with true futures `(B, T)` and negatives `(B, T, N)` of predictions `(B, T, F)` of them.

        All products of a row (of a micro-batch, where negatives are of it) are made and the negatives' are picked:
        no frames x negatives x width tensor exists.
        """
        negatives = batch.targets["negatives"].long()
        with torch.autocast(frames.device.type, enabled=False):
            predictions, frames = predictions.float(), frames.float()
            truth = (predictions * frames).sum(-1)
            if self.config.negatives_over == "batch":
                every = predictions.flatten(0, 1) @ frames.flatten(0, 1).T
                return truth, every.gather(1, negatives.flatten(0, 1)).view_as(negatives)
            return truth, (predictions @ frames.transpose(1, 2)).gather(2, negatives)

    def head_flops(self, frames: int) -> float:
        """Count the predictions and their products with the frames of the utterance."""
        products = 2.0 * frames * frames * self.backbone.frontend.dim
        return self.config.steps * (self.predictor_flops(frames) + products)

    def predictor_flops(self, frames: int) -> float:
        """Return the operations of the predictions of one step ahead."""
        raise NotImplementedError


def _later(x: Tensor, step: int) -> Tensor:
    """Return `x` `(B, T, ...)` moved behind by `step` frames, zeros before: its value for the frame it predicts."""
    kept = x[:, : max(0, x.shape[1] - step)]
    return functional.pad(kept, (0, 0) * (x.dim() - 2) + (x.shape[1] - kept.shape[1], 0))
