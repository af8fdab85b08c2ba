"""How full and how padded batches are, beside Lhotse's sampler, and what planning costs for large corpora.

See README.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from harken.config.schema import BatchConfig
from harken.core.files import write_json_atomic
from harken.data.loader import share_of
from harken.data.order import EpochOrder, Planner, Position
from harken.data.selection import select

Row = dict[str, object]
Seconds = NDArray[np.float32]


def librispeech(count: int, rng: np.random.Generator) -> Seconds:
    """Draw durations like LibriSpeech's: 62 % near its longest, the others uniform."""
    full = rng.random(count) < 0.62
    drawn = np.where(full, rng.normal(14.5, 1.2, count).clip(1.3, 17.3), rng.uniform(1.3, 16.0, count))
    return drawn.astype(np.float32)


def heavy_tail(count: int, rng: np.random.Generator) -> Seconds:
    """Draw log-normal durations, as of found speech."""
    return rng.lognormal(1.1, 0.9, count).clip(0.3, 40.0).astype(np.float32)


KINDS: dict[str, Callable[[int, np.random.Generator], Seconds]] = {
    "LibriSpeech-like": librispeech,
    "log-normal": heavy_tail,
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Measure the sampling plan: padding, fill and time, beside Lhotse's DynamicBucketingSampler.",
        epilog="example: python tools/bench/sampler.py --json sampler.json\n"
        "         python tools/bench/sampler.py --large 100000000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cuts", type=int, default=50_000, metavar="N", help="for padding and fill (default: 50000)")
    parser.add_argument("--max-seconds", type=float, default=87.5, metavar="S", help="of a batch (default: 87.5)")
    parser.add_argument(
        "--large", type=int, nargs="*", default=[1_000_000, 10_000_000], metavar="N", help="for the first batch's time"
    )
    parser.add_argument("--worlds", type=int, nargs="*", default=[1, 8, 64, 512], metavar="W", help="simulated ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here, too")
    return parser.parse_args()


def figures(name: str, seconds: Seconds, batches: list[list[NDArray[np.int64]]], limit: float, took: float) -> Row:
    """Return padding and fill of batches, each a list of rectangles of cuts."""
    seen = np.concatenate([rows for batch in batches for rows in batch])
    if sorted(seen.tolist()) != list(range(len(seconds))):
        raise SystemExit(f"{name}: not every cut exactly once")
    exact = seconds.astype(np.float64)
    padded = sum(float(exact[rows].max()) * len(rows) for batch in batches for rows in batch)
    real = float(exact.sum())
    return {
        "sampler": name,
        "batches": len(batches),
        "padding %": 100 * (1 - real / padded),
        "full %": 100 * real / limit / len(batches),
        "rectangles a batch": sum(map(len, batches)) / len(batches),
        "seconds": took,
    }


def planned(seconds: Seconds, limit: float, parts: int) -> Row:
    """Plan one epoch with harken, for 32 micro-batches a step."""
    batch = BatchConfig(max_seconds=limit, seconds_per_step=32 * limit, parts=parts)
    begin = time.perf_counter()
    selection = select(seconds, 0.0, float("inf"), None)
    pool, plan = Planner(EpochOrder.of(selection, batch, 1), batch, 1).segment(0, 0)
    took = time.perf_counter() - begin
    batches = [[pool.places[rows].astype(np.int64) for rows in plan[place]] for place in range(len(plan))]
    return figures(f"harken, {parts} part(s)", seconds, batches, limit, took)


