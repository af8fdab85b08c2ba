"""Batches of a stream, made by one reader: it reads shards, puts cuts of similar lengths together and decodes them.

This runs in the loader's workers.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from lhotse.dataset.sampling.base import TimeConstraint
from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketer, estimate_duration_buckets
from torch.utils.data import IterableDataset

from harken.config.schema import DataConfig
from harken.core.batch import Batch, Note
from harken.core.draws import Draws, key
from harken.core.errors import HarkenError
from harken.data.augment import Augmentation
from harken.data.dataset import Prepare, collate, preparing, read_row
from harken.data.read import UnreadableAudioError
from harken.data.streams.deal import Epochs, Reading, StreamPosition
from harken.data.streams.read import Lost, read_shard
from harken.data.streams.shards import Shard

if TYPE_CHECKING:
    from lhotse.cut import Cut

WINDOW_CUTS = 2000
"""Cuts that a reader holds in memory at most: the shards of more are bucketed in pieces of this many."""
MOST_BUCKETS = 30


@dataclass
class PaddedSeconds(TimeConstraint):  # type: ignore[misc]
    """Lhotse's limit of a batch, with every cut as long as the longest of its bucket.

    Lhotse's own may be broken by the last cut that is drawn, where that is longer than those before it; then a batch
    needs more memory than `batch.max_seconds` says.

    crop: what longer cuts are cut to. bounds: ascending, the longest cut of each bucket.
    """

    longest_seen: float = 0.0
    crop: float = math.inf
    bounds: list[float] = field(default_factory=list)

    def measure_length(self, example: Cut) -> float:
        """Return what a cut costs, in seconds."""
        return min(float(example.duration), self.crop)

    def add(self, example: Cut) -> None:
        """Count a cut."""
        self.num_cuts += 1
        self.longest_seen = max(self.longest_seen, self.bounds[bisect_left(self.bounds, self.measure_length(example))])


def bucketed(cuts: list[Cut], limit: float, crop: float, seed: int) -> Iterator[list[Cut]]:
    """Yield every cut once, in batches of at most `limit` padded seconds, by Lhotse's dynamic bucketing.

    It is the heart of Lhotse's DynamicBucketingSampler, without what is around it: that ends at the first empty bucket
    and loses what others hold (without `sync_buckets`), or draws buckets by the worker's number (with it), which a
    restart may change.
    The number of buckets balances two losses: few pad more, and each leaves one batch half empty at the end.
    """
    measure = PaddedSeconds(crop=crop)
    seconds = [measure.measure_length(cut) for cut in cuts]
    wanted = min(MOST_BUCKETS, round(math.sqrt(sum(seconds) / limit)))
    ends = estimate_duration_buckets(cuts, wanted, measure) if 1 < wanted <= len(cuts) else []
    ends = sorted({float(end) for end in ends if end < max(seconds)})
    batches = DynamicBucketer(
        cuts,
        duration_bins=ends,
        world_size=1,
        constraint=PaddedSeconds(max_duration=limit, crop=crop, bounds=[*ends, max(seconds)]),
        buffer_size=len(cuts),
        shuffle=True,
        rng=random.Random(key(seed, "cuts")),
        bucket_rng=random.Random(key(seed, "buckets")),
    )
    for batch in batches:
        yield list(batch)


@dataclass(frozen=True)
class StreamBatch:
    """What a reader hands over. reader, turn, batches: where it is after this batch, see `StreamPosition`."""

    batch: Batch
    reader: int
    turn: int
    batches: int

    def pin_memory(self) -> StreamBatch:
        """Pin the batch; called by torch's DataLoader in its pin thread."""
        return replace(self, batch=self.batch.pin_memory())


@dataclass(frozen=True)
class StreamBatches(IterableDataset[StreamBatch]):
    """The batches of the readers of a rank, without end; everything random comes from (seed, epoch, cut id).

    readers: of this rank, in the order of their turns: worker w is the w-th. limit: padded seconds of a batch.
    longest: of a cut, in seconds; infinite where longer ones are cropped. hop: see `read_row`.
    """

    shards: list[Shard]
    config: DataConfig
    prepare: Prepare
    augmentation: Augmentation
    epochs: Epochs
    position: StreamPosition
    readers: Sequence[int]
    limit: float
    longest: float
    hop: int

    def __iter__(self) -> Iterator[StreamBatch]:
        info: Any = torch.utils.data.get_worker_info()
        reader = self.readers[info.id if info is not None else 0]
        turn, skip = self.position.turns[reader], self.position.batches[reader]
        empty = 0
        notes: list[Note] = []
        while True:
            reading = self.epochs[self.position.item(reader, turn)]
            empty += 1
            for count, cuts in enumerate(self._batches(reading, notes), start=1):
                batch = self._batch(cuts, reading.epoch, notes) if count > skip else None
                if batch is not None:
                    yield StreamBatch(replace(batch, notes=(*batch.notes, *notes)), reader, turn, count)
                    notes.clear()  # not another list: what reads the shard notes into this one
                if batch is not None or count <= skip:
                    empty = 0
            if empty >= len(self.shards):
                raise HarkenError(self._nothing(notes))
            turn, skip = turn + 1, 0

    def _nothing(self, notes: list[Note]) -> str:
        first = f"; the first: {notes[0].reason}" if notes else ""
        return f"none of {len(self.shards)} shards of `{self.config.train}` has a cut that can be trained on{first}"

    def _batches(self, reading: Reading, notes: list[Note]) -> Iterator[list[Cut]]:
        """Yield the batches of a shard, not yet decoded."""
        shard, crop = self.shards[reading.shard], self.config.crop_seconds
        cuts = self._kept(shard, notes)
        piece = 0
        while window := list(islice(cuts, WINDOW_CUTS)):
            seed = key(self.epochs.seed, reading.epoch, reading.shard, piece, "buckets")
            yield from bucketed(window, self.limit, math.inf if crop is None else crop, seed)
            piece += 1

    def _kept(self, shard: Shard, notes: list[Note]) -> Iterator[Cut]:
        """Yield the cuts of a shard that are neither too short nor too long, and note what else there is."""
        outside = total = 0
        for item in read_shard(shard):
            total += 1
            if isinstance(item, Lost):
                notes.append(Note("unreadable", item.id, item.reason))
            elif self.config.min_seconds <= item.duration <= self.longest:
                yield item
            else:
                outside += 1
        if outside:
            limits = f"shorter than {self.config.min_seconds:g} s or longer than {self.longest:g} s"
            text = f"{outside} of {total} cuts of shard {shard} are {limits} (`data.min_seconds`, `data.max_seconds`)"
            notes.append(Note("of another length", str(shard), text))

    def _batch(self, cuts: list[Cut], epoch: int, notes: list[Note]) -> Batch | None:
        """Decode and prepare; cuts that cannot be read are left out and noted. None when none can be read."""
        draws, rows = Draws(self.epochs.seed, epoch), []
        for cut in cuts:
            try:
                rows.append(read_row(cut, self.config, self.hop, self.augmentation, draws, notes))
            except UnreadableAudioError as error:
                notes.append(Note("unreadable", cut.id, str(error)))
        with preparing(lambda: (row.cut for row in rows)):
            return self.prepare(collate(rows), [draws] * len(rows)) if rows else None
