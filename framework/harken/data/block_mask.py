"""Block masks of sequences and grids, drawn for one sequence at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harken.core.errors import HarkenError


@dataclass(frozen=True, kw_only=True)
class BlockMask:
    """Masks of an exact share of the tokens: blocks at uniformly drawn places, then single tokens added or taken away.

    probability: share of the tokens that is masked. length: side of a block, in tokens of time and of rows; a sequence
        has spans. adjust: more share to draw blocks for, as blocks overlap. inverse: draw the visible blocks instead.
    Source: arXiv 2212.07525 section 3.3 ("inverse block masking"); fairseq's `compute_block_mask_1d`, EAT's
    `compute_block_mask_2d`.
    """

    probability: float
    length: int
    adjust: float = 0.0
    inverse: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.probability < 1 or self.length < 1 or self.adjust < 0:
            raise HarkenError(
                "a block mask needs a probability between 0 and 1, a length of at least 1 and no negative adjustment, "
                f"got {self.probability}, {self.length} and {self.adjust}"
            )

    def draw(self, frames: int, rows: int, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return `(frames * rows,)` bool, True where masked, frame by frame. One token at least stays visible."""
        tokens = frames * rows
        if tokens < 2:
            return np.zeros(tokens, dtype=np.bool_)
        share = 1.0 - self.probability if self.inverse else self.probability
        wanted = min(tokens - 1, max(1, int(tokens * share)))
        area = self.length if rows == 1 else self.length**2
        grid = np.zeros((frames, rows), dtype=np.bool_)
        before = self.length // 2
        for centre in rng.integers(tokens, size=int(tokens * (share + self.adjust) / area)):
            time, row = divmod(int(centre), rows)
            first, low = max(0, time - before), max(0, row - before)
            grid[first : time - before + self.length, low : row - before + self.length] = True
        drawn = grid.ravel()
        surplus = int(drawn.sum()) - wanted
        changed = rng.choice(np.flatnonzero(drawn if surplus > 0 else ~drawn), abs(surplus), replace=False)
        drawn[changed] = surplus < 0
        return ~drawn if self.inverse else drawn
