"""Times the index of a manifest and the lookups of a label store of many cuts, made up in a temporary folder.

Run as `python tools/bench/index.py --cuts 1000000 --jobs 2`. Ten million cuts take 5 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "framework"))

from harken.core.files import write_json_atomic  # noqa: E402
from harken.data.manifest import Manifest  # noqa: E402
from harken.units.store import LabelStore, make_lookup, write_lookup  # noqa: E402

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "seven", "fields", "of", "barley", "until", "evening")
READ = 1000
Row = tuple[str, float, float]


def line(number: int) -> str:
    """Return a cut of about 480 bytes."""
    name, seconds = cut_id(number), 2 + number % 1800 / 100
    text = " ".join(WORDS[(number + step * 7) % len(WORDS)] for step in range(3 + number % 12))
    recording = {
        "id": name,
        "sources": [{"type": "file", "channels": [0], "source": f"/corpus/part-{number % 97:03}/{name}.flac"}],
        "sampling_rate": 16000,
        "num_samples": round(16000 * seconds),
        "duration": seconds,
        "channel_ids": [0],
    }
    span = {"id": name, "start": 0.0, "duration": seconds, "channel": 0}
    spoken = {**span, "recording_id": name, "text": text}
    return json.dumps({**span, "supervisions": [spoken], "recording": recording, "type": "MonoCut"}) + "\n"


def cut_id(number: int) -> str:
    """Return an id as long as those of corpora."""
    return f"spk{number % 9973:05}-utt{number:09}"


def memory(process: psutil.Process, kind: str) -> float:
    """Return MiB of a process and all below it; pages that they share count once in `pss`, `uss` is their own."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += getattr(one.memory_full_info(), kind)
        except psutil.Error:
            continue
    return total / 2**20


def run_apart(arguments: list[str]) -> tuple[float, float, int]:
    """Run a command; return its seconds, the peak of its processes' memory together in MiB, and its status."""
    began, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT / "framework")})
    while process.poll() is None:
        try:
            peak = max(peak, memory(psutil.Process(process.pid), "pss"))
        except psutil.Error:
            break
        time.sleep(0.2)
    return time.perf_counter() - began, peak, process.wait()


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds of a call in this process, and by how many MiB its own memory was larger at most."""
    own = psutil.Process()
    before, peak, ended = own.memory_full_info().uss, 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.002):
            peak = max(peak, own.memory_full_info().uss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    work()
    seconds = time.perf_counter() - began
    peak = max(peak, own.memory_full_info().uss)
    ended.set()
    watcher.join()
    return seconds, (peak - before) / 2**20


def read(manifest: Manifest, seed: int) -> None:
    """Read cuts at random places."""
    rng = random.Random(seed)
    for _ in range(READ):
        manifest.line(rng.randrange(len(manifest)))


def in_workers(manifest: Manifest, store: LabelStore, count: int) -> float:
    """Return by how many MiB of their own forked workers grow together that read cuts and their labels."""
    pipes = []
    for worker in range(count):
        reader, writer = os.pipe()
        if not os.fork():
            own = psutil.Process()
            before = own.memory_full_info().uss
            opened, labels = Manifest(manifest.path), LabelStore(store.folder)
            read(opened, worker)
            for place in random.Random(worker).sample(range(len(opened)), READ):
                labels[cut_id(place)]
            os.write(writer, str(own.memory_full_info().uss - before).encode())
            os._exit(0)
        pipes.append(reader)
    grown = sum(int(os.read(pipe, 100)) for pipe in pipes)
    for _ in range(count):
        os.wait()
    return grown / 2**20


def make_store(folder: Path, count: int) -> LabelStore:
    """Write a label store of as many cuts, 4 labels each."""
    folder.mkdir()
    ids = sorted(cut_id(number) for number in range(count))
    with (folder / "ids.txt").open("w") as stream:
        stream.writelines(f"{name}\n" for name in ids)
    np.save(folder / "index.npy", np.arange(0, 4 * count + 1, 4))
    (np.arange(4 * count) % 100).astype(np.uint8).tofile(folder / "labels.bin")
    facts = {"clusters": 100, "sample_rate": 16000, "hop": 160, "center": 199.5, "dtype": "uint8"}
    write_json_atomic(
        folder / "card.json", {**facts, "features": "none", "clusterer": "0", "cuts": count, "labels": 4 * count}
    )
    return LabelStore(folder)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the status is 1 when a build failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=1_000_000, metavar="N", help="cuts (default: 1000000)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes that index (default: 2)")
    parser.add_argument("--workers", type=int, default=4, metavar="N", help="processes that read (default: 4)")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the temporary folder is made")
    args = parser.parse_args(arguments)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as place:
        path = Path(place, "many.jsonl")
        with path.open("w") as stream:
            stream.writelines(map(line, range(args.cuts)))
        print(f"{args.cuts} cuts, {path.stat().st_size / 1e9:.2f} GB", flush=True)
        command = [sys.executable, "-m", "harken.apps.main", "data", "index", str(path), "--jobs", str(args.jobs)]
        seconds, peak, status = run_apart(command)
        if status:
            return 1
        rows.append((f"harken data index --jobs {args.jobs}", seconds, peak))
        opened: list[Manifest] = []
        rows.append(("open", *measured(lambda: opened.append(Manifest(path)))))
        manifest = opened[0]
        rows.append((f"read {READ} random cuts", *measured(lambda: read(manifest, 0))))
        rows.append(("sum all durations", *measured(lambda: float(manifest.seconds.sum()))))
        store = make_store(Path(place, "labels"), args.cuts)
        rows.append(
            ("make the lookup of a store", *measured(lambda: write_lookup(store.folder, make_lookup(store.folder))))
        )
        names = [cut_id(number) for number in random.Random(1).sample(range(args.cuts), READ)]
        rows.append(("first label", *measured(lambda: store[names[0]])))
        rows.append((f"labels of {READ} random cuts", *measured(lambda: [store[name] for name in names])))
        rows.append(("rows of all cuts", *measured(lambda: store.rows(np.asarray(manifest.hashes)))))
        began = time.perf_counter()
        grown = in_workers(manifest, store, args.workers)
        rows.append((f"{args.workers} workers: open both, read {READ} of each", time.perf_counter() - began, grown))
    print(f"{'':45} {'seconds':>10} {'peak MiB':>10}")
    for name, seconds, peak in rows:
        print(f"{name:45} {seconds:10.4f} {peak:10.1f}")
    print("Memory: of all processes of the index together (PSS); else by how much a process's own (USS) grows.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