def lhotse(seconds: Seconds, limit: float) -> Row:
    """Draw one epoch from Lhotse's sampler with 30 buckets."""
    from lhotse import CutSet, MonoCut
    from lhotse.dataset import DynamicBucketingSampler

    cuts = CutSet.from_cuts(
        MonoCut(id=str(place), start=0, duration=float(duration), channel=0) for place, duration in enumerate(seconds)
    ).to_eager()
    begin = time.perf_counter()
    sampler = DynamicBucketingSampler(
        cuts, max_duration=limit, num_buckets=30, shuffle=True, seed=1, rank=0, world_size=1
    )
    batches = [[np.array([int(cut.id) for cut in batch])] for batch in sampler]
    took = time.perf_counter() - begin
    return figures("Lhotse DynamicBucketingSampler, 30 buckets", seconds, batches, limit, took)


def first_batch(path: Path, limit: float) -> Row:
    """Select, plan the first segment and find a position in the middle of an epoch, for a corpus of `path`'s durations.

    Runs in a process of its own, whose memory is counted.
    """
    seconds = np.load(path, mmap_mode="r")
    batch = BatchConfig(max_seconds=limit, seconds_per_step=32 * limit)
    before = peak_mb()
    begin = time.perf_counter()
    selection = select(seconds, 0.5, 30.0, None)
    order = EpochOrder.of(selection, batch, 1)
    planner = Planner(order, batch, 1)
    planner.segment(0, 0)
    first = time.perf_counter() - begin
    begin = time.perf_counter()
    planner.segment(3, order.count // 2)
    return {
        "cuts": len(seconds),
        "segments": order.count,
        "first batch after s": first,
        "middle of epoch 3 after s": time.perf_counter() - begin,
        "memory MB": peak_mb() - before,
    }


def peak_mb() -> float:
    """Return the most memory this process has had; `getrusage` would count its parent's, too."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def large(count: int, limit: float) -> Row:
    """Measure a corpus of `count` cuts."""
    with TemporaryDirectory() as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        path = Path(folder) / "seconds.npy"
        np.save(path, librispeech(count, np.random.default_rng(1)))
        return fresh.submit(first_batch, path, limit).result()


def step_cost(world_size: int, limit: float) -> Row:
    """Return what a rank's tasks of a step cost, its part of planning included, for 512 micro-batches a step."""
    seconds = librispeech(500_000, np.random.default_rng(1))
    batch = BatchConfig(max_seconds=limit, seconds_per_step=512 * limit)
    selection = select(seconds, 0.0, float("inf"), None)
    planner = Planner(EpochOrder.of(selection, batch, 1), batch, 1)

    def tasks() -> Iterator[int]:
        position = Position()
        while position.epoch == 0:
            pool, plan = planner.segment(position.epoch, position.segment)
            share = share_of(plan, position.step, world_size - 1, world_size, even=True)
            for number in (*share.parts, *share.idle):
                _ = pool.places[plan.part(number)]
            position = planner.after(position)
            yield position.step

    begin = time.perf_counter()
    planner.segment(0, 0)
    plan_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    steps = sum(1 for _ in tasks())
    took = time.perf_counter() - begin
    return {
        "ranks": world_size,
        "steps": steps,
        "plan, ms a step": 1000 * plan_seconds / steps,
        "tasks of a rank, ms a step": 1000 * took / steps,
    }


def table(rows: list[Row]) -> str:
    """Return rows as a Markdown table."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    options = parse()
    found: dict[str, list[Row]] = {}
    for kind, draw in KINDS.items():
        seconds = draw(options.cuts, np.random.default_rng(0))
        rows = [planned(seconds, options.max_seconds, parts) for parts in (1, 2)]
        found[f"{kind}, {options.cuts} cuts, {options.max_seconds:g} s"] = [*rows, lhotse(seconds, options.max_seconds)]
    if options.large:
        found["large corpora"] = [large(count, options.max_seconds) for count in options.large]
    if options.worlds:
        found["cost of a step of 512 micro-batches"] = [
            step_cost(world_size, options.max_seconds) for world_size in options.worlds
        ]
    for title, rows in found.items():
        print(f"\n{title}\n\n{table(rows)}")
    if options.json is not None:
        write_json_atomic(options.json, found)


if __name__ == "__main__":
    main()
