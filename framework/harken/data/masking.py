"""Span masks, drawn for one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError


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
