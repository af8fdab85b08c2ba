"""How much padded audio the device's memory holds, measured by real steps for each bucket of durations and texts.

The audio is noise of the bucket's longest duration, the ids and texts are those of real cuts, and the objective's own
preparer makes the rest: so it works for every objective, those of others included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from harken.config.schema import BatchConfig
from harken.core import distributed
from harken.core.batch import Batch
from harken.core.draws import Draws
from harken.core.errors import HarkenError
from harken.data.dataset import Row, Task, collate
from harken.data.limits import EDGES, Limits
from harken.data.loader import TrainLoader
from harken.engine.base import Engine
from harken.engine.memory import at_most, begin_peak, free, is_out_of_memory, peak_gib
from harken.optim.ema import WeightAverage
from harken.train.log import say
from harken.train.passes import Passes, StepRunner

NEAR = 20  # the search ends within a 20th of the rows
SHARES_OF_TEXTS = (0.5, 0.99, 1.0)  # quantiles of the texts' lengths, at which buckets end


@dataclass(frozen=True)
class Shape:
    """A bucket to be measured.

    seconds: of its longest cut. characters: of its longest text. cut, text: places in the manifest of cuts that have
    them. real: some cut lies in it; else it only bounds rectangles of a long cut and another one's long text.
    """

    seconds: float
    characters: float
    cut: int
    text: int
    real: bool


@dataclass(frozen=True)
class Measured:
    """What a bucket holds. padded: seconds. peak_gib: over all ranks. step_seconds: of one step of one such batch."""

    seconds: float
    characters: float
    rows: int
    padded: float
    peak_gib: float
    step_seconds: float


def shapes(loader: TrainLoader, *, texts: bool) -> list[Shape]:
    """Return the buckets of what a loader trains on, the longest first; `texts` divides them by length of text too."""
    selection = loader.selection
    seconds = selection.seconds.astype(np.float64)
    ends = [end for end in EDGES if seconds.min() < end < seconds.max()] + [float(seconds.max())]
    length = np.zeros(len(seconds), dtype=np.int32)
    if texts:
        length = loader.dataset.manifest.characters[selection.places].astype(np.int32)
    longest_texts = sorted({float(np.quantile(length, share, method="higher")) for share in SHARES_OF_TEXTS})
    in_time, in_text = np.searchsorted(ends, seconds), np.searchsorted(longest_texts, length)
    found = []
    for row, column in ((r, c) for r in reversed(range(len(ends))) for c in reversed(range(len(longest_texts)))):
        if not (in_time == row).any():
            continue
        cut = int(np.where(in_time == row, seconds, -1.0).argmax())
        text = int(np.where(in_text == column, length, -1).argmax())
        places = int(selection.places[cut]), int(selection.places[text])
        real = bool(((in_time == row) & (in_text == column)).any())
        found.append(Shape(float(seconds[cut]), longest_texts[column] if texts else 0.0, *places, real))
    return found


class Tuner:
    """Measures shapes. Every rank makes the same trials in the same order, and a shape fits when it fits on all."""

    def __init__(
        self, engine: Engine, average: WeightAverage | None, loader: TrainLoader, seed: int, most_seconds: float
    ) -> None:
        self.engine, self.average, self.loader, self.seed = engine, average, loader, seed
        self.most_seconds = most_seconds
        self.runner = StepRunner(engine, loader, seed)

    def measure(self, shape: Shape, guess: int) -> Measured:
        """Find by doubling and then by halving how many rows of a shape fit; `guess` is where to begin.

        Raises HarkenError when a single cut that is trained on does not fit.
        """
        most = max(1, int(self.most_seconds / shape.seconds))
        rows, fits, bad = min(max(1, guess), most), 0, most + 1
        best = (0.0, 0.0)
        while rows:
            figures = self.trial(shape, rows)
            if figures is None:
                bad = rows
            else:
                fits, best = rows, figures
            done = bad - fits <= max(1, fits // NEAR)
            rows = 0 if done else (min(2 * fits, bad - 1) if bad > most else max(1, (fits + bad) // 2))
        if not fits and shape.real:
            raise HarkenError(
                f"one cut of {shape.seconds:.2f} s must fit in memory and does not: lower `data.max_seconds` or "
                "`data.crop_seconds`, set `engine.activation_checkpointing=true`, or take a smaller model"
            )
        rows = max(1, fits)
        return Measured(shape.seconds, shape.characters, rows, rows * shape.seconds, *best)

    def trial(self, shape: Shape, rows: int) -> tuple[float, float] | None:
        """Take a step of one batch on every rank; return peak memory in GiB and seconds, None when it did not fit."""
        free()
        begin_peak()
        started = time.perf_counter()
        task = Task.of(np.full(rows, shape.cut))
        made = True
        try:
            batch = self.batch(shape, rows)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            made, batch = False, self.loader.smallest()
        failed = self.runner.attempt(Passes(), [(task, batch)], [], 0, max(batch.num_targets, 1.0))
        if failed is not None and self.engine.sent:
            self.engine.abandon()  # the rest, which the others wait for, takes memory
        self.engine.begin_reduce()
        if distributed.any_rank(failed is not None or not made):
            self.engine.abandon()
            return None
        self.engine.reduce()
        self.engine.step()
        if self.average is not None:
            self.average.update(self.engine.model)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        peak, seconds = max(distributed.gather([(peak_gib(), time.perf_counter() - started)]))
        return peak, seconds

    def batch(self, shape: Shape, rows: int) -> Batch:
        """Return a batch of a shape: noise, with ids and texts of real cuts."""
        dataset = self.loader.dataset
        cut, other = dataset.manifest[shape.cut], dataset.manifest[shape.text]
        text = " ".join(part.text.strip() for part in other.supervisions if part.text)
        size = int(shape.seconds * dataset.config.sample_rate)
        noise = np.random.default_rng(self.seed).standard_normal(size, dtype=np.float32) * np.float32(0.1)
        batch = collate([Row(cut.id, text, noise, 0)] * rows)
        return dataset.prepare(batch, [Draws(self.seed, 0)] * rows)


def tune(tuner: Tuner, found: Sequence[Shape], gib: float) -> Iterator[Measured]:
    """Measure shapes, the longest first, within `gib` of memory."""
    with at_most(gib):
        guess = 1.0
        for shape in found:
            measured = tuner.measure(shape, int(guess / shape.seconds))
            guess = measured.padded
            yield measured


def limits_from(measured: Sequence[Measured], batch: BatchConfig, longest: float, *, texts: bool) -> Limits:
    """Return the limits, and a size of micro-batches with which all ranks of a step have equally many.

    longest: seconds of the longest cut, which a micro-batch must hold.
    """
    world, best = distributed.world_size(), max(one.padded for one in measured)
    count = world * math.ceil(batch.seconds_per_step / (world * best))
    count = max(1, min(count, int(batch.seconds_per_step / longest)))
    rows = [[one.seconds, one.characters, one.padded] if texts else [one.seconds, one.padded] for one in measured]
    return Limits.of_rows(batch.seconds_per_step / count, rows)


def table(measured: Sequence[Measured], limits: Limits) -> str:
    """Return what was measured as text, and the keys that give a run these limits without measuring."""
    texts = bool(limits.characters)
    lines = [f"{'up to s':>9}{'characters':>12}{'padded s':>10}{'rows':>6}{'peak GiB':>10}{'s a step':>10}"]
    for one in sorted(measured, key=lambda one: (one.seconds, one.characters)):
        text = f"{one.characters:.0f}" if texts else "any"
        lines.append(
            f"{one.seconds:9.2f}{text:>12}{one.padded:10.1f}{one.rows:6d}{one.peak_gib:10.3f}{one.step_seconds:10.3f}"
        )
    rows = ",".join("[" + ",".join(f"{number:.7g}" for number in row) + "]" for row in limits.rows)
    return "\n".join([*lines, "", f"batch.max_seconds={limits.whole:.7g}", f"batch.limits=[{rows}]"])


def announce(measured: Measured) -> Measured:
    """Say what a bucket holds."""
    text = f" and {measured.characters:.0f} characters" if measured.characters else ""
    say(
        f"batch size: up to {measured.seconds:.2f} s{text}: {measured.padded:.1f} padded s ({measured.rows} rows), "
        f"{measured.peak_gib:.2f} GiB, {measured.step_seconds:.2f} s a step"
    )
    return measured
