"""One batch, a part of a micro-batch: its cuts read, cropped, augmented, padded and prepared.

This runs in the loader's workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
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
from harken.data.mixture import Joined
from harken.data.read import Samples, UnreadableAudioError, read_cut
from harken.data.selection import Selection

if TYPE_CHECKING:
    from lhotse.cut import Cut

Prepare = Callable[[Batch, Sequence[Draws]], Batch]
HALF = 2**20  # above the numbers that the parts of a step have
SUBSTITUTES = 20  # cuts that are tried in the stead of one that cannot be read


@dataclass(frozen=True)
class Task:
    """A batch to be read.

    places: `(B,)` of its cuts in the manifest. epochs: `(B,)` how often each was read before. number: of the batch
    within its step over all ranks.
    """

    places: NDArray[np.integer]
    epochs: NDArray[np.integer]
    number: int = 0

    @classmethod
    def of(cls, places: NDArray[np.integer], epoch: int = 0, number: int = 0) -> Task:
        """Return the task of cuts that are read in one epoch."""
        return cls(places, np.full(len(places), epoch, dtype=np.int32), number)

    def halves(self) -> list[Task]:
        """Return the task in two; none of a single cut. Each piece has a number of its own, which seeds its dropout."""
        middle = len(self.places) // 2
        if not middle:
            return []
        node = self.number // HALF or 1  # of the tree of halves, its root 1: the children of n are 2 n and 2 n + 1
        first = self.number % HALF + 2 * node * HALF
        return [
            Task(self.places[:middle], self.epochs[:middle], first),
            Task(self.places[middle:], self.epochs[middle:], first + HALF),
        ]


@contextmanager
def preparing(cuts: Callable[[], Iterable[str]]) -> Iterator[None]:
    """Let HarkenErrors pass, and make of any other error a RuntimeError that names the cuts.

    Errors are pickled on their way out of a worker, and one whose class cannot be (it is defined in a function, say)
    would be lost, and the run would wait for its batch for ever.
    """
    try:
        yield
    except HarkenError:
        raise
    except Exception as error:
        names = ", ".join(cuts())
        raise RuntimeError(f"preparing cuts {names} failed with {type(error).__name__}: {error}") from error


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
    selection: the cuts of which an unreadable one is replaced; the whole manifest when None.
    max_seconds: padded audio that a micro-batch may hold, before `data.speed` slows it.
    """

    manifest: Manifest | Joined
    config: DataConfig
    prepare: Prepare
    seed: int
    crop_hop: int = 1
    augmentation: Augmentation | None = None
    selection: Selection | None = None
    max_seconds: float = math.inf

    def __getitem__(self, task: Task) -> Batch:
        """Read, augment, pad and prepare a batch."""
        draws = [Draws(self.seed, int(epoch)) for epoch in task.epochs]
        notes: list[Note] = []
        rows = [self._row(int(place), task, own, notes) for place, own in zip(task.places, draws, strict=True)]
        batch = collate(rows)
        return self.prepare(replace(batch, notes=tuple(notes), micro_batch=task.number), draws)

    def _row(self, place: int, task: Task, draws: Draws, notes: list[Note]) -> Row:
        """Read a cut, or in its stead the first readable one of a seeded sequence of others."""
        cut = self.manifest[place]
        try:
            return self._read(cut, draws, notes)
        except UnreadableAudioError as error:
            reason = str(error)
        others = self._substitutes(place, task.places, draws.generator("substitute", cut.id))
        for other in (self.manifest[int(item)] for item in others):
            try:
                row = self._read(other, draws, notes)
            except UnreadableAudioError:
                continue
            notes.append(Note("replaced", cut.id, f"{reason}; `{other.id}` took its place"))
            return row
        raise HarkenError(
            f"{reason}; and {len(others)} others drawn in its stead cannot be read either: "
            f"run `harken data verify {self.manifest.path}`"
        )

    def _read(self, cut: Cut, draws: Draws, notes: list[Note]) -> Row:
        return read_row(cut, self.config, self.crop_hop, self.augmentation, draws, notes)

    def _substitutes(self, place: int, batch: NDArray[np.integer], rng: np.random.Generator) -> NDArray[np.integer]:
        """Draw other places of the selection whose cuts are no longer than the longest of the micro-batch.

        Where these are few, the next longer ones that the batch has room for follow. Which batch a cut is in follows
        from seed and epoch, so the draw is a function of (seed, epoch, cut id) as any other.
        """
        places = np.arange(len(self.manifest)) if self.selection is None else self.selection.places
        others = places[places != place]
        crop = math.inf if self.config.crop_seconds is None else self.config.crop_seconds
        seconds = np.minimum(self.manifest.seconds[others], crop)
        longest = min(float(self.manifest.seconds[batch].max()), crop)
        short = others[seconds <= longest]
        drawn = rng.permutation(short) if len(short) <= SUBSTITUTES else rng.choice(short, SUBSTITUTES, replace=False)
        longer = np.flatnonzero((seconds > longest) & (seconds * len(batch) <= self.max_seconds))
        longer = longer[np.argsort(seconds[longer], kind="stable")] if len(short) < SUBSTITUTES else longer[:0]
        return np.concatenate([drawn, others[longer]])[:SUBSTITUTES]


def read_row(
    cut: Cut, config: DataConfig, hop: int, augmentation: Augmentation | None, draws: Draws, notes: list[Note]
) -> Row:
    """Read, crop and augment a cut, by the draws of its epoch.

    hop: crops begin at multiples of this many samples.
    Raises UnreadableAudioError.
    """
    start = 0
    limit = config.crop_seconds
    name, text = cut.id, " ".join(part.text.strip() for part in cut.supervisions if part.text)
    if limit is not None and cut.duration > limit:
        hops = int((cut.duration - limit) * config.sample_rate) // hop
        start = int(draws.generator("crop", name).integers(0, hops + 1)) * hop
        cut = cut.truncate(offset=start / config.sample_rate, duration=limit)
    samples = read_cut(cut, config.sample_rate)
    if augmentation is not None:
        samples = augmentation(samples, name, draws, notes)
    return Row(name, text, samples, start)


def read_whole(manifest: Manifest, places: Iterable[int], sample_rate: int, unreadable: dict[str, str]) -> Batch | None:
    """Read whole cuts into a batch without targets; None where none could be read.

    unreadable: where the ids of those that could not be read are put, with reasons.
    """
    rows = []
    for place in places:
        cut = manifest[int(place)]
        try:
            rows.append(Row(cut.id, "", read_cut(cut, sample_rate), 0))
        except UnreadableAudioError as error:
            unreadable[cut.id] = str(error)
    return collate(rows) if rows else None


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


def as_it_is(batch: Batch, draws: Sequence[Draws]) -> Batch:
    """Prepare nothing: for decoding and feature extraction."""
    return batch
