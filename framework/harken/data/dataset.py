"""One micro-batch: its cuts read, cropped, augmented, padded and prepared. This runs in the loader's workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from harken.config.schema import DataConfig
from harken.core.batch import Batch, Note
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.augment import Augmentation
from harken.data.manifest import Manifest
from harken.data.read import Samples, UnreadableAudioError, read_cut

if TYPE_CHECKING:
    from lhotse.cut import Cut

Prepare = Callable[[Batch, Draws], Batch]


@dataclass(frozen=True)
class Task:
    """A micro-batch to be read: its epoch, its step in the epoch, its place in the step, its cuts' manifest places."""

    epoch: int
    step: int
    micro_batch: int
    places: NDArray[np.int64]


@dataclass(frozen=True)
class Row:
    """One cut as it goes into a batch."""

    cut: str
    text: str
    samples: Samples
    start: int


@dataclass(frozen=True)
class MicroBatches(torch.utils.data.Dataset[Batch]):
    """Maps a Task to a Batch; everything random comes from (seed, epoch, cut id).

    crop_hop: crops begin at multiples of this many samples, the frontend's stride, so that labels keep their alignment.
    """

    manifest: Manifest
    config: DataConfig
    prepare: Prepare
    seed: int
    crop_hop: int = 1
    augmentation: Augmentation | None = None

    def __getitem__(self, task: Task) -> Batch:
        """Read, augment, pad and prepare a micro-batch."""
        draws = Draws(self.seed, task.epoch)
        notes: list[Note] = []
        rows = [self._row(int(place), draws, notes) for place in task.places]
        batch = collate(rows)
        return self.prepare(replace(batch, notes=tuple(notes), micro_batch=task.micro_batch), draws)

    def _row(self, place: int, draws: Draws, notes: list[Note]) -> Row:
        """Read a cut, or in its stead the first readable one of a seeded sequence of others."""
        cut = self.manifest[place]
        try:
            return self._read(cut, draws)
        except UnreadableAudioError as error:
            reason = str(error)
        rng = draws.generator("substitute", cut.id)
        for _ in range(20):
            other = self.manifest[int(rng.integers(len(self.manifest)))]
            try:
                row = self._read(other, draws)
            except UnreadableAudioError:
                continue
            notes.append(Note("replaced", cut.id, f"{reason}; `{other.id}` took its place"))
            return row
        raise HarkenError(
            f"{reason}; and 20 others drawn in its stead cannot be read either: "
            f"run `harken data verify {self.manifest.path}`"
        )

    def _read(self, cut: Cut, draws: Draws) -> Row:
        start = 0
        limit = self.config.crop_seconds
        name, text = cut.id, " ".join(part.text.strip() for part in cut.supervisions if part.text)
        if limit is not None and cut.duration > limit:
            rate = self.config.sample_rate
            hops = int((cut.duration - limit) * rate) // self.crop_hop
            start = int(draws.generator("crop", name).integers(0, hops + 1)) * self.crop_hop
            cut = cut.truncate(offset=start / rate, duration=limit)
        samples = read_cut(cut, self.config.sample_rate)
        if self.augmentation is not None:
            samples = self.augmentation(samples, name, draws)
        return Row(name, text, samples, start)


def collate(rows: list[Row]) -> Batch:
    """Pad rows with zeros at the end into one batch."""
    lengths = torch.tensor([len(row.samples) for row in rows], dtype=torch.int64)
    inputs = torch.zeros(len(rows), int(lengths.max()))
    for index, row in enumerate(rows):
        inputs[index, : len(row.samples)] = torch.from_numpy(row.samples)
    return Batch(
        ids=tuple(row.cut for row in rows),
        inputs=inputs,
        lengths=lengths,
        texts=tuple(row.text for row in rows),
        starts=torch.tensor([row.start for row in rows], dtype=torch.int64),
    )


def as_it_is(batch: Batch, draws: Draws) -> Batch:
    """Prepare nothing: for decoding and feature extraction."""
    return batch
