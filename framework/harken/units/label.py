"""Labelling: a streamed, resumable pass into a store whose size is known before it starts.

The place of every cut's labels follows from its duration, so processes write their own ranges of one file and nothing
is merged. Batches are planned once for the manifest, whatever the number of processes, and each is computed on one
thread: the bits do not depend on how the work was divided.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from harken.core.errors import HarkenError
from harken.core.files import check_replaceable, remove, write_json_atomic
from harken.core.pieces import Piece, shared_folder
from harken.data.dataset import read_whole
from harken.data.manifest import Manifest
from harken.data.parallel import end_with_parent
from harken.data.plan import rectangles
from harken.units.clusterer import Clusterer
from harken.units.features import Features
from harken.units.store import UNREADABLE, Card, begin_store, fit_length, order_entries, write_reasons
from harken.units.tokenizer import tokenizer_clusterer

BATCHES_OF_A_PIECE = 8
MakeFeatures = Callable[[], Features]


@dataclass(frozen=True)
class Job:
    """What every process of a labelling needs; it is pickled to them.

    clusterer: folder of the one that was fitted on the features; None where these are a tokenizer's, which has its own.
    """

    out: Path
    manifests: tuple[str, ...]
    clusterer: str | None
    features: MakeFeatures
    sample_rate: int
    max_seconds: float


@dataclass(frozen=True)
class Layout:
    """Where labels go: sorted ids, `(N + 1)` offsets, and the pieces of batches of (manifest, place)."""

    ids: list[str]
    index: NDArray[np.int64]
    rows: dict[str, int]
    pieces: list[list[tuple[int, NDArray[np.int64]]]]


def label(job: Job, processes: int, say: Callable[[str], None], piece: Piece | None = None) -> Card:
    """Label manifests into a store, continuing where an earlier call stopped.

    piece: of the work, to be done alone; the store is finished by a call without one.
    Raises HarkenError when the clusterer was fitted on other features, or a process failed.
    """
    features = job.features()
    clusterer = open_clusterer(job, features)
    if features.describe() != clusterer.features:
        raise HarkenError(
            f"{job.clusterer} clusters `{clusterer.features}`, and these features are `{features.describe()}`"
        )
    layout = plan_layout(job, features)
    card = Card(
        clusters=len(clusterer.centroids),
        sample_rate=job.sample_rate,
        hop=features.spec.stride,
        center=(features.spec.receptive_field - 1) / 2,
        features=clusterer.features,
        clusterer=clusterer.digest,
        dtype=Card.smallest_dtype(len(clusterer.centroids)),
        cuts=len(layout.ids),
        labels=int(layout.index[-1]),
        rows=features.rows,
    )
    if not _start_store(job, layout, card):
        say(f"{job.out} is finished: nothing to do")
        return card
    mine = piece.of(len(layout.pieces)) if piece is not None else range(len(layout.pieces))
    todo = [number for number in mine if not _marker(job.out, number).is_file()]
    say(
        f"{len(layout.ids)} cuts, {card.labels} labels of {card.clusters} clusters at {card.rate:g} Hz; "
        f"{len(todo)} of {len(mine)} pieces to do"
    )
    _run(job, todo, processes)
    if piece is not None:
        return card
    unreadable = _finish(job, layout, card)
    if unreadable:
        say(f"WARNING {len(unreadable)} cuts have no labels of their own, among them:")
        for reason in list(unreadable.values())[:5]:
            say(f"  {reason}")
        say(f"  all of them are named in {job.out / UNREADABLE}")
    return card


def open_clusterer(job: Job, features: Features) -> Clusterer:
    """Return what names features: the clusterer that was fitted on them, or the codebook of a tokenizer.

    Raises HarkenError when it is missing or damaged.
    """
    return tokenizer_clusterer(features) if job.clusterer is None else Clusterer.load(job.clusterer)


def plan_layout(job: Job, features: Features) -> Layout:
    """Plan batches and offsets from durations alone."""
    batches: list[tuple[int, NDArray[np.int64]]] = []
    entries: list[tuple[str, int]] = []
    for number, path in enumerate(job.manifests):
        manifest = Manifest.filled(path)
        seconds = np.asarray(manifest.seconds)
        batches += [(number, places) for places in rectangles(seconds, job.max_seconds)]
        for place, duration in enumerate(seconds.tolist()):
            entries.append(
                (
                    str(manifest.line(place)["id"]),
                    features.rows * features.spec.num_frames(round(duration * job.sample_rate)),
                )
            )
    ids, index = order_entries(entries, ", ".join(job.manifests))
    pieces = [batches[start : start + BATCHES_OF_A_PIECE] for start in range(0, len(batches), BATCHES_OF_A_PIECE)]
    return Layout(ids, index, {name: row for row, name in enumerate(ids)}, pieces)


def _start_store(job: Job, layout: Layout, card: Card) -> bool:
    """Make the store's files, or check that those there belong to this labelling; False when it is finished."""
    plan = {**vars(card), "manifests": [Manifest(path).card["sha256"] for path in job.manifests]}
    path = job.out / "plan.json"
    if not path.is_file():
        try:
            check_replaceable(job.out, kind="label store")
        except HarkenError:
            if not path.is_file():  # another piece has just made it
                raise
        _make_store(job, layout, card, plan)
    # a store that was begun before there were patches does not say that it has one row, nor one output
    if {"rows": 1, "outputs": 1, **json.loads(path.read_text())} != json.loads(json.dumps(plan)):
        raise HarkenError(
            f"{job.out} holds labels of other audio, features or clusters: choose another folder or remove it"
        )
    return not (job.out / "card.json").is_file()


