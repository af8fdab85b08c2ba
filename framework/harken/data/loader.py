"""Loaders: this rank's batches of each step, in the order of the plan, from any position."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from harken.config.schema import BatchConfig, DataConfig
from harken.core.batch import Batch
from harken.core.errors import HarkenError
from harken.data.augment import Augmentation
from harken.data.dataset import MicroBatches, Prepare, Task
from harken.data.limits import Limits, LimitState
from harken.data.manifest import Manifest
from harken.data.mixture import Joined, Leaf, is_mixture, read_mixture
from harken.data.order import EpochOrder, Planner, Position, segments_of
from harken.data.plan import Plan, rectangles
from harken.data.reader import read_ahead, read_batch
from harken.data.selection import Selection, select
from harken.data.shares import MixtureOrder, Source
from harken.data.streams.shards import is_stream


class Place(Protocol):
    """Where a run is in its data: a dataclass of plain values, which only the loader that made it can interpret."""

    @property
    def epoch(self) -> int:
        """How often all of the data was read before."""
        ...


@dataclass(frozen=True)
class Step:
    """One rank's share of an optimiser step.

    batches: to be learned from. idle: to be run without weight, for as many passes as the busiest rank makes. position:
    where the run is after the step. sources: seconds of each source of a mixture in the step, over all ranks. tasks:
    what each of `batches` was read from.
    """

    batches: list[Batch]
    position: Place
    idle: list[Batch] = field(default_factory=list)
    sources: dict[str, float] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)


@dataclass(frozen=True)
class Share:
    """Which parts of a step a rank runs: numbers of parts in the plan, those to learn from and those to idle with."""

    parts: list[int]
    idle: list[int]


def share_of(plan: Plan, step: int, rank: int, world_size: int, *, even: bool) -> Share:
    """Return a rank's share of a step: every `world_size`-th micro-batch.

    even: all ranks make equally many passes, as engines need that communicate in each. A rank without a micro-batch
    makes one in any case. It idles with the step's smallest part.
    """
    first, last = step * plan.per_step, (step + 1) * plan.per_step
    counts = np.diff(plan.bounds[first : last + 1])
    passes = np.bincount(np.arange(plan.per_step) % world_size, weights=counts, minlength=world_size)
    parts = [
        number
        for slot in range(first + rank, last, world_size)
        for number in range(int(plan.bounds[slot]), int(plan.bounds[slot + 1]))
    ]
    lacking = (int(passes.max()) if even else 1) - len(parts)
    if lacking <= 0:
        return Share(parts, [])
    smallest = min(plan.parts_of(step), key=lambda number: len(plan.part(number)))
    return Share(parts, [smallest] * lacking)


class StepTasks:
    """This rank's tasks of each step.

    A plan is made for a whole segment. Limits that were lowered within it divide what is still to come: the same cuts
    in the same steps, in more rectangles.
    """

    def __init__(self, planner: Planner, rank: int, world_size: int, *, even: bool) -> None:
        self.planner, self.rank, self.world_size, self.even = planner, rank, world_size, even

    def at(self, position: Position) -> tuple[list[Task], list[Task]]:
        """Return what is learned from in the step at a position, and what this rank idles with."""
        pool, plan = self.planner.segment(position.epoch, position.segment)
        share = share_of(plan, position.step, self.rank, self.world_size, even=self.even)
        begin = plan.parts_of(position.step).start

        def task(number: int) -> Task:
            rows = plan.part(number)
            return Task(pool.places[rows], pool.epochs[rows], number - begin)

        def pieces(numbers: list[int]) -> list[Task]:
            return [piece for one in numbers for piece in self._pieces(task(one), pool.seconds[plan.part(one)])]

        limits = self.planner.limits
        if limits.now == limits.of(position.epoch, position.segment):
            return [task(number) for number in share.parts], [task(number) for number in share.idle]
        learned, lacking = pieces(share.parts), len(share.idle) if not share.parts else 0
        if self.even:
            others = (
                share_of(plan, position.step, other, self.world_size, even=False) for other in range(self.world_size)
            )
            lacking = max(len(pieces(other.parts)) for other in others) - len(learned)
        return learned, [min(map(task, share.idle or share.parts), key=lambda one: len(one.places))] * lacking

    def _pieces(self, task: Task, seconds: NDArray[np.float32]) -> list[Task]:
        """Halve what is above the limits of today until nothing is, or single cuts are."""
        texts = self.planner.texts(task.places)
        limit = self.planner.limits.now.at(float(seconds.max()), 0.0 if texts is None else float(texts.max()))
        if float(seconds.max()) * len(seconds) <= limit or not (halves := task.halves()):
            return [task]
        middle = len(halves[0].places)
        return [*self._pieces(halves[0], seconds[:middle]), *self._pieces(halves[1], seconds[middle:])]


class TaskStream(Sampler[Task]):
    """This rank's tasks from a position on, without end."""

    def __init__(self, tasks: StepTasks, start: Position) -> None:
        self.tasks, self.start = tasks, start

    def __iter__(self) -> Iterator[Task]:
        position = self.start
        while True:
            learned, idle = self.tasks.at(position)
            yield from (*learned, *idle)
            position = self.tasks.planner.after(position)


