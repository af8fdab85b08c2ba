"""The deal: which reader reads which shard of which epoch, and where each of them is.

A reader is a worker process of a rank. The epochs of a stream, each a seeded permutation of its shards, lie end to end
in one sequence without end, of which the readers take turns. So every shard is read once an epoch, by one reader, for
any number of shards and readers: no reader has fewer than another, and none is ever without one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harken.core.draws import key
from harken.core.permutation import Permutation


@dataclass(frozen=True)
class Reading:
    """A shard to be read. epoch: how often it was read before. shard: its place in the list of shards."""

    epoch: int
    shard: int


@dataclass(frozen=True)
class Epochs:
    """The epochs of a number of shards, end to end."""

    shards: int
    seed: int

    def __getitem__(self, item: int) -> Reading:
        epoch, place = divmod(item, self.shards)
        order = Permutation(self.shards, key(self.seed, epoch, "shards"))
        return Reading(epoch, int(order[np.array([place])][0]))


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where the readers of a stream are: plain data, the same on every rank.

    epoch: of the reader that is furthest behind. rest, tail: the items of the sequence that are dealt: those of `rest`
    first, then all from `tail` on. turns: for each reader, how many shards it has finished. batches: how many batches
    it gave of the one it is reading. given: micro-batches over all ranks since the deal, which say whose turn is next.
    shards, batching: what the list of shards and the making of batches were, for a position means nothing with others.
    """

    epoch: int = 0
    rest: tuple[int, ...] = ()
    tail: int = 0
    turns: tuple[int, ...] = ()
    batches: tuple[int, ...] = ()
    given: int = 0
    shards: str = ""
    batching: str = ""

    @property
    def readers(self) -> int:
        """Readers of all ranks."""
        return len(self.turns)

    def item(self, reader: int, turn: int) -> int:
        """Return the item of the sequence that a reader reads in a turn."""
        place = reader + turn * self.readers
        return self.rest[place] if place < len(self.rest) else self.tail + place - len(self.rest)

    def _unfinished(self) -> tuple[tuple[int, ...], int]:
        """Return the items that were not read to their end, but for those from another on, which none has reached."""
        last = max(reader + turn * self.readers for reader, turn in enumerate(self.turns))
        places = [
            place
            for reader, turn in enumerate(self.turns)
            for place in range(reader + turn * self.readers, last + 1, self.readers)
        ]
        items = [self.item(place % self.readers, place // self.readers) for place in places]
        return tuple(sorted([*items, *self.rest[last + 1 :]])), self.tail + max(0, last + 1 - len(self.rest))

    def dealt_to(self, readers: int) -> StreamPosition:
        """Deal what was not read to its end to another number of readers: what was begun is read again from its start.

        None is left out, for nothing says which cuts of a shard were in the batches that another reader made of it.
        """
        rest, tail = self._unfinished()
        return replace(self, rest=rest, tail=tail, turns=(0,) * readers, batches=(0,) * readers, given=0)

    @property
    def begun(self) -> int:
        """Shards that are being read."""
        return sum(count > 0 for count in self.batches)


def restored(
    saved: Mapping[str, Any], *, readers: int, count: int, shards: str, batching: str
) -> tuple[StreamPosition, str]:
    """Return the position that plain data of a checkpoint means to a loader, and a line that says how exact it is.

    count: shards of the stream. shards, batching: see `StreamPosition`. What was saved may be of another deal, other
    shards, or a manifest.
    """
    fresh = StreamPosition(
        epoch=int(saved.get("epoch", 0)),
        tail=int(saved.get("epoch", 0)) * count,
        turns=(0,) * readers,
        batches=(0,) * readers,
        shards=shards,
        batching=batching,
    )
    if not saved:
        return fresh, ""
    if "turns" not in saved:
        return fresh, f"WARNING the run read a manifest before: it begins the stream with epoch {fresh.epoch}"
    lists = {name: tuple(saved[name]) for name in ("rest", "turns", "batches")}
    old = StreamPosition(**{**saved, **lists})
    if old.shards != shards:
        return fresh, (
            f"WARNING the stream has other shards than before: epoch {fresh.epoch} begins anew with all of them, "
            "and what was read of it is read again"
        )
    if old.readers == readers and old.batching == batching:
        return old, f"the stream goes on exactly where its {readers} readers were, {old.begun} of them within a shard"
    why = f"{old.readers} readers before and {readers} now"
    if old.readers == readers:
        why = "batches are made otherwise than before"
    dealt = replace(old.dealt_to(readers), batching=batching)
    return dealt, (
        f"WARNING {why}: the {old.begun} shards that were begun are read again from their beginning, so that some of "
        "their cuts are seen twice in this epoch; none is left out"
    )
