"""Block masks of sequences and grids, drawn for one sequence at a time."""

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

    def draw_rows(
        self, batch: Batch, draws: Sequence[Draws], spec: FrameSpec, *, rows: int, clones: int = 1
    ) -> dict[str, NDArray[Any]]:
        """Return the masks of a batch, `clones` of each utterance, each row's from its own draws.

        `mask` `(B, M, N)` over N tokens, `rows` a frame; `visible` `(B, M, V)`, places of the other real tokens, -1
        beyond their number; `masked`, the masks' positions when flattened.
        """
        lengths = spec.num_frames(batch.lengths).tolist()
        # the backbone pads what is too short for a frame to one
        tokens = spec.num_frames(max(batch.inputs.shape[1], spec.receptive_field)) * rows
        mask = np.zeros((len(lengths), clones, tokens), dtype=np.bool_)
        for row, (cut, length, own) in enumerate(zip(batch.ids, lengths, draws, strict=True)):
            rng = own.generator("mask", cut)
            for clone in range(clones):
                mask[row, clone, : length * rows] = self.draw(length, rows, rng)
        real = np.arange(tokens)[None] < np.asarray(lengths)[:, None] * rows
        seen = real[:, None] & ~mask
        order = np.argsort(~seen, axis=-1, kind="stable")[..., : max(1, int(seen.sum(-1).max(initial=1)))]
        visible = np.where(np.take_along_axis(seen, order, -1), order, -1)
        return {"mask": mask, "visible": visible, "masked": np.flatnonzero(mask)}