class TrainLoader:
    """Yields this rank's share of each step.

    limits: of the rectangles, as a run that is continued has them. even_passes: see `share_of`. With
    `batch.max_seconds: auto` it gives steps once `limit` has told it what was measured.
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
        limits: LimitState | None = None,
    ) -> None:
        leaves = read_mixture(config.train) if is_mixture(config.train) else []
        manifest: Manifest | Joined = (
            Joined(Path(config.train), [leaf.manifest for leaf in leaves]) if leaves else Manifest.filled(config.train)
        )
        self.config, self.even_passes = config, even_passes
        self.remedy = f"run `harken data verify {config.train}`"  # what mends audio that cannot be read
        self.rank, self.world_size = rank, world_size
        self._slowest = slowest = min(config.speed, default=1.0)
        most = batch.seconds_per_step if batch.max_seconds == "auto" else batch.micro_batch_seconds
        longest = config.max_seconds if not config.speed else min(config.max_seconds, most * slowest)
        self.selection = select(np.asarray(manifest.seconds), config.min_seconds, longest, config.crop_seconds)
        if slowest < 1.0:  # a slowed cut is longer: fill batches by the longest it can become
            self.selection = Selection(
                self.selection.places, self.selection.seconds / np.float32(slowest), self.selection.dropped
            )
        augmentation = Augmentation.build(config, manifest)
        self.dataset = MicroBatches(manifest, config, prepare, seed, hop, augmentation, self.selection)
        if limits is None and batch.max_seconds == "auto":
            limits = LimitState.begin(Limits(batch.seconds_per_step))
        self.mixture = _mixed(leaves, self.selection, batch, seed) if leaves else None
        order = self.mixture or EpochOrder.of(self.selection, batch, seed)
        self.planner = Planner(order, batch, seed, limits)
        self.limit(self.planner.limits)

    def limit(self, limits: LimitState) -> None:
        """Plan and divide by these limits from the next step on; the same on every rank."""
        if limits.now.characters and self.planner.characters is None:
            self.planner.characters = self.dataset.manifest.characters
        self.planner.limit(limits)
        self.dataset = replace(self.dataset, max_seconds=limits.now.least * min(self._slowest, 1.0))

    def describe(self) -> str:
        """Return what is trained on and what was left out, and the steps of an epoch or the shares of a mixture."""
        return f"{self._describe()}{self._unbalanced()}"

    def _unbalanced(self) -> str:
        batch = self.planner.batch
        count = self.world_size if batch.max_seconds == "auto" else batch.micro_batches_per_step  # it divides itself
        if count % self.world_size == 0:
            return ""
        return (
            f"\nWARNING {count} micro-batches of a step over {self.world_size} processes: some are idle for a part of "
            "each step; let `batch.seconds_per_step` be `batch.max_seconds` x processes x a whole number"
        )

    def _describe(self) -> str:
        if self.mixture is not None:
            return "\n".join([f"{self.selection.describe()}; a mixture without epochs of", *self.mixture.describe()])
        about = "" if self.planner.order.segments(0) == 1 else "about "
        return f"{self.selection.describe()}; {about}{self.planner.steps(0):.0f} steps an epoch"

    def cost(self, task: Task) -> tuple[float, float]:
        """Return what the plan counts for a task's longest cut, in seconds, and for its longest text, in characters."""
        seconds = float(self.dataset.manifest.seconds[task.places].max())
        texts = self.planner.texts(task.places)
        crop = self.config.crop_seconds or seconds
        return min(seconds, crop) / min(self._slowest, 1.0), 0.0 if texts is None else float(texts.max())

    def smallest(self) -> Batch:
        """Read the shortest cut in this process: what a rank runs that has nothing else to run."""
        return self.dataset[Task.of(self.selection.places[[int(self.selection.seconds.argmin())]])]

    def restore(self, saved: Mapping[str, Any]) -> tuple[Position, str]:
        """Return the position that a checkpoint's plain data means here, and a line where it is not exact."""
        if "turns" not in saved:
            return Position(**saved), ""
        epoch = int(saved["epoch"])
        return Position(epoch), f"WARNING the run read a stream before: it begins the manifest with epoch {epoch}"

    def steps(self, start: Position) -> Generator[Step, None, None]:
        """Iterate without end from a position; reaching the first batch costs the same wherever the position is.

        What was read ahead by limits that have changed since is thrown away.
        """
        tasks = StepTasks(self.planner, self.rank, self.world_size, even=self.even_passes)
        position, limits = start, None
        while True:
            if limits is not self.planner.limits:
                limits = self.planner.limits
                batches = read_ahead(self.dataset, TaskStream(tasks, position), self.config)
            learned, idle = tasks.at(position)
            read = [next(batches) for _ in (*learned, *idle)]
            seconds = self._by_source(position)
            position = self.planner.after(position)
            yield Step(read[: len(learned)], position, read[len(learned) :], seconds, learned)

    def _by_source(self, position: Position) -> dict[str, float]:
        """Return what each source gives to a step over all ranks, in seconds."""
        if self.mixture is None:
            return {}
        pool, plan = self.planner.segment(position.epoch, position.segment)
        assert pool.sources is not None
        parts = plan.parts_of(position.step)
        rows = plan.order[plan.parts[parts.start] : plan.parts[parts.stop]]
        names = [source.name for source in self.mixture.sources]
        seconds = np.bincount(pool.sources[rows], weights=pool.seconds[rows], minlength=len(names))
        return dict(zip(names, seconds.tolist(), strict=True))


