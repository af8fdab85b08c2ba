"""Codes of audio by a random projection of its log-mel energies: targets that need no labels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec, Window
from harken.frontends.filterbank import LogMel, LogMelConfig
from harken.nn.masked import normalise_over_time
from harken.units.random_projection import RandomProjection


class RandomCodes(RandomProjection):
    """The codes of a frontend's frames, or of the `rows` patches of each.

    Log-mel energies are normalised over each utterance, and those in the middle of a frame, several of 10 ms, are
    stacked; of `rows` patches each takes its part of the bands, from low to high.
    Source: arXiv 2202.01855 section 3.1; for patches arXiv 2212.09058 section 3.2.1, whose energies are normalised over
    the corpus instead, by which quiet audio is one code.
    """

    def __init__(
        self, spec: FrameSpec, *, bands: int, code_dim: int, codes: int, codebooks: int, seed: int, rows: int = 1
    ) -> None:
        """Draw projections and codes; raises HarkenError where frames or rows do not divide what they are made of."""
        # `name` selects nothing here: it is a field of every slot's configuration
        log_mel = LogMel(LogMelConfig(name="", sample_rate=spec.sample_rate, bands=bands))
        window = Window(log_mel.size, log_mel.hop)
        if spec.stride % window.stride:
            raise HarkenError(
                f"codes of log-mel energies need frames of a multiple of {window.stride} samples (10 ms), got "
                f"{spec.stride} from the frontend"
            )
        if bands % rows:
            raise HarkenError(f"`objective.bands` must be divisible by `encoder.rows`, got {bands} and {rows}")
        super().__init__(spec.middle(window)[1] * bands // rows, code_dim, codes, codebooks, seed)
        self.spec, self.rows, self.window, self.log_mel = spec, rows, window, log_mel

    @torch.no_grad()
    def of_audio(self, inputs: Tensor, lengths: Tensor, frames: int) -> Tensor:
        """Return the codes `(B, frames * rows, codebooks)` of clean samples `(B, S)`, int64, frame by frame."""
        energies = self.log_mel(functional.pad(inputs, (0, max(0, self.window.kernel - inputs.shape[1]))))
        counts = FrameSpec((self.window,), self.spec.sample_rate).num_frames(lengths)
        energies = normalise_over_time(energies, counts if bool((counts < energies.shape[1]).any()) else None)
        first, many = self.spec.middle(self.window)
        places = first + torch.arange(frames * many, device=inputs.device)
        # a frame at the end may see less than it is long: then the last energies are taken twice
        last = (counts.to(inputs.device, non_blocking=True) - 1).clamp(min=0)
        row = torch.arange(len(energies), device=inputs.device)[:, None]
        windows = energies[row, torch.minimum(places, last[:, None])].unflatten(1, (frames, many))
        patches = windows.unflatten(3, (self.rows, -1)).transpose(2, 3).flatten(3)
        codes: Tensor = self(patches.flatten(0, 2)).unflatten(0, (len(energies), frames * self.rows))
        return codes

    def flops(self, frames: int) -> float:
        """Return the operations of the codes of `frames`, a multiply-add counted as two."""
        mel = self.spec.middle(self.window)[1] * self.log_mel.mel.numel()
        return 2.0 * frames * (mel + self.rows * (self.projections.numel() + self.codes.numel()))
