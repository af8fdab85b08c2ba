"""A CTC model as alignments and the report look at it: its outputs, and where in the audio they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harken.config.schema import RunConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec
from harken.data.tokens import Tokenizer, load_tokenizer
from harken.objectives.ctc import Ctc, CtcConfig
from harken.objectives.saved import load_objective


@dataclass(frozen=True, kw_only=True)
class CtcModel:
    """What a saved `ctc` model gives for audio, without the objective that trained it.

    log_probs: maps a batch of waveforms to log probabilities `(B, T, V)` and their lengths `(B,)`; 0 is the blank.
    spec: of the encoder's frames. outputs_per_frame: how many of the T are made of one frame, side by side in time.
    """

    name: str
    log_probs: Callable[[Batch], tuple[Tensor, Tensor]]
    spec: FrameSpec
    tokenizer: Tokenizer
    outputs_per_frame: int = 1

    @property
    def output_seconds(self) -> float:
        """Seconds between two outputs."""
        return self.spec.stride / self.outputs_per_frame / self.spec.sample_rate

    def seconds(self, output: float) -> float:
        """Return where in the audio an output has its middle; half an output less is the boundary before it.

        The outputs of a frame share out its stride around the middle of what the frame saw.
        """
        first = (self.spec.receptive_field - 1) / 2 / self.spec.sample_rate
        return first + (output - (self.outputs_per_frame - 1) / 2) * self.output_seconds


def load_ctc(folder: str | Path, device: str = "cpu") -> tuple[CtcModel, RunConfig]:
    """Load a saved CTC model in evaluation mode, and its configuration.

    device: the model and the batches that it is given go there. Raises HarkenError for another objective's model.
    """
    model, config = load_objective(folder)
    own = config.objective
    if not isinstance(model, Ctc) or not isinstance(own, CtcConfig):
        raise HarkenError(f"{folder} must be a CTC model, and it was trained with `{own.name}`")
    place = torch.device(device)
    model.to(place)
    loaded = CtcModel(
        name=str(folder),
        log_probs=lambda batch: model.log_probs(batch.to(place)),
        spec=model.backbone.spec,
        tokenizer=load_tokenizer(own.tokenizer),
        outputs_per_frame=own.head_upsampling,
    )
    return loaded, config