def _mixed(leaves: list[Leaf], selection: Selection, batch: BatchConfig, seed: int) -> MixtureOrder:
    """Return the order of a mixture, in segments of about as many seconds as those of one corpus would have."""
    ends = np.cumsum([len(leaf.manifest) for leaf in leaves])
    sources, start = [], 0
    for leaf, end in zip(leaves, np.searchsorted(selection.places, ends).tolist(), strict=True):
        if start == end:
            raise HarkenError(
                f"`{leaf.name}` of the mixture has no cut between `data.min_seconds` and `data.max_seconds`"
            )
        rows = slice(start, end)
        sources.append(Source(leaf.name, selection.places[rows], selection.seconds[rows], leaf.share, leaf.max_repeats))
        start = end
    total = sum(source.total for source in sources)
    return MixtureOrder(sources, seed, total / segments_of(selection.seconds, batch))


class EvalLoader:
    """Every cut of a manifest once and whole, in batches by duration; ranks divide the batches.

    `data.crop_seconds` is for training: a figure over all of the audio has no draw in it, and labels keep their frames.
    """

    def __init__(
        self, path: str, config: DataConfig, max_seconds: float, prepare: Prepare, *, rank: int = 0, world_size: int = 1
    ) -> None:
        if is_stream(path):
            raise HarkenError(
                f"`{path}` is a stream, and what is read whole and by duration must be an indexed manifest: "
                "`harken data shards STREAM --out NAME.jsonl` makes one"
            )
        manifest = Manifest.filled(path)
        self.config, self.rank, self.world_size = replace(config, crop_seconds=None), rank, world_size
        seconds = np.asarray(manifest.seconds)
        longest = float(seconds.max())
        self.batches = rectangles(seconds, max_seconds)
        self.dataset = MicroBatches(
            manifest,
            self.config,
            prepare,
            0,
            selection=select(seconds, 0.0, longest, None),
            max_seconds=max(max_seconds, longest),
        )

    def __len__(self) -> int:
        """Number of batches over all ranks."""
        return len(self.batches)

    def _task(self, place: int) -> Task:
        return Task.of(self.batches[min(place, len(self) - 1)])

    @cached_property
    def first(self) -> Batch:
        """This rank's first batch, read in this process, once: the same on every rank if there are fewer than ranks."""
        return read_batch(self.dataset, self._task(self.rank))

    def __iter__(self) -> Iterator[tuple[Batch, bool]]:
        """Yield (batch, counts): ranks get equally many; one that runs out repeats the last, which does not count."""
        rounds = -(-len(self) // self.world_size)
        places = [turn * self.world_size + self.rank for turn in range(rounds)]
        batches = read_ahead(self.dataset, [self._task(place) for place in places], self.config)
        return ((batch, place < len(self)) for batch, place in zip(batches, places, strict=True))
