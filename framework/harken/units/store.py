"""The packed label store: unsigned integers in one memory-mapped file, an index, and a card that says what they are.

A store is a folder:

    card.json       what the labels are (`Card`); written last, so a store without it is unfinished
    ids.txt         cut ids, sorted, one a line
    lookup.npy      (3, N) uint64, by rising hash: hashes of the ids (`harken.core.draws.key`), their lines in ids.txt
                    from 0, and the bytes at which these begin. Stores without it get it when it is first needed
    index.npy       (N + 1) int64: where each cut's labels begin; the last entry is the total
    labels.bin      the labels of all cuts, end to end, uint8 or uint16
    plan.json       the card and the hashes of the manifests: by it a continued labelling knows that it is the same
    unreadable.tsv  cuts without labels of their own, with reasons
    pieces/         while labelling only: for each finished piece, which of its cuts could not be labelled
"""

from __future__ import annotations

import json
import mmap
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harken.core.draws import key
from harken.core.errors import HarkenError
from harken.core.files import atomic_path, write_json_atomic, write_text_atomic

UNREADABLE = "unreadable.tsv"
TOLERANCE = 2
"""Labels, of each row, by which what a file gives may differ from what its stated duration promises."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a store's labels are.

    clusters: K. center: sample at the middle of what label 0 saw. hop: samples between labels. features: what was
    clustered, with the hash of its model. clusterer: hash of the centroids. cuts, labels: how many there are. rows:
    labels of one time, side by side: those of a frame's patches; 1 for speech, and in cards that do not say it.
    outputs: labels, one `hop` after the other, that only come together, as a model makes them of one frame.
    """

    clusters: int
    sample_rate: int
    hop: int
    center: float
    features: str
    clusterer: str
    dtype: str
    cuts: int
    labels: int
    rows: int = 1
    outputs: int = 1

    @property
    def rate(self) -> float:
        """Labels a second, those of one time counted once."""
        return self.sample_rate / self.hop

    @property
    def made_of(self) -> str:
        """What gives the class ids their meaning, in a line."""
        return f"{self.clusters} clusters {self.clusterer[:16]} of {self.features}"

    def labels_of(self, seconds: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """Return how many labels cuts of these seconds have: `rows` where a whole window lies inside the cut."""
        window = 2 * self.center + 1 + (self.outputs - 1) * self.hop
        samples = np.rint(np.asarray(seconds, dtype=np.float64) * self.sample_rate)
        frames = np.maximum((samples - window) // (self.hop * self.outputs) + 1, 0)
        return (self.rows * self.outputs * frames).astype(np.int64)

    @classmethod
    def smallest_dtype(cls, clusters: int) -> str:
        """Return the type of labels below `clusters`."""
        return "uint8" if clusters <= 256 else "uint16"

    def write(self, folder: Path) -> None:
        """Write card.json into the folder of a store."""
        write_json_atomic(folder / "card.json", asdict(self))


class LabelStore:
    """Read access to a store; opening costs the same for any size, and processes share the pages."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.card = self._read_card()

    @cached_property
    def without_own(self) -> dict[str, str]:
        """Why cuts have a filling instead of labels: their audio could not be labelled."""
        path = self.folder / UNREADABLE
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return dict(line.split("\t", 1) for line in lines)

    def _read_card(self) -> Card:
        path = self.folder / "card.json"
        if not path.is_file():
            unfinished = (self.folder / "pieces").is_dir()
            hint = (
                "its labelling did not finish: run the same `harken units label` again"
                if unfinished
                else "`harken units label` makes one"
            )
            raise HarkenError(f"no finished label store at {self.folder}; {hint}")
        try:
            card = Card(**json.loads(path.read_text(encoding="utf-8")))
            expected = card.labels * np.dtype(card.dtype).itemsize
            found = (self.folder / "labels.bin").stat().st_size
        except (OSError, ValueError, TypeError) as error:
            raise HarkenError(f"{self.folder} is no label store ({error}); `harken units label` makes one") from error
        if found != expected:
            raise HarkenError(
                f"{self.folder}/labels.bin must be {expected} bytes by its card, found {found}: make the labels again"
            )
        return card

    @property
    def ids(self) -> list[str]:
        """All cut ids in the order of the store, read anew: for looking at, not for looking up."""
        with self._reading("ids.txt") as path:
            return path.read_text(encoding="utf-8").splitlines()

    @cached_property
    def lookup(self) -> NDArray[np.uint64]:
        """Hashes, rows and places in ids.txt, `(3, N)`, by rising hash."""
        path = self.folder / "lookup.npy"
        if not path.is_file():
            with self._reading("ids.txt"):
                made = make_lookup(self.folder)
            try:
                write_lookup(self.folder, made)
            except (OSError, HarkenError):  # a folder that is read-only: this process keeps what it made
                return made
        with self._reading("lookup.npy") as path:
            lookup: NDArray[np.uint64] = np.asarray(np.load(path, mmap_mode="r"))  # slices of a plain view are cheaper
            if lookup.shape != (3, self.card.cuts):
                raise ValueError(f"expected 3 x {self.card.cuts} numbers, found {lookup.shape}")
            return lookup

    @cached_property
    def _names(self) -> mmap.mmap:
        with self._reading("ids.txt") as path, path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def index(self) -> NDArray[np.int64]:
        """Where each cut's labels begin."""
        with self._reading("index.npy") as path:
            index: NDArray[np.int64] = np.asarray(np.load(path, mmap_mode="r"))
            if index.shape != (self.card.cuts + 1,) or index[-1] != self.card.labels:
                raise ValueError(f"expected {self.card.cuts + 1} places up to {self.card.labels}")
            return index

    @contextmanager
    def _reading(self, name: str) -> Iterator[Path]:
        try:
            yield self.folder / name
        except (OSError, ValueError) as error:
            raise HarkenError(f"{self.folder / name} cannot be read: {error}; make the labels again") from error

    @cached_property
    def values(self) -> NDArray[np.unsignedinteger[Any]]:
        """All labels, memory-mapped."""
        return np.asarray(np.memmap(self.folder / "labels.bin", dtype=self.card.dtype, mode="r"))

    def __getitem__(self, cut: str) -> NDArray[np.unsignedinteger[Any]]:
        """Return the labels of a cut.

        Raises HarkenError when the store has none for it.
        """
        row = self._row(cut)
        if row is None:
            raise HarkenError(
                f"label store {self.folder} has no labels for cut `{cut}`: it was made from another manifest"
            )
        return self.values[self.index[row] : self.index[row + 1]]

    def _row(self, cut: str) -> int | None:
        """Return the row of a cut: those of its hash are few, and of these the id decides."""
        hashes, rows, starts = self.lookup
        hashed, line = np.uint64(key(cut)), cut.encode() + b"\n"
        place = int(np.searchsorted(hashes, hashed))
        while place < len(hashes) and hashes[place] == hashed:
            start = int(starts[place])
            if self._names[start : start + len(line)] == line:
                return int(rows[place])
            place += 1
        return None

    def rows(self, hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """Return the rows of many cuts by the hashes of their ids (`Manifest.hashes`), -1 where there is none.

        Two ids in the store of one hash, one in 400,000 stores of ten million cuts, are not told apart.
        """
        known, rows, _ = self.lookup
        if not len(known):
            return np.full(len(hashes), -1)
        order = np.argsort(hashes)  # a rising search stays in the cache
        places = np.searchsorted(known, hashes[order]).clip(max=len(known) - 1)
        found = np.empty(len(hashes), dtype=np.int64)
        found[order] = np.where(known[places] == hashes[order], rows[places].astype(np.int64), -1)
        return found


def make_lookup(folder: Path) -> NDArray[np.uint64]:
    """Return `LabelStore.lookup` of the ids in a store's ids.txt."""
    hashes, starts, at = array("Q"), array("Q"), 0
    with (folder / "ids.txt").open("rb") as stream:
        for line in stream:
            hashes.append(key(line.rstrip(b"\n").decode()))
            starts.append(at)
            at += len(line)
    hashed = np.frombuffer(hashes, dtype=np.uint64)
    order = np.argsort(hashed, kind="stable")
    return np.stack([hashed[order], order.astype(np.uint64), np.frombuffer(starts, dtype=np.uint64)[order]])


def write_lookup(folder: Path, lookup: NDArray[np.uint64]) -> None:
    """Write lookup.npy into the folder of a store."""
    with atomic_path(folder / "lookup.npy") as temporary, temporary.open("wb") as stream:
        np.save(stream, lookup)


def order_entries(entries: Iterable[tuple[str, int]], source: str) -> tuple[list[str], NDArray[np.int64]]:
    """Return the ids of (id, number of labels) sorted, and `LabelStore.index` for them.

    source: where they are from. Raises HarkenError when an id occurs twice.
    """
    ordered = sorted(entries)
    ids = [name for name, _ in ordered]
    if len(set(ids)) != len(ids):
        raise HarkenError(f"a cut id occurs twice in {source}: labels are keyed by id")
    return ids, np.cumsum([0, *(count for _, count in ordered)], dtype=np.int64)


def begin_store(folder: Path, ids: list[str], index: NDArray[np.int64], card: Card) -> None:
    """Write into a folder all of a store but its card, the labels all 0."""
    write_text_atomic(folder / "ids.txt", "".join(f"{name}\n" for name in ids))
    write_lookup(folder, make_lookup(folder))
    np.save(folder / "index.npy", index)
    with (folder / "labels.bin").open("wb") as stream:
        stream.truncate(card.labels * np.dtype(card.dtype).itemsize)


def fit_length(labels: NDArray[Any], expected: int, cut: str, unreadable: dict[str, str]) -> NDArray[Any]:
    """Give a cut exactly the `(T, ...)` labels its duration promises; what is off by more than a tolerance is named."""
    if abs(len(labels) - expected) > TOLERANCE:
        unreadable[cut] = f"cut `{cut}` gives {len(labels)} frames where its duration promises {expected}"
    if len(labels) < expected:
        missing = ((0, expected - len(labels)), *((0, 0) for _ in labels.shape[1:]))
        labels = np.pad(labels, missing, mode="edge" if len(labels) else "constant")
    return labels[:expected]


def write_reasons(path: Path, reasons: Mapping[str, str]) -> None:
    """Write a file of cuts that were left out, a line each: the id, a tab, the reason."""
    write_text_atomic(path, "".join(f"{cut}\t{reason}\n" for cut, reason in sorted(reasons.items())))