def _make_store(job: Job, layout: Layout, card: Card, plan: dict[str, Any]) -> None:
    with shared_folder(job.out) as folder:  # killed before it is whole, it has not begun; pieces may begin at once
        (folder / "pieces").mkdir()
        begin_store(folder, layout.ids, layout.index, card)
        write_json_atomic(folder / "plan.json", plan)


def _marker(out: Path, piece: int) -> Path:
    return out / "pieces" / f"{piece:06d}.json"


def _run(job: Job, todo: list[int], processes: int) -> None:
    if processes <= 1 or len(todo) <= 1:
        _work(job, todo)
        return
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_worker, args=(job, todo[number::processes]))
        for number in range(min(processes, len(todo)))
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:  # an interrupt ends them at once: what they finished is marked
        for worker in workers:
            worker.kill()
    failed = [worker.exitcode for worker in workers if worker.exitcode]
    if failed:
        raise HarkenError(
            f"{len(failed)} of {len(workers)} labelling processes failed (exit {failed}); "
            "finished pieces are kept, run the same command again"
        )


def _worker(job: Job, pieces: list[int]) -> None:
    """Label pieces as long as the process that asked for them lives; an error for the user is printed bare."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    end_with_parent()
    try:
        _work(job, pieces)
    except HarkenError as error:
        sys.exit(f"labelling process {os.getpid()}: {error}")


def _work(job: Job, pieces: list[int]) -> None:
    torch.set_num_threads(1)
    features = job.features()
    layout = plan_layout(job, features)
    clusterer = open_clusterer(job, features)
    manifests = [Manifest(path) for path in job.manifests]
    dtype = np.dtype(Card.smallest_dtype(len(clusterer.centroids)))
    descriptor = os.open(job.out / "labels.bin", os.O_WRONLY)
    try:
        for piece in pieces:
            unreadable: dict[str, str] = {}
            for number, places in layout.pieces[piece]:
                batch = read_whole(manifests[number], places, job.sample_rate, unreadable)
                if batch is None:
                    continue
                for cut, frames in zip(batch.ids, features(batch), strict=True):
                    row = layout.rows[cut]
                    first, last = int(layout.index[row]), int(layout.index[row + 1])
                    labels = clusterer(frames).reshape(-1, features.rows)
                    labels = fit_length(labels, (last - first) // features.rows, cut, unreadable)
                    os.pwrite(descriptor, labels.astype(dtype).tobytes(), first * dtype.itemsize)
            os.fsync(descriptor)
            write_json_atomic(_marker(job.out, piece), {"unreadable": unreadable})
    finally:
        os.close(descriptor)


def _finish(job: Job, layout: Layout, card: Card) -> dict[str, str]:
    """Complete the store; return the cuts whose audio could not be labelled, with reasons."""
    unreadable: dict[str, str] = {}
    for piece in range(len(layout.pieces)):
        unreadable.update(json.loads(_marker(job.out, piece).read_text())["unreadable"])
    write_reasons(job.out / UNREADABLE, unreadable)
    card.write(job.out)
    remove(job.out / "pieces")
    return unreadable
