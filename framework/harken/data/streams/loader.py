"""The loader of a stream: this rank's batches of each step, from any position."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace
from typing import Any

from harken.config.schema import BatchConfig, DataConfig
from harken.core import distributed
from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.data.augment import Augmentation
from harken.data.dataset import Prepare
from harken.data.loader import Step
from harken.data.reader import stream_ahead
from harken.data.streams.batches import WINDOW_CUTS, StreamBatch, StreamBatches
from harken.data.streams.deal import Epochs, StreamPosition, restored
from harken.data.streams.shards import find_shards


class StreamLoader:
    """Yields this rank's share of each step; the worker processes of all ranks are the readers of the stream.

    even_passes: all ranks make equally many passes in a step, as engines need that communicate in each.
    """

    def __init__(
        self,
        config: DataConfig,
        batch: BatchConfig,
        prepare: Prepare,
        *,
        seed: int,
        hop: int,
        rank: int = 0,
        world_size: int = 1,
        even_passes: bool = False,
    ) -> None:
        self.config, self.rank, self.world_size, self.even_passes = config, rank, world_size, even_passes
        self.remedy = "copy broken shards again, or make them anew from what `harken data verify` finds sound"
        self.shards = find_shards(config.train)
        self.per_step = batch.micro_batches_per_step
        self.own = max(1, config.workers)  # without worker processes, this one is the reader
        slowest = min((1.0, *config.speed))
        if batch.max_seconds == "auto":
            raise HarkenError(
                "`batch.max_seconds: auto` measures the durations in a manifest's index, which a stream does not have: "
                "give it a number of seconds"
            )
        limit = batch.max_seconds * slowest  # a slowed cut is longer: fill batches by the longest it can become
        longest = min(config.max_seconds, limit)
        self.dataset = StreamBatches(
            shards=self.shards,
            config=config,
            prepare=prepare,
            augmentation=Augmentation.build(config, None),
            epochs=Epochs(len(self.shards), seed),
            position=StreamPosition(),
            readers=(),
            limit=limit,
            longest=math.inf if config.crop_seconds else longest,
            hop=hop,
        )

    @property
    def readers(self) -> int:
        """Readers of all ranks."""
        return self.world_size * self.own

    def describe(self) -> str:
        """Return what is trained on: how many shards of which kind, and how many readers divide them."""
        kinds = {"WebDataset" if shard.cuts is None else "Lhotse Shar" for shard in self.shards}
        text = f"{len(self.shards)} shards ({' and '.join(sorted(kinds))}) for {self.readers} readers"
        if len(self.shards) >= self.readers:
            return text
        return (
            f"{text}\nWARNING with fewer shards than readers, several epochs are read at the same time, some by each "
            f"reader: make {self.readers} shards or more (`harken data shards --shard-cuts`), or lower `data.workers`"
        )

    def restore(self, saved: Mapping[str, Any]) -> tuple[StreamPosition, str]:
        """Return the position that a checkpoint's plain data means here, and a line on how exact it is."""
        made = (self.dataset.limit, self.dataset.longest, self.config.min_seconds, self.config.crop_seconds)
        return restored(
            saved,
            readers=self.readers,
            count=len(self.shards),
            shards=f"{key(*(shard.audio.rsplit('/', 1)[-1] for shard in self.shards)):016x}",  # the folder may move
            batching=f"{key(*made, WINDOW_CUTS):016x}",
        )

    def steps(self, start: StreamPosition) -> Generator[Step, None, None]:
        """Iterate without end from a position; reaching it reads, of each reader's shard, what was read before."""
        position = start
        before = sum(slot % self.world_size == self.rank for slot in range(start.given % (self.world_size * self.own)))
        own = [self.rank * self.own + (before + turn) % self.own for turn in range(self.own)]
        ahead = stream_ahead(replace(self.dataset, position=start, readers=tuple(own)), self.config)
        held: StreamBatch | None = None
        while True:
            learned: list[StreamBatch] = []
            for slot in range(self.per_step):
                if (position.given + slot) % self.world_size == self.rank:
                    item, held = held or next(ahead), None
                    learned.append(replace(item, batch=replace(item.batch, micro_batch=slot)))
            lacking = (-(-self.per_step // self.world_size) if self.even_passes else 1) - len(learned)
            if lacking > 0:  # it idles with what it learns from next: nothing is left out by that
                held = next(ahead)
            position = self._after(position, learned)
            yield Step([item.batch for item in learned], position, [held.batch] * lacking if held else [])

    def _after(self, position: StreamPosition, learned: list[StreamBatch]) -> StreamPosition:
        """Return the position after a step, that of the readers of all ranks."""
        places = [*position.turns, *position.batches]
        after = places.copy()
        for item in learned:
            after[item.reader], after[self.readers + item.reader] = item.turn, item.batches
        moved = distributed.sum_over_ranks([new - old for new, old in zip(after, places, strict=True)])
        places = [old + int(change) for old, change in zip(places, moved, strict=True)]
        turns, batches = places[: self.readers], places[self.readers :]
        items = [position.item(reader, turn) for reader, turn in enumerate(turns)]
        return replace(
            position,
            epoch=min(items) // len(self.shards),
            turns=tuple(turns),
            batches=tuple(batches),
            given=position.given + self.per_step,
        )
