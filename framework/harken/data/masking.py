"""Span masks, drawn for one sequence at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.core.frames import FrameSpec


@dataclass(frozen=True, kw_only=True)
class SpanMask:
    """Masks of spans of one length at uniformly drawn starts; spans may overlap.

    probability: expected share of frames that would be covered if spans did not overlap (fairseq `mask_prob`); the
        number of spans is `probability * frames / length`, rounded up or down at random.
    length: frames of a span (fairseq `mask_length`). at_least: fewest spans (fairseq `min_masks`).
    Source: arXiv 2006.11477 section 3.1 and appendix A; arXiv 2106.07447 section IV-C (0.8 and 10 for HuBERT: the
    paper's 8 % of starts times 10 frames).
    """

    probability: float = 0.8
    length: int = 10
    at_least: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or self.length < 1:
            raise HarkenError(
                "a span mask needs a probability in 0..1 and a length of at least 1, "
                f"got {self.probability} and {self.length}"
            )

    @property
    def expected_share(self) -> float:
        """Share of frames that spans cover, overlaps counted once, in a long sequence."""
        return 1.0 - (1.0 - min(1.0, self.probability / self.length)) ** self.length

    def draw(self, frames: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return `(frames,)` bool, True where masked. At least one frame of a sequence stays unmasked."""
        mask = np.zeros(frames, dtype=np.bool_)
        if self.probability <= 0 or frames < 2:
            return mask
        length = min(self.length, frames - 1)
        count = max(self.at_least, int(self.probability * frames / self.length + rng.random()))
        places = frames - length
        starts = rng.choice(places, size=min(count, places), replace=False)
        mask[(starts[:, None] + np.arange(length)[None, :]).ravel()] = True
        return mask

    def draw_rows(
        self, batch: Batch, draws: Sequence[Draws], spec: FrameSpec
    ) -> tuple[NDArray[np.bool_], NDArray[Any]]:
        """Return the masks `(B, T)` of a batch, each row from its own draws, and its `(B,)` lengths in frames."""
        lengths = spec.num_frames(batch.lengths).numpy()
        masks = np.zeros((len(batch.ids), int(spec.num_frames(batch.inputs.shape[1]))), dtype=np.bool_)
        for row, (cut, length, own) in enumerate(zip(batch.ids, lengths, draws, strict=True)):
            masks[row, :length] = self.draw(int(length), own.generator("mask", cut))
        return masks, lengths
